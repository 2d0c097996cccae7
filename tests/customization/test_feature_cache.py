"""Tests of training's savings: kept posteriors and captions, cast weights, checkpointing, memory, its advice."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, SmallWorld
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_finetune import gradients, make_module, make_plan
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.customization.finetune import ConceptFinetune
from ldm.data.batches import SeenImage
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.training.memory import GB, MIXED, activation_bytes, advice, check_memory
from ldm.training.run import fine_tune
from ldm.util import UserError

TRAINERS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The gradients agree to 1e-5 of the largest value."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_kept_constants_give_the_same_loss_and_gradients(small_world: SmallWorld) -> None:
    module, kept = make_module(small_world), make_module(small_world)
    for model in (module.model, kept.model):           # networks in float64, for the reason of test_speed's `model`
        for part in (model.model, model.cond_stage_model, model.first_stage_model):
            part.double()
    plan = make_plan(small_world, module, batch_size=2)
    kept.keep_constants(plan, decoder=False)
    encoded: list[int] = []
    kept.model.cond_stage_model.transformer.register_forward_hook(lambda m, args, out: encoded.append(len(args[0])))
    for micro_step in range(3):
        batch = plan.batch(micro_step)
        assert_same_gradients(gradients(kept, batch), gradients(module, batch))
    assert encoded[:2] == [2, 1] and encoded.count(1) == 1 and encoded[2:] == [2, 2]   # "a photo of a cat" once


def test_each_image_and_its_mirror_image_are_encoded_once(small_world: SmallWorld) -> None:
    module = make_module(small_world)
    plan, vae = make_plan(small_world, module), module.model.first_stage_model
    encoded: list[Tensor] = []
    vae.encoder.register_forward_pre_hook(lambda m, args: encoded.append(args[0]))
    images = plan.seen_images()
    assert {image for step in range(8) for image in plan.batch(step).seen} <= set(images)
    expected = {image: module._moments(plan.load(image)[None])[0] for image in images}
    encoded.clear()
    module.keep_constants(plan, decoder=True)
    assert len(images) == len(encoded) == len(module.posteriors) == 2 * (2 + 3)
    assert {len(image) for image in encoded} == {1}
    for image, moments in expected.items():
        assert torch.equal(module.posteriors.moments([image])[0], moments)
    one, mirrored = (expected[SeenImage(0, 1, flipped)] for flipped in (False, True))
    assert not torch.allclose(mirrored, one.flip(2), atol=1e-4)            # so each has its own
    assert not list(vae.encoder.parameters()) and list(vae.decoder.parameters()) and vae.encoder.reduction == 4


def test_a_run_draws_fresh_samples_of_the_kept_posteriors(small_world: SmallWorld) -> None:
    module = make_module(small_world)
    plan = make_plan(small_world, module)
    module.keep_constants(plan, decoder=False)
    drawn: dict[SeenImage, list[Tensor]] = {}
    for batch in map(plan.batch, range(12)):
        drawn.setdefault(batch.seen[0], []).append(module._noised_inputs(batch)[0][0])
    repeated = [latents for latents in drawn.values() if len(latents) > 1]
    assert repeated and all(not torch.equal(latents[0], latents[1]) for latents in repeated)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_previews_still_draw(small_world: SmallWorld, tmp_path: Path, cache: str) -> None:
    run = fine_tune(small_world.train_config(tmp_path, "preview.prompts=['a {} in the snow']", f"trainer.cache={cache}",
                                             "method.steps=1", "trainer.precision=bf16-mixed"))
    assert run.preview is not None and run.preview.stat().st_size > 1000


def test_runs_with_and_without_cache_learn_the_same(small_world: SmallWorld, tmp_path: Path) -> None:
    with_cache, without = (load_file(fine_tune(small_world.train_config(
        tmp_path, "method.learning_rate=2e-5", f"trainer.cache={cache}")).concept) for cache in ("true", "false"))
    for name in without:
        assert (with_cache[name] - without[name]).abs().max() < 1e-6, name


def autocast_gradients(module: ConceptFinetune, batch: object) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch, 0)
    module.zero_grad()
    loss.backward()
    learned = [*module.trained.values(), *module.word_blocks, *module.context_blocks]
    return {str(index): parameter.grad for index, parameter in enumerate(learned) if parameter.grad is not None}


def test_frozen_weights_in_the_compute_format_change_no_bit(small_world: SmallWorld) -> None:
    """Autocast casts them to the same values, in every step."""
    plain, light = make_module(small_world), make_module(small_world)
    light.lighten(torch.bfloat16, None)
    batch = make_plan(small_world, plain, batch_size=2).batch(0)
    expected, found = autocast_gradients(plain, batch), autocast_gradients(light, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    unet = light.model.model.diffusion_model
    assert {value.dtype for value in light.trained.values()} == {torch.float32} and unet.dtype == torch.bfloat16
    frozen = [value for part in (unet, light.model.cond_stage_model) for layer in part.modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d)) for value in layer.parameters() if not value.requires_grad]
    assert {value.dtype for value in frozen} == {torch.bfloat16}


def test_checkpointing_is_an_option_and_changes_no_gradient(small_world: SmallWorld) -> None:
    plain, saving = make_module(small_world), make_module(small_world)
    plain.lighten(None, False)
    saving.lighten(None, True)
    for module, on in ((plain, False), (saving, True)):
        blocks = [part for part in module.modules() if isinstance(part, (ResBlock, BasicTransformerBlock))]
        assert {getattr(part, "use_checkpoint", None) or getattr(part, "checkpoint", False) for part in blocks} == {on}
    batch = make_plan(small_world, plain).batch(0)
    expected, found = gradients(plain, batch), gradients(saving, batch)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# Memory.

def saved_bytes(module: ConceptFinetune, rows: int, checkpointing: bool) -> int:
    return activation_bytes(OmegaConf.create(UNET), "crossattn-kv", (rows, 4, 8, 8), 77, None, checkpointing)


UNET = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": dict(image_size=8, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[4, 2, 1],
                       num_res_blocks=1, channel_mult=[1, 2, 2], num_head_channels=16, context_dim=32)}


def test_the_estimate_counts_what_autograd_keeps(small_world: SmallWorld) -> None:
    """Against the real network: what its graph keeps beside the weights."""
    module = make_module(small_world)
    unet = module.model.model.diffusion_model
    weights = {value.untyped_storage().data_ptr() for value in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = unet(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 77, 32, requires_grad=True))
    assert out.requires_grad
    expected = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert saved_bytes(module, 2, False) == pytest.approx(expected, rel=0.02)
    assert saved_bytes(module, 4, False) == pytest.approx(2 * expected, rel=0.05)
    assert saved_bytes(module, 2, True) < 0.7 * expected


def test_a_run_that_does_not_fit_is_refused_with_what_to_try(small_world: SmallWorld, tmp_path: Path, capsys,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_world.train_config(tmp_path, "trainer.memory_gb=0.5", "method.batch_size=2")
    with monkeypatch.context() as patch, pytest.raises(
            UserError, match="needs about 0.8 GB.*memory_gb is 0.5; try trainer.precision=bf16-mixed, then "
                             "method.batch_size=1 method.accumulate=2, then trainer.checkpointing"):
        patch.setattr("ldm.training.setup.choose_device", lambda name: torch.device("cuda"))
        fine_tune(config)
    assert not list(tmp_path.iterdir())
    module = make_module(small_world)
    config = small_world.train_config(tmp_path, "trainer.memory_gb=2")
    check_memory(config, module.model, module.trained_tensors(), 32)
    assert "memory: about 0.8 GB: weights 0.0, gradients" in capsys.readouterr().out


def test_a_gpus_memory_is_no_matter_without_one(small_world: SmallWorld, tmp_path: Path, capsys) -> None:
    fine_tune(small_world.train_config(tmp_path, "trainer.memory_gb=0.5", "method.steps=1"))
    assert "GB are there" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(12, "Cannot allocate memory")])
@pytest.mark.parametrize("place", ["ldm.customization.finetune.ConceptFinetune.training_step",
                                   "ldm.training.setup.build_model"])
def test_running_out_of_memory_ends_in_a_sentence(small_world: SmallWorld, tmp_path: Path, monkeypatch, place: str,
                                                  error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(place, fails)
    with pytest.raises(UserError, match="memory ran out; try trainer.precision=bf16-mixed, then"):
        fine_tune(small_world.train_config(tmp_path))


def test_other_errors_are_not_taken_for_it(small_world: SmallWorld, tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(ConceptFinetune, "training_step", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fine_tune(small_world.train_config(tmp_path))


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_presets_take_the_releases_steps_in_their_memory(path: Path) -> None:
    """Sizes are SD v1's; the network's weights and the text encoder's in bf16, K/V in float32."""
    config = merge(TrainConfig, [ROOT / "configs/model/sd-v1.yaml", ROOT / "configs/method/ico.yaml", path])
    trainer, method = config.trainer, config.method
    assert method.batch_size * method.accumulate == 3 and path.stem == f"{trainer.memory_gb:g}gb"
    assert trainer.precision in MIXED and trainer.cache
    assert advice(config.method, config.trainer).startswith("try ")


def test_presets_are_the_known_ones() -> None:
    assert [path.stem for path in TRAINERS] == ["12gb", "24gb", "8gb"] and GB == 1e9
