"""Tests that weights are found under other names, and that other kinds of file are told by a sentence."""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Call, SmallWorld
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from ldm.base import build_model
from ldm.checkpoint import load_state
from ldm.config import BaseConfig
from ldm.convert.diffusers import vae_state
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config

TEXT, UNET, VAE = "cond_stage_model.transformer.", "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def state(small_world: SmallWorld) -> dict[str, Tensor]:
    return load_state(small_world.checkpoint)


def build(small_world: SmallWorld, path: Path, **base: object) -> LatentDiffusion:
    return build_model(small_world.sample_config().model, BaseConfig(ckpt=str(path), **base))[0]


def same_weights(model: LatentDiffusion, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return all(torch.equal(found[name], state[name]) and found[name].dtype == torch.float32 for name in found)


def later_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(f"{TEXT}text_model.", TEXT): value for name, value in state.items()}


def averages_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model_ema." + name.removeprefix("model.").replace(".", "") if name.startswith(UNET) else name: value
            for name, value in state.items()}


@pytest.mark.parametrize("renamed", [later_names, averages_alone, lambda state: {"state_dict": {}, **state},
                                     lambda state: {"state_dict": {**state, "state_dict": {}}},
                                     lambda state: {"state_dict": {"state_dict": state}}],
                         ids=["text names", "average alone", "empty table", "empty table inside", "table in a table"])
def test_weights_are_found_under_other_names(small_world, state, tmp_path, renamed) -> None:
    torch.save(renamed(state), tmp_path / "model.ckpt")
    assert same_weights(build(small_world, tmp_path / "model.ckpt"), state)


def test_what_has_no_place_is_left_out_and_named(small_world, state, tmp_path, capsys) -> None:
    extras = {"cond_stage_model.logit_scale": torch.ones(()), "logvar": torch.ones(1000),
              "embedding_manager.string_to_param_dict.*": torch.ones(1, 32), "embedding_manager.x": torch.ones(1),
              "model_ema.diffusion_modelout2bias": torch.ones(4)}
    torch.save({"state_dict": {**state, **extras, "epoch": 3}}, tmp_path / "model.ckpt")
    assert same_weights(build(small_world, tmp_path / "model.ckpt"), state)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("place in the model: epoch, cond_stage_model.logit_scale, embedding_manager.*, logvar, "
                         "model_ema.*")
    build(small_world, small_world.checkpoint)
    assert capsys.readouterr().out == ""                    # the schedule is no stranger
    config = small_world.sample_config().model
    config = OmegaConf.merge(config, {"params": {"ckpt_path": str(tmp_path / "model.ckpt")}})
    assert same_weights(instantiate_from_config(config), state)      # CompVis's own way


@pytest.mark.parametrize("change, message", [
    ({UNET + "out.2.bias": None}, r"1 missing \(model.diffusion_model.out.2.bias\)"),
    ({UNET + "out.2.bias": torch.ones(5)}, r"1 of another shape"),
    ({UNET + "output_blocks.99.0.bias": torch.ones(5)}, r"1 unexpected"),      # a larger network than the model's
    ({f"{TEXT}encoder.layers.7.mlp.fc1.bias": torch.ones(5)}, r"1 unexpected")])
def test_what_protects_the_image_is_still_demanded(small_world, state, tmp_path, change, message) -> None:
    changed = {name: value for name, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=f"does not fit this architecture: {message}"):
        build(small_world, tmp_path / "model.ckpt")


# --- other kinds of file ------------------------------------------------------------------------------------------

def released(change: dict[str, tuple[int, ...]], rename: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Names and shapes of a released v1 file, every tensor one expanded zero, with some shapes changed."""
    with gzip.open(ROOT / "tests/fixtures/sd_v1_state_dict.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.split("\t")[:2] for line in file.read().splitlines()[1:]]
    shapes = {name: tuple(json.loads(shape)) for name, shape in rows} | change
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    for old, new in (rename or {}).items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


FIRST, KEYS = UNET + "input_blocks.0.0.weight", UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
ONE = torch.ones(1)
KINDS = [
    (released({KEYS: (320, 1024)}), "a Stable Diffusion 2 checkpoint (text width 1024)"),
    (released({}, {TEXT: "cond_stage_model.model."}), "a Stable Diffusion 2 checkpoint (text width 1024)"),
    (released({FIRST: (320, 9, 3, 3)}), "an inpainting model (9 input channels)"),
    (released({}, {TEXT: "conditioner.embedders.0.transformer."}), "a Stable Diffusion XL checkpoint"),
    (released({}), "a Stable Diffusion v1 checkpoint; the model configured is another one; add configs/model/sd-v1"),
    ({UNET + "joint_blocks.0.x": ONE}, "a Stable Diffusion 3 checkpoint"), ({"double_blocks.0.x": ONE}, "a FLUX"),
    ({"down_blocks.0.resnets.0.conv1.weight": ONE, "conv_in.weight": ONE}, "the U-Net alone of a diffusers folder"),
    ({"text_model.embeddings.position_embedding.weight": ONE}, "the text encoder alone of a diffusers folder"),
    ({"decoder.up.0.block.0.conv1.bias": ONE}, "an autoencoder (VAE) alone; give it with --vae"),
    ({"encoder.down_blocks.0.resnets.0.conv1.bias": ONE}, "an autoencoder (VAE) alone; give it with --vae"),
    ({"lora_unet_mid_block_x.lora_up.weight": ONE}, "a LoRA file"),
    ({"unet.mid_block.x.to_k.lora_A.weight": ONE}, "a LoRA file"), ({"<cat>": ONE}, "a textual-inversion embedding"),
    ({"string_to_param": {"*": ONE}, "name": "cat"}, "a textual-inversion embedding"),
    ({"control_model.x": ONE}, "a ControlNet"), ({"words.<new1>": ONE}, "a concept file; give it with --delta_ckpt"),
    ({"state_dict": {KEYS: ONE, "embed": ONE}}, "a concept file; give it with --delta_ckpt"),
    ({"unet": {"x": ONE}, "modifier_token": {"<new1>": ONE}}, "a Custom Diffusion delta in diffusers' layout")]


@pytest.mark.parametrize("content, kind", KINDS, ids=[kind[:40] for _, kind in KINDS])
def test_other_kinds_of_file_are_told_by_what_they_are(small_world, tmp_path, content, kind) -> None:
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(UserError) as caught:
        build(small_world, tmp_path / "file.ckpt")
    message = str(caught.value)
    assert message.startswith(f"'{tmp_path / 'file.ckpt'}' is {kind}") and message.endswith(".") and len(message) < 300
    assert "missing" not in message


def test_folders_and_names_are_told_by_what_they_are(small_world, tmp_path, call_script: Call) -> None:
    folder = tmp_path / "stable-diffusion-v1-5"
    (folder / "unet").mkdir(parents=True)
    for given, words in ((folder, "is a folder; give the path of a file"),
                         ("CompVis/stable-diffusion-v1-4", "looks like the name of a model on a hub"),
                         ("stabilityai/stable-diffusion-2.1-base", "looks like the name of a model on a hub"),
                         ("weights/sd-v1-4.ckpt", "does not exist; give the path of the file"),
                         (tmp_path / "sd-v1-4", "does not exist; give the path of the file")):
        outcome = call_script("sample", "-b", *small_world.sampling_files, "--ckpt", given, "--prompt", "a cat")
        assert f"checkpoint '{given}' " in outcome.error and words in outcome.error
    (folder / "model_index.json").write_text("{}")
    for flag in ("--ckpt", "--delta_ckpt", "--vae"):
        error = call_script("sample", "-b", *small_world.sampling_files, flag, folder, "--prompt", "a cat").error
        assert "is a folder in diffusers' layout; give the single file" in error


# --- another autoencoder ------------------------------------------------------------------------------------------

def vae_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix(VAE): value / 2 for name, value in state.items() if name.startswith(VAE)}


def older_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = vae_state(vae_of(state, ""), 3)
    for new, old in names.items():
        renamed = {name.replace(new, old): value for name, value in renamed.items()}
    return renamed


@pytest.mark.parametrize("content", [
    lambda state: {"state_dict": {**vae_of(state, ""), "loss.logvar": ONE}}, lambda state: vae_of(state, VAE),
    lambda state: {**state, **vae_of(state, VAE)}, lambda state: vae_state(vae_of(state, ""), 3), older_diffusers],
    ids=["CompVis's", "with its prefix", "a whole checkpoint", "diffusers'", "older diffusers'"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_separate_autoencoder_takes_the_checkpoints_place(small_world, state, tmp_path, capsys, content, stored):
    content = content({name: value.to(stored) for name, value in state.items()})
    torch.save(content, tmp_path / "vae.ckpt")
    model = build(small_world, small_world.checkpoint, vae=str(tmp_path / "vae.ckpt"))
    for name, value in model.state_dict().items():
        expected = (state[name].to(stored) / 2).float() if name.startswith(VAE) else state[name]
        assert torch.equal(value, expected), name
    assert ("loss.*" in capsys.readouterr().out) == ("state_dict" in content)


def test_an_autoencoder_that_is_none_is_refused(small_world, state, tmp_path) -> None:
    short = {name: value for name, value in vae_of(state, "").items() if name != "quant_conv.bias"}
    for content, message in ((short, r"is an autoencoder \(VAE\) alone; it has 1 missing \(quant_conv.bias\)"),
                             ({"lora_unet_x": ONE}, "is a LoRA file"), ({"x": ONE}, "is none that fits")):
        save_file(content, tmp_path / "vae.safetensors")
        with pytest.raises(UserError, match=message):
            build(small_world, small_world.checkpoint, vae=str(tmp_path / "vae.safetensors"))


def test_flags_choose_autoencoder_and_base(small_world, small_run, state, tmp_path, call_script: Call) -> None:
    """Another decoder makes another image of the same base; another U-Net is refused, and drawn with on request."""
    save_file(vae_of(state, ""), tmp_path / "vae.safetensors")
    torch.save({name: value * 1.1 + 0.01 if name.startswith(UNET) else value for name, value in state.items()},
               tmp_path / "tuned.ckpt")

    def draw(name: str, *flags: object):
        return call_script("sample", "-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--prompt",
                           "{}", "--use_dci", "false", "--outdir", tmp_path / name, *flags)

    def image(name: str) -> bytes:
        (path,) = (tmp_path / name / "samples").glob("*.png")
        return path.read_bytes()

    assert draw("plain").status == 0 and draw("vae", "--vae", tmp_path / "vae.safetensors").status == 0
    assert image("plain") != image("vae")
    assert "--any_base" in draw("other", "--ckpt", tmp_path / "tuned.ckpt").error
    with pytest.warns(UserWarning, match="it is used all the same"):
        assert draw("other", "--ckpt", tmp_path / "tuned.ckpt", "--any_base").status == 0
    assert image("other") != image("plain")
    many = call_script("sample", "-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--print_config",
                       "--class_noun", "cat", "dog", "steps=7")
    assert many.status == 0 and "steps: 7" in many.out       # an override after several nouns is none of them
