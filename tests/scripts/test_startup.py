"""Tests of start-up and conversion: weights mapped from their file, in memory once, and files rewritten."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.cases import START
from benchmarks.contestants import random_state
from conftest import ROOT, SmallWorld, small_model_config
from omegaconf import OmegaConf
from torch import Tensor

from ldm import checkpoint
from ldm.base import build_model
from ldm.checkpoint import SCHEDULE_BUFFERS, load_state
from ldm.convert.single_file import convert
from ldm.saving import save_safetensors
from ldm.util import UserError, instantiate_from_config


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_a_mapped_model_is_the_loaded_one_and_may_change(small_world: SmallWorld, tmp_path: Path, kind: str) -> None:
    state = load_state(small_world.checkpoint)
    path = small_world.checkpoint
    if kind == ".ckpt":
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": state}, path)
    before = path.read_bytes()
    config = small_world.sample_config(f"base.ckpt={path}")
    model, identity = build_model(config.model, config.base)
    loaded = instantiate_from_config(config.model)
    loaded.load_state_dict(state)
    expected = loaded.state_dict()
    assert model.state_dict().keys() == expected.keys() and identity["hash"] == small_world.build()[1]["hash"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]) and value.device.type == "cpu"
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()                                    # the mapping is private: the file stays
    assert path.read_bytes() == before
    assert all(not value.requires_grad for value in model.parameters())


def test_a_half_file_becomes_a_full_model(small_world: SmallWorld, tmp_path: Path) -> None:
    written = convert(small_world.checkpoint, tmp_path / "half.safetensors", half=True)
    config = small_world.sample_config(f"base.ckpt={written.path}")
    model, identity = build_model(config.model, config.base)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert identity["hash"] == small_world.build()[1]["hash"]       # it counts values in half precision
    assert written.bytes < 0.6 * small_world.checkpoint.stat().st_size


def write_large(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Writes random weights of a model of some 23 million, and its configuration beside them."""
    config = small_model_config()
    config.model.params.unet_config.params.update(model_channels=160, num_head_channels=32, context_dim=32)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    state = {**random_state(model), **{name: getattr(model, name) for name in SCHEDULE_BUFFERS}}
    state = {name: value.to(dtype) for name, value in state.items()}
    path = folder / f"model{kind}"
    save_safetensors(path, state) if kind == ".safetensors" else torch.save({"state_dict": state}, path)
    OmegaConf.save(config.model, folder / "model.yaml")
    assert path.stat().st_size > 20e6 * dtype.itemsize
    return path


def start_memory(code: str, folder: Path, path: Path) -> int:
    """Loads a file, read to the last byte, in a process of its own: peak resident bytes beyond the imports'."""
    done = subprocess.run([sys.executable, "-c", code, folder / "model.yaml", path], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])[2]
    if memory is None:
        pytest.skip("this system does not tell")
    return memory


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_loading_needs_the_file_once(tmp_path: Path, kind: str) -> None:
    path = write_large(tmp_path, kind)
    assert 0.8 < start_memory(START, tmp_path, path) / path.stat().st_size < 1.3


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "legacy"])
@pytest.mark.parametrize("stored, dtype", [("float32", "bfloat16"), ("float16", "bfloat16"), ("float16", "float32")])
def test_each_weight_is_cast_once_from_its_file(small_world: SmallWorld, tmp_path: Path, monkeypatch, kind: str,
                                                stored: str, dtype: str) -> None:
    """In several batches, with the values of one cast; text encoder and schedule stay in float32."""
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", 500_000)
    state = {name: value.to(getattr(torch, stored)) for name, value in load_state(small_world.checkpoint).items()}
    path = tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_safetensors(path, state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "ckpt")
    config = small_world.sample_config(f"base.ckpt={path}")
    model, identity = build_model(config.model, config.base, getattr(torch, dtype))
    for name, value in model.state_dict().items():
        if name not in SCHEDULE_BUFFERS:
            format = getattr(torch, "float32" if name.startswith("cond_stage_model.") else dtype)
            assert value.dtype == format and torch.equal(value, state[name].float().to(format)), name
    assert model.betas.dtype == torch.float32 and not any(value.requires_grad for value in model.parameters())
    assert identity["network"] == small_world.build()[1]["network"]


@pytest.mark.parametrize("kind, stored, dtype, most", [(".safetensors", "float32", "bfloat16", 1.2),
                                                       (".ckpt", "float16", "bfloat16", 1.4),
                                                       (".ckpt", "float16", "float32", 2.4)])
def test_casting_needs_little_beside_the_result(tmp_path: Path, kind: str, stored: str, dtype: str,
                                                most: float) -> None:
    """Peak resident memory in copies of the file; file and result together would be 1.5, 2 and 3."""
    path = write_large(tmp_path, kind, getattr(torch, stored))
    small = "import ldm.checkpoint\nldm.checkpoint.BATCH_BYTES = 2**22\n"
    code = small + START.replace("[2]))", f"[2]), torch.{dtype})")
    assert f"torch.{dtype}" in code
    memory = start_memory(code, tmp_path, path)
    assert memory < most * path.stat().st_size


# Conversion.

def test_conversion_drops_averages_and_training_state(small_world: SmallWorld, tmp_path: Path) -> None:
    state = load_state(small_world.checkpoint)
    extras = {"model_ema.decay": torch.tensor(0.9), "model_ema.diffusion_modelout2weight": torch.ones(4)}
    torch.save({"state_dict": state | extras, "optimizer_states": [1, 2]}, tmp_path / "full.ckpt")
    written = convert(tmp_path / "full.ckpt", tmp_path / "plain.safetensors")
    assert (written.tensors, written.left_out) == (len(state), 2)
    found = load_state(written.path)
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


def test_conversion_keeps_averages_where_there_is_nothing_else(small_world: SmallWorld, tmp_path: Path) -> None:
    state = load_state(small_world.checkpoint)
    names = {name: "model_ema." + name[len("model."):].replace(".", "") for name in state if name.startswith("model.")}
    averages = {names.get(name, name): value for name, value in state.items()}
    torch.save({"state_dict": {**averages, "state_dict": {}, "model_ema.decay": torch.ones(())}}, tmp_path / "ema.ckpt")
    written = convert(tmp_path / "ema.ckpt", tmp_path / "ema.safetensors")
    assert (written.tensors, written.left_out) == (len(state), 2)
    config = small_world.sample_config(f"base.ckpt={written.path}")
    assert build_model(config.model, config.base)[1]["hash"] == small_world.build()[1]["hash"]
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="holds no weights"):
        convert(tmp_path / "none.ckpt", tmp_path / "none.safetensors")


def test_half_conversion_keeps_the_schedule_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {"a": torch.tensor([0.1, 6e4]), "betas": torch.tensor([0.1]), "n": torch.tensor(7)}
    torch.save(weights, tmp_path / "a.ckpt")
    found = load_state(convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors", half=True).path)
    assert {name: value.dtype for name, value in found.items()} == {
        "a": torch.float16, "betas": torch.float32, "n": torch.int64}
    torch.save({"big": torch.tensor([1.0, 7e4])}, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="'big' has values that float16 cannot hold"):
        convert(tmp_path / "b.ckpt", tmp_path / "b.safetensors", half=True)
    assert not (tmp_path / "b.safetensors").exists()


def test_entries_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    torch.save({"a": one, "b": one}, tmp_path / "tied.ckpt")
    found = load_state(convert(tmp_path / "tied.ckpt", tmp_path / "tied.safetensors").path)
    assert torch.equal(found["a"], one) and torch.equal(found["b"], one)


def test_the_script_converts_and_refuses(small_world: SmallWorld, tmp_path: Path, call_script) -> None:
    target = tmp_path / "small.safetensors"
    done = call_script("convert", small_world.checkpoint, "--half", "-o", target)
    assert done.status == 0 and f"{target}: " in done.out and target.exists()
    assert "exists already" in call_script("convert", small_world.checkpoint, "-o", target).error
    assert "does not exist" in call_script("convert", tmp_path / "none.ckpt").error
    assert "must end in .safetensors" in call_script("convert", target, "-o", tmp_path / "x.ckpt").error
    assert "unrecognized arguments" in call_script("convert", target, "--quarter").error
