"""Tests of the doors other people's code comes through, and of which room may know which."""
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ldm.checkpoint import SCHEDULE_BUFFERS, load_state
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import UserError, get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).parents[1]
DOORS = """
ldm.util.instantiate_from_config ldm.util.get_obj_from_str ldm.util.exists ldm.util.default
ldm.lr_scheduler.LambdaLinearScheduler
ldm.models.autoencoder.AutoencoderKL
ldm.models.diffusion.ddpm.DDPM ldm.models.diffusion.ddpm.LatentDiffusion ldm.models.diffusion.ddpm.DiffusionWrapper
ldm.models.diffusion.ddim.DDIMSampler ldm.models.diffusion.plms.PLMSSampler
ldm.models.diffusion.dpm_solver.DPMSolverSampler
ldm.modules.attention.CrossAttention ldm.modules.attention.BasicTransformerBlock
ldm.modules.attention.SpatialTransformer
ldm.modules.diffusionmodules.openaimodel.UNetModel
ldm.modules.diffusionmodules.model.Encoder ldm.modules.diffusionmodules.model.Decoder
ldm.modules.encoders.modules.FrozenCLIPEmbedder
ldm.modules.ema.LitEma
ldm.modules.distributions.distributions.DiagonalGaussianDistribution
"""


@pytest.mark.parametrize("door", DOORS.split())
def test_doors_stand_where_they_were(door):
    found = get_obj_from_str(door)
    assert callable(found) and found.__name__ == door.rpartition(".")[2]


# --- scripts as others write them ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def released(small_world, tmp_path_factory) -> tuple[Path, Path]:
    """A configuration file and a Lightning checkpoint, as scripts are given them."""
    checkpoint = tmp_path_factory.mktemp("released") / "model.ckpt"
    torch.save({"state_dict": load_state(small_world.checkpoint), "global_step": 470000}, checkpoint)
    return small_world.folder / "model.yaml", checkpoint


def load_model_from_config(config_path: Path, checkpoint: Path):
    config = OmegaConf.load(config_path)
    loaded = torch.load(checkpoint, map_location="cpu")
    if "global_step" in loaded:
        assert loaded["global_step"] == 470000
    model = instantiate_from_config(config.model)
    missing, unexpected = model.load_state_dict(loaded["state_dict"], strict=False)    # as txt2img scripts call it
    assert missing == [] and unexpected == []
    return model.to(torch.device("cpu")).eval()


def chunk(items: list[str], size: int):
    iterator = iter(items)
    return iter(lambda: tuple(islice(iterator, size)), ())


def text_to_images(model, sampler, prompts: list[str], n_samples: int, scale: float, seed: int,
                   start: bool) -> Tensor:
    """What a txt2img script does."""
    torch.manual_seed(seed)
    shape = [4, 8, 8]
    start_code = torch.randn([n_samples, *shape]) if start else None
    images = []
    with torch.no_grad(), nullcontext("no autocast on the CPU"), model.ema_scope():
        for batch in chunk(prompts, n_samples):
            uc = model.get_learned_conditioning(n_samples * [""]) if scale != 1.0 else None
            c = model.get_learned_conditioning(list(batch) if isinstance(batch, tuple) else batch)
            samples_ddim, _ = sampler.sample(S=5, conditioning=c, batch_size=n_samples, shape=shape, verbose=False,
                                             unconditional_guidance_scale=scale, unconditional_conditioning=uc,
                                             eta=0.0, x_T=start_code)
            x_samples_ddim = model.decode_first_stage(samples_ddim)
            images.append(torch.clamp((x_samples_ddim + 1.0) / 2.0, min=0.0, max=1.0))
    return torch.cat(images)


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("sampler_name", ["ddim.DDIMSampler", "plms.PLMSSampler", "dpm_solver.DPMSolverSampler"])
def test_a_foreign_text_to_image_script_runs(released, sampler_name, scale):
    model = load_model_from_config(*released)
    sampler = get_obj_from_str(f"ldm.models.diffusion.{sampler_name}")(model)
    prompts = ["a cat", "a dog", "a cat", "a red boat"]
    drawn, started = (text_to_images(model, sampler, prompts, 2, scale, seed=42, start=start)
                      for start in (False, True))
    assert drawn.shape == (4, 3, 32, 32) and torch.isfinite(drawn).all() and drawn.std() > 0.01
    assert torch.equal(drawn[:2], started[:2])                     # the seed decides all, the start is drawn first
    assert torch.allclose(started[0], started[2], atol=1e-5)       # the same prompt and start, in the other batch
    assert not torch.allclose(started[1], started[3], atol=1e-3)   # another prompt, the same start


def load_img(path: Path) -> Tensor:
    image = np.array(Image.open(path).convert("RGB").resize((32, 32))).astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(image[None].transpose(0, 3, 1, 2)) - 1.0


def test_a_foreign_image_to_image_script_runs(released, small_world):
    from ldm.models.diffusion.ddim import DDIMSampler
    model, n_samples, strength, scale, steps = load_model_from_config(*released), 2, 0.6, 5.0, 10
    sampler = DDIMSampler(model)
    init_image = load_img(small_world.photos / "0.png").repeat(n_samples, 1, 1, 1)
    with torch.no_grad(), model.ema_scope():
        torch.manual_seed(1)
        init_latent = model.get_first_stage_encoding(model.encode_first_stage(init_image))
        sampler.make_schedule(ddim_num_steps=steps, ddim_eta=0.0, verbose=False)
        t_enc = int(strength * steps)
        uc = model.get_learned_conditioning(n_samples * [""])
        c = model.get_learned_conditioning(n_samples * ["a cat"])
        torch.manual_seed(2)
        z_enc = sampler.stochastic_encode(init_latent, torch.tensor([t_enc] * n_samples))
        samples = sampler.decode(z_enc, c, t_enc, unconditional_guidance_scale=scale, unconditional_conditioning=uc)
        x_samples = torch.clamp((model.decode_first_stage(samples) + 1.0) / 2.0, min=0.0, max=1.0)
    assert x_samples.shape == (2, 3, 32, 32) and torch.isfinite(x_samples).all() and x_samples.std() > 0.01
    # With 10 steps of 1000, step index 6 is time 601: the latent is noised in closed form, then denoised by hand.
    torch.manual_seed(2)
    a = model.alphas_cumprod[601]
    expected = a.sqrt() * init_latent + (1 - a).sqrt() * torch.randn_like(init_latent)
    assert torch.allclose(z_enc, expected, atol=1e-6)
    x = z_enc
    with torch.no_grad():
        for t in (501, 401, 301, 201, 101, 1):
            times = torch.full((n_samples,), t)
            eps_u, eps_c = model.apply_model(x, times, uc), model.apply_model(x, times, c)
            eps = eps_u + scale * (eps_c - eps_u)
            a, previous = model.alphas_cumprod[t], model.alphas_cumprod[t - 100 if t > 1 else 0]
            x = previous.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - previous).sqrt() * eps
    assert torch.allclose(samples, x, atol=1e-3 * float(x.abs().max()))


def test_a_foreign_script_may_average_and_train(released):
    """CompVis's objective through its own doors: a batch of images and captions, a loss with gradients."""
    config = OmegaConf.load(released[0])
    config.model.params.use_ema = True
    model = instantiate_from_config(config.model)
    batch = {"image": torch.rand(2, 32, 32, 3) * 2 - 1, "caption": ["a cat", "a dog"]}
    z, c = model.get_input(batch, model.first_stage_key)
    assert z.shape == (2, 4, 8, 8) and c.shape == (2, 77, 32)
    model.p_losses(z, c, torch.tensor([10, 900])).mean().backward()
    assert any(parameter.grad is not None for parameter in model.model.parameters())
    assert all(parameter.grad is None for parameter in model.first_stage_model.parameters())
    before = model.model.diffusion_model.out[2].weight.detach().clone()
    model.model_ema(model.model)
    with model.ema_scope("test"):
        assert torch.allclose(model.model.diffusion_model.out[2].weight, before, atol=1e-6)


@torch.no_grad()
def test_latents_are_scaled_going_in_and_unscaled_coming_out(released):
    model = load_model_from_config(*released)
    assert model.scale_factor == 0.5                               # the small world's; SD v1's is 0.18215
    posterior = model.encode_first_stage(torch.rand(1, 3, 32, 32) * 2 - 1)
    torch.manual_seed(3)
    z = model.get_first_stage_encoding(posterior)
    torch.manual_seed(3)
    assert torch.equal(z, 0.5 * (posterior.mean + posterior.std * torch.randn_like(posterior.mean)))
    assert torch.equal(model.get_first_stage_encoding(posterior.mode()), 0.5 * posterior.mean)
    assert torch.equal(model.decode_first_stage(z), model.first_stage_model.decode(2.0 * z))


# --- what else clients call, and patch ----------------------------------------------------------------------------

def own_attention(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Plain attention in prompt-to-prompt's way: a body of its own, put in the place of CrossAttention's."""
    assert isinstance(x, Tensor) and (context is None or isinstance(context, Tensor) and len(context) == len(x))
    q, k, v = self.to_q(x), self.to_k(x if context is None else context), self.to_v(x if context is None else context)
    heads = []
    for one_q, one_k, one_v in zip(*(part.chunk(self.heads, dim=-1) for part in (q, k, v)), strict=True):
        heads.append((one_q @ one_k.mT * self.scale).softmax(dim=-1) @ one_v)
    return self.to_out(torch.cat(heads, dim=-1))


def plain_block(self, x: Tensor, context: Tensor | None = None) -> Tensor:
    """A transformer block's `_forward` as token merging replaces it."""
    x = self.attn1(self.norm1(x), context=None) + x
    x = self.attn2(self.norm2(x), context=context) + x
    return self.ff(self.norm3(x)) + x


def plain_network(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
    """The U-Net's forward as ControlNet replaces it."""
    assert timesteps.shape == (len(x),) == (len(context),)
    embedded = timestep_embedding(timesteps, self.model_channels).to(x.dtype)
    emb, h, skips = self.time_embed(embedded), x, []
    for module in self.input_blocks:
        h = module(h, emb, context)
        skips.append(h)
    h = self.middle_block(h, emb, context)
    for module in self.output_blocks:
        h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
    return self.out(h)


def patch_class(kind: str, name: str, own: Any) -> Callable[[Any, Any], None]:
    return lambda monkeypatch, model: monkeypatch.setattr(get_obj_from_str(f"ldm.modules.{kind}"), name, own)


def patch_objects(monkeypatch: Any, model: Any) -> None:
    for module in model.modules():
        if type(module).__name__ == "CrossAttention":
            monkeypatch.setattr(module, "forward", own_attention.__get__(module), raising=False)


def patch_apply_model(monkeypatch: Any, model: Any) -> None:
    inner = model.apply_model

    def wrapped(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert t.shape == (len(x),) == (len(cond),)
        return inner(x, t, cond)

    monkeypatch.setattr(model, "apply_model", wrapped)


def watch(monkeypatch: Any, model: Any) -> None:
    def look(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x, context = args
        assert isinstance(context, Tensor) and len(context) == len(x) == len(output) == 4

    model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.register_forward_hook(look)


@pytest.mark.parametrize("sampler_name", ["ddim.DDIMSampler", "dpm_solver.DPMSolverSampler"])
@pytest.mark.parametrize("patch", [
    patch_class("attention.CrossAttention", "forward", own_attention), patch_objects, patch_apply_model, watch,
    patch_class("attention.BasicTransformerBlock", "_forward", plain_block),
    patch_class("diffusionmodules.openaimodel.UNetModel", "forward", plain_network)],
    ids=["attention", "attention of objects", "apply_model", "hook", "block", "network"])
def test_patches_see_tensors_and_change_nothing_they_do_not_mean_to(released, monkeypatch, patch, sampler_name):
    model = load_model_from_config(*released).double()
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    text = [model.get_learned_conditioning([prompt] * 2) for prompt in ("a cat", "")]

    def draw() -> Tensor:
        return get_obj_from_str(f"ldm.models.diffusion.{sampler_name}")(model).sample(
            4, 2, (4, 8, 8), text[0], x_T=x_T, verbose=False, unconditional_guidance_scale=3.0,
            unconditional_conditioning=text[1])[0]

    with torch.no_grad():
        expected = draw()
        patch(monkeypatch, model)
        assert (draw() - expected).abs().max() < 1e-8 * expected.abs().max()


@pytest.mark.parametrize("sampler_name", ["ddim.DDIMSampler", "plms.PLMSSampler", "dpm_solver.DPMSolverSampler"])
def test_sample_takes_compvis_arguments_in_their_order(released, sampler_name):
    model = load_model_from_config(*released)
    with pytest.warns(UserWarning, match="ignores foo, as"):
        sampler = get_obj_from_str(f"ldm.models.diffusion.{sampler_name}")(model, schedule="linear", foo=1)
    c, uc = (model.get_learned_conditioning([text]) for text in ("a cat", ""))
    x_T = torch.randn(1, 4, 8, 8)
    expected, _ = sampler.sample(S=3, batch_size=1, shape=[4, 8, 8], conditioning=c, x_T=x_T, verbose=False,
                                 unconditional_guidance_scale=3.0, unconditional_conditioning=uc)
    given = (3, 1, [4, 8, 8], c, None, None, None, False, 0.0, None, None, 1.0, 0.0, None, None, False, x_T, 100, 3.0,
             uc)
    with pytest.warns(UserWarning, match="ignores bar, as"):
        assert torch.equal(sampler.sample(*given, bar=None)[0], expected)
    for wish in ({"quantize_x0": True}, {"score_corrector": object()}, {"normals_sequence": [1]}):
        with pytest.raises(UserError, match=f"does not know how to use {next(iter(wish))}"):
            sampler.sample(3, 1, [4, 8, 8], c, **wish)


def test_a_sampler_shows_the_schedule(released):
    model = load_model_from_config(*released)
    sampler = get_obj_from_str("ldm.models.diffusion.ddim.DDIMSampler")(model)
    sampler.make_schedule(5, ddim_eta=1.0)
    assert all(getattr(sampler, name) is getattr(model, name) for name in SCHEDULE_BUFFERS)
    found = sampler.ddim_sigmas_for_original_num_steps ** 2                  # eta 1: DDPM's posterior variance
    assert np.allclose(found, model.posterior_variance, rtol=5e-3, atol=1e-7)


def test_ddpm_steps_are_those_of_the_posterior(released):
    """The posterior in Gaussian algebra: the product of N(x_t; sqrt(a) x, b) and N(x; sqrt(a_prev) x_0, 1 - a_prev)."""
    model = load_model_from_config(*released)
    c, x = model.get_learned_conditioning(["a cat"] * 2), torch.randn(2, 4, 8, 8)
    t = torch.tensor([0, 500])
    mean, variance, log_variance = model.q_posterior(0.3 * x, x, t)
    a, a_prev, beta = (values[t].double().reshape(-1, 1, 1, 1) for values in (
        model.alphas_cumprod, model.alphas_cumprod_prev, model.betas))
    precision = (1 - beta) / beta + 1 / (1 - a_prev)
    expected = ((1 - beta).sqrt() * x / beta + a_prev.sqrt() * 0.3 * x / (1 - a_prev)) / precision
    assert torch.allclose(mean[1].double(), expected[1], atol=1e-4) and torch.allclose(mean[0], 0.3 * x[0], atol=1e-5)
    assert torch.allclose(variance.double()[1], 1 / precision[1], rtol=1e-4) and variance[0] == 0
    with torch.no_grad():
        x_0 = model.predict_start_from_noise(x, t, model.apply_model(x, t, c))
        predicted = model.p_mean_variance(x, c, t, clip_denoised=True)
        assert torch.equal(predicted[0], model.q_posterior(x_0.clamp(-1, 1), x, t)[0])
        torch.manual_seed(1)
        stepped = model.p_sample(x, c, t, clip_denoised=True, temperature=0.5)
        torch.manual_seed(1)
        noise = 0.5 * torch.randn_like(x) * (0.5 * log_variance).exp()
    assert torch.equal(stepped[0], predicted[0][0]) and torch.allclose(stepped[1], (predicted[0] + noise)[1], atol=1e-6)


def test_a_model_samples_and_decodes_by_itself(released):
    model = load_model_from_config(*released)
    c = model.get_learned_conditioning(["a cat"])
    seen: list[int] = []
    x, states = model.p_sample_loop(c, (1, 4, 8, 8), True, verbose=False, callback=seen.append, timesteps=3)
    assert seen == [2, 1, 0] and len(states) == 2 and states[-1] is x and x.isfinite().all()
    assert model.sample(c, 1, verbose=False, timesteps=2).shape == (1, 4, 8, 8)
    assert model.sample_log(c, 1, ddim=True, ddim_steps=2)[0].shape == (1, 4, 8, 8)
    latents = x.clone().requires_grad_()
    assert torch.equal(model.differentiable_decode_first_stage(latents), model.decode_first_stage(x))
    assert torch.autograd.grad(model.differentiable_decode_first_stage(latents).sum(), latents)[0].abs().sum() > 0
    loss, values = model.shared_step({"image": torch.rand(1, 32, 32, 3), "caption": ["a cat"]})
    assert loss.ndim == 0 and list(values) == ["train/loss"] and model.clip_denoised is False
    model.register_schedule(given_betas=[0.1, 0.2])
    assert model.num_timesteps == 2 and torch.allclose(model.alphas_cumprod, torch.tensor([0.9, 0.72]))


def test_a_schedule_that_a_file_lacks_is_not_missing(released):
    model = load_model_from_config(*released)
    state = {key: value for key, value in model.state_dict().items() if key not in SCHEDULE_BUFFERS}
    first = next(iter(state))
    assert model.load_state_dict(state, strict=False) == ([], [])
    del state[first]
    assert model.load_state_dict(state, strict=False) == ([first], [])


def test_the_text_encoder_answers_under_transformers_names(released):
    embedder = load_model_from_config(*released).cond_stage_model
    ids = embedder.tokenize(["a cat"])
    found = embedder.transformer(input_ids=ids.int(), output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, embedder("a cat")) and len(found.hidden_states) == 2
    tower = embedder.transformer.text_model
    assert torch.equal(tower.final_layer_norm(found.hidden_states[-1]), found.last_hidden_state)
    assert torch.equal(tower.embeddings(input_ids=ids), found.hidden_states[0])
    table, size = embedder.transformer.get_input_embeddings(), embedder.base_size
    embedder.tokenizer.add_tokens(["<mine>"])
    assert embedder.transformer.resize_token_embeddings(len(embedder.tokenizer)) is table
    before = table.weight.data.clone()
    table.weight.data[size] = table.weight.data[5]
    assert table.weight.shape == (size + 1, 32) and torch.equal(table(torch.tensor([[size]]))[0, 0], before[5])
    assert torch.equal(embedder("a cat"), found.last_hidden_state)


def test_normalization_has_32_groups_unless_the_file_says_otherwise(released):
    """What 32 groups do not divide is refused; only files of a small model from before the key are completed."""
    params = OmegaConf.load(released[0]).model.params
    unet, first_stage = (OmegaConf.to_container(node) for node in (params.unet_config, params.first_stage_config))
    del unet["params"]["group_channels"], first_stage["params"]["ddconfig"]["group_channels"]
    groups = [module.num_groups for module in instantiate_from_config(unet).modules()
              if isinstance(module, torch.nn.GroupNorm)]
    assert set(groups) == {32}
    with pytest.raises(UserError, match="32 groups does not divide 8 channels; .* set group_channels"):
        instantiate_from_config(first_stage)
    explicit = [module.num_groups for module in instantiate_from_config(OmegaConf.load(released[0]).model).modules()
                if isinstance(module, torch.nn.GroupNorm)]
    params.unet_config, params.first_stage_config = unet, first_stage
    node = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    earlier = [module.num_groups for module in instantiate_from_config(node).modules()
               if isinstance(module, torch.nn.GroupNorm)]
    assert earlier == explicit and set(earlier) == {2, 4, 8, 12, 16}


# --- who may know whom --------------------------------------------------------------------------------------------

TORCH = {"torch", "einops", "numpy"}                       # what rooms of pure arithmetic are made of
MAY_IMPORT = {                                             # room → the rooms of ldm it may import, besides itself
    "util": set(), "words": set(), "lr_scheduler": set(), "progress": set(), "signals": set(),
    "text": {"util"}, "records": {"text", "util", "words"}, "embedded": {"data", "words"}, "files": {"util"},
    "checkpoint": {"util"}, "saving": {"files"},
    "modules": {"util", "words"},
    "recognize": {"convert", "checkpoint", "util"},
    "models": {"modules", "recognize", "progress", "checkpoint", "util"},
    "data": {"records", "text", "files", "checkpoint", "util", "words"},
    "config": {"modules", "util"}, "config_files": {"config", "files", "text", "util", "words"},
    "flags": {"config", "config_files", "data", "text", "util"}, "cli": {"flags", "signals", "util", "config_files"},
    "sheets": {"data", "files", "records", "util"}, "requests": {"models", "config", "util"},
    "comparison": {"requests", "sheets"},
    "customization": {"convert", "saving", "models", "modules", "data", "config", "recognize", "progress", "records",
                      "checkpoint", "util",
                      "words"},
    "convert": {"saving", "checkpoint", "util"},
    "device": {"util"},
    "base": {"device", "customization", "models", "config", "recognize", "embedded", "checkpoint", "util"},
    "exporting": {"base", "customization", "convert", "checkpoint", "config", "files", "saving", "util"},
    "pipeline": {"requests", "base", "device", "customization", "models", "modules", "data", "config", "util"},
    "choice": {"pipeline", "evaluation", "config"},
    "sampling": {"choice", "pipeline", "comparison", "requests", "base", "device", "sheets", "customization", "data",
                 "config", "config_files", "embedded", "progress", "files", "util"},
    "training": {"pipeline", "comparison", "base", "device", "sheets", "customization", "models", "modules", "data",
                 "config", "config_files", "embedded", "progress", "signals", "records", "files", "checkpoint", "util",
                 "words"},
    "evaluation": {"saving", "sheets", "customization", "modules", "data", "records", "text", "files",
                      "checkpoint", "util",
                   "words"},
}
NOT_DEEPER = {"models", "modules"}                   # what scripts and evaluation reach through the pipeline only


def imported(path: Path) -> set[str]:
    """Lists the modules a file imports anywhere, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    """Lists the rooms of ldm a file imports: `ldm.modules.attention` is of `modules`."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("ldm.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_import_goes_against_an_arrow(room):
    for path in [*ROOT.glob(f"ldm/{room}.py"), *ROOT.glob(f"ldm/{room}/**/*.py")]:
        against = rooms(path) - MAY_IMPORT[room] - {room}
        assert not against, f"{path.relative_to(ROOT)} may not know {against}"


def test_scripts_and_evaluation_reach_networks_through_the_pipeline():
    for path in [*ROOT.glob("scripts/*.py"), *ROOT.glob("ldm/evaluation/**/*.py")]:
        if path.name != "small_clip.py":         # a network itself: the embedded model's text tower is half of it
            assert not rooms(path) & NOT_DEEPER, path.relative_to(ROOT)
    for path in ROOT.glob("ldm/**/*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        beside = {path.name for path in (ROOT / "scripts").iterdir() if path.is_dir()}      # packages of the scripts
        assert not roots & {"scripts", "tests", "small_world", *beside}, path.relative_to(ROOT)


def calls_of(path: Path, name: str) -> list[int]:
    """Lists the lines in which a file calls `name`, such as "Image.open"."""
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if ast.unparse(call.func) == name]


def test_images_are_opened_by_the_loader_alone():
    """Pillow starts Ghostscript for a file that begins as PostScript does, whatever it is called."""
    opened = {path.relative_to(ROOT).as_posix(): lines for folder in ("ldm", "scripts")
              for path in ROOT.glob(f"{folder}/**/*.py") if (lines := calls_of(path, "Image.open"))}
    assert list(opened) == ["ldm/data/images.py"] and len(opened["ldm/data/images.py"]) == 1


def test_networks_are_made_of_torch():
    """Only the tokenizer needs more, and DBIM's formula knows nothing but tensors."""
    for path in ROOT.glob("ldm/modules/**/*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - TORCH - {"ldm"}
        assert outside <= ({"tokenizers", "transformers", "ftfy"} if path.name == "tokenizer.py" else set()), path.name
    assert {name.split(".")[0] for name in imported(ROOT / "ldm/modules/dbim.py")} <= {
        "__future__", "enum", "dataclasses", "torch", "ldm"}


def test_samplers_do_not_know_the_networks():
    """They know `apply_model`; the one import of ddpm is for type checkers."""
    networks = ("ldm.modules.attention", "ldm.modules.encoders", "ldm.modules.diffusionmodules.openaimodel",
                "ldm.modules.diffusionmodules.model")
    for path in ROOT.glob("ldm/models/diffusion/**/*.py"):
        if path.name != "ddpm.py":
            assert not any(name.startswith(networks) for name in imported(path)), path.name


def test_importing_samplers_and_checkpoints_is_light():
    """Packages that take seconds, or that a user may not have, load only when there is work for them."""
    heavy = ("open_clip", "clip_retrieval", "wandb", "diffusers", "transformers", "tokenizers", "pytorch_lightning")
    code = f"import sys, ldm.models.diffusion.ddim, ldm.checkpoint; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
