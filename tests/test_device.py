"""Tests that what is cast, laid out, decoded in parts or compiled gives what the plain computation gives."""
from __future__ import annotations

import pytest
import torch
from conftest import ROOT, SmallWorld
from omegaconf import OmegaConf
from torch import Tensor

from ldm import device as device_module
from ldm.base import build_model
from ldm.config import BaseConfig
from ldm.customization.delta import load_concept
from ldm.device import (
    PRECISIONS,
    available_memory,
    compile_network,
    decode_at_once,
    decode_latents,
    set_format,
    supported_precision,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import Generator
from ldm.requests import ImageRequest
from ldm.training.run import Run
from ldm.util import UserError


@pytest.fixture(scope="module")
def model(small_world: SmallWorld) -> LatentDiffusion:
    """The small world's, in float64: its random weights enlarge float32's rounding a thousandfold in a run."""
    return small_world.build()[0].double()


@pytest.fixture
def embedded() -> LatentDiffusion:
    """The embedded model: trained, so that rounding stays small."""
    return build_model(OmegaConf.load(ROOT / "configs" / "model" / "tiny.yaml").model, BaseConfig())[0]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_prompts_are_encoded_once_and_by_themselves(small_world: SmallWorld, small_run: Run) -> None:
    generator = Generator(*small_world.build())
    texts: list[list[str]] = []
    generator.model.cond_stage_model.register_forward_pre_hook(lambda module, args: texts.append(list(args[0])))
    settings = small_world.sample_config("n_samples=3", "dci.agg_lambda=[0.5,1.0]")
    generator.load(load_concept(small_run.concept))
    list(generator.generate(["a {}"], settings))
    assert texts == [[""], ["a <new1> <new2> cat"], ["a dog"]]
    generator.load(None)                                     # without the concept its words mean nothing
    list(generator.generate(["a dog"], settings))
    assert texts[3:] == [[""], ["a dog"]]


# Formats.

@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_formats_agree_and_stay(embedded: LatentDiffusion, layout) -> None:
    model, text = embedded, embedded.get_learned_conditioning(["a cat", "a red ball"])
    x, t, image = drawn(2, 4, 16, 16, seed=3), torch.tensor([10, 900]), drawn(1, 3, 64, 64, seed=5)
    expected = [model.apply_model(x, t, text), model.decode_first_stage(x), model.encode_first_stage(image).mean]
    for part in (model.model, model.first_stage_model):
        part.to(memory_format=layout)
    made: list[Tensor] = []
    model.model.diffusion_model.output_blocks[-1].register_forward_hook(lambda *args: made.append(args[-1]))
    found = [model.apply_model(x.to(memory_format=layout), t, text), model.decode_first_stage(x),
             model.encode_first_stage(image).mean]
    assert all(relative(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))
    assert made[0].is_contiguous(memory_format=layout)


def test_each_part_has_the_memory_format_that_suits_it(embedded: LatentDiffusion) -> None:
    """The faster one by docs/benchmarks.md: on a CPU in float32 the U-Net stays as it is."""
    def formats() -> list[bool]:
        weights = (embedded.model.diffusion_model.input_blocks[1][0].in_layers[2].weight,
                   embedded.first_stage_model.decoder.conv_in.weight)
        return [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]

    set_format(embedded)
    assert formats() == [False, True]
    set_format(embedded, torch.bfloat16)
    assert formats() == [True, True]


@torch.no_grad()
def test_half_precision_is_near_and_comes_out_in_float32(embedded: LatentDiffusion) -> None:
    """bf16 has 8 bits: one part in 256, which the layers add up to a few hundredths of the values' spread."""
    model, text = embedded, embedded.get_learned_conditioning(["a cat", "a red ball"])
    x, t = drawn(2, 4, 16, 16, seed=3), torch.tensor([500])
    expected = [model.apply_model(x, t, text), model.decode_first_stage(x)]
    set_format(model, torch.bfloat16)
    assert model.model.diffusion_model.dtype == model.first_stage_model.format == torch.bfloat16
    found = [model.apply_model(x, t, text), model.decode_first_stage(x)]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and 1e-4 < (one - other).std() / other.std() < 0.05


@pytest.mark.parametrize(("name", "there", "message"), [
    ("half", True, "precision 'half' is unknown; use one of full, bf16, fp16, autocast"),
    ("fp16", True, "fp16 has no use on a CPU"), ("bf16", False, "no bf16 arithmetic; computing in full precision")])
def test_precision_that_cannot_be(monkeypatch, name: str, there: bool, message: str) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    if there:
        with pytest.raises(UserError, match=message):
            supported_precision(name, torch.device("cpu"))
    else:
        with pytest.warns(UserWarning, match=message):
            assert supported_precision(name, torch.device("cpu")) == "full"


def test_formats_and_memory_of_apples_gpus(monkeypatch) -> None:
    """As far as it can be said without one."""
    apple = torch.device("mps")
    for new in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor, new=new: new)
        monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind, new=new: new)
        if new:
            assert [supported_precision(name, apple) for name in PRECISIONS] == list(PRECISIONS)
            continue
        with pytest.warns(UserWarning, match="needs macOS 14; computing in fp16"):
            assert supported_precision("bf16", apple) == "fp16"
        with pytest.warns(UserWarning, match="no autocast on 'mps'; computing in full"):
            assert supported_precision("autocast", apple) == "full"
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    assert available_memory(apple) == 70


def test_weights_in_half_do_not_draw_in_full(small_world: SmallWorld, monkeypatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    generator = Generator(*small_world.build(), precision="bf16")
    row = ImageRequest("a cat", 5, None)
    assert generator.latents([row], small_world.sample_config("precision=bf16")).isfinite().all()
    with pytest.raises(UserError, match="these weights are in bf16 and cannot draw in precision full"):
        generator.latents([row], small_world.sample_config())


# Decoding.

def test_decoding_in_parts_changes_nothing(model: LatentDiffusion) -> None:
    latents = drawn(3, 4, 8, 8, seed=6)
    image = 8 * 8 * 32 * 32 * 8                    # copies of 8 channels of 32 x 32 float64
    sizes = [decode_at_once(model, latents, memory) for memory in (None, 1, 4 * image, 100 * image)]
    assert sizes == [3, 1, 2, 3]
    whole = decode_latents(model, latents, memory=100 * image)
    assert relative(decode_latents(model, latents, memory=1), whole) < 1e-5
    assert torch.equal(whole, model.decode_first_stage(latents))


def test_a_decoder_that_overflows_is_asked_again_in_float32(small_world: SmallWorld, monkeypatch) -> None:
    model, latents = small_world.build()[0], drawn(1, 4, 8, 8, seed=6)
    set_format(model, torch.bfloat16)
    original, formats = model.decode_first_stage, []

    def overflows(z: Tensor) -> Tensor:
        formats.append(model.first_stage_model.format)
        return original(z) / (formats[-1] == torch.float32)      # as an overflow would end

    monkeypatch.setattr(model, "decode_first_stage", overflows)
    assert decode_latents(model, latents).isfinite().all() and formats == [torch.bfloat16, torch.float32]
    assert decode_latents(model, latents).isfinite().all() and formats[2:] == [torch.float32]     # it stays so
    monkeypatch.setattr(model, "decode_first_stage", lambda z: z / 0)
    with pytest.raises(UserError, match="decoder produced values that are not finite"):
        decode_latents(model, latents)
    with pytest.raises(UserError, match="network produced values that are not finite"):
        decode_latents(model, latents / 0)


# Compilation.

@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run on this Python")
def test_two_graphs_for_all_strengths_steps_and_prompts(small_world: SmallWorld, small_run: Run) -> None:
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, plain = CompileCounter(), Generator(*small_world.build())
    compiled = Generator(*small_world.build())
    compile_network(compiled.model, backend=counter)
    drawn: dict[ImageRequest, Tensor] = {}
    for generator in (plain, compiled):
        generator.load(load_concept(small_run.concept))
        for strength, steps, prompt in ((0.5, 4, "a {}"), (-1.0, 6, "a {} in the snow"), (2.0, 4, "{} on the beach")):
            row = ImageRequest(prompt, 5, strength)
            latents = generator.latents([row], small_world.sample_config(f"steps={steps}"))
            if generator is plain:
                drawn[row] = latents
            else:
                assert relative(latents, drawn[row]) < 1e-4      # the small world's, see `model`
                assert counter.frame_count == 2                  # with DBIM and without, from the first run on
    assert len(compiled.masks(ImageRequest("a {}", 5, 0.5), small_world.sample_config())[1]) == 20
    assert counter.frame_count == 2
    assert {key for key in compiled.model.state_dict()} == {key for key in plain.model.state_dict()}


def test_compiling_without_a_compiler_is_refused(model: LatentDiffusion, monkeypatch) -> None:
    monkeypatch.setattr(device_module.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        compile_network(model)
