"""Tests of the doors other people's code comes through, and of which room may know which."""
from __future__ import annotations

import ast
import subprocess
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load_state
from ldm.util import get_obj_from_str, instantiate_from_config

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
    pictures = []
    with torch.no_grad(), nullcontext("no autocast on the CPU"), model.ema_scope():
        for batch in chunk(prompts, n_samples):
            uc = model.get_learned_conditioning(n_samples * [""]) if scale != 1.0 else None
            c = model.get_learned_conditioning(list(batch) if isinstance(batch, tuple) else batch)
            samples_ddim, _ = sampler.sample(S=5, conditioning=c, batch_size=n_samples, shape=shape, verbose=False,
                                             unconditional_guidance_scale=scale, unconditional_conditioning=uc,
                                             eta=0.0, x_T=start_code)
            x_samples_ddim = model.decode_first_stage(samples_ddim)
            pictures.append(torch.clamp((x_samples_ddim + 1.0) / 2.0, min=0.0, max=1.0))
    return torch.cat(pictures)


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
    """CompVis's objective through its own doors: a batch of pictures and captions, a loss with gradients."""
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


# --- who may know whom --------------------------------------------------------------------------------------------

TORCH = {"torch", "einops", "numpy"}                       # what rooms of pure arithmetic are made of
MAY_IMPORT = {                                             # room → the rooms of ldm it may import, besides itself
    "util": set(), "lr_scheduler": set(),
    "checkpoint": {"util"},
    "modules": {"util"},
    "models": {"modules", "checkpoint", "util"},
    "data": {"checkpoint", "util"},
    "config": {"checkpoint", "util"},
    "customization": {"models", "modules", "data", "config", "checkpoint", "util"},
    "convert": {"checkpoint", "util"},
    "compute": {"models", "util"},
    "pipeline": {"compute", "customization", "models", "modules", "data", "config", "checkpoint", "util"},
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
        assert not roots & {"scripts", "tests"}, path.relative_to(ROOT)


def test_networks_are_made_of_torch():
    """Only the tokenizer needs more, and DBIM's formula knows nothing but tensors."""
    for path in ROOT.glob("ldm/modules/**/*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - TORCH - {"ldm"}
        assert outside <= ({"tokenizers", "transformers"} if path.name == "tokenizer.py" else set()), path.name
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
