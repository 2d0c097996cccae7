"""Tests of reading and writing weights: no code runs, every refusal is a sentence, what was there survives."""
from __future__ import annotations

import ast
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint import (
    SCHEDULE_BUFFERS,
    describe_mismatch,
    load_file,
    load_state,
    load_weights,
    read_metadata,
    weights_hash,
)
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.saving import save_safetensors
from ldm.util import UserError, instantiate_from_config

ROOT = Path(__file__).parents[1]
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0]),
           "half": torch.tensor([0.1, 0.2], dtype=torch.float16), "count": torch.tensor(7)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Says whether two state dicts have the same names, types and values."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)


def refusal(path: Path) -> str:
    """Returns the one sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_file(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


# --- what is accepted ---------------------------------------------------------------------------------------------

@pytest.fixture
def lightning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zipped pickle laid out as the released SD v1 files are, made without the class it names."""
    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = CALLBACK, "ModelCheckpoint"
    module = types.ModuleType(CALLBACK)
    module.ModelCheckpoint = ModelCheckpoint
    content = {"epoch": 1, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "state_dict": TENSORS,
               "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.25), "monitor": "val/loss",
                                               "current_score": np.float32(0.5), "kth_value": torch.tensor(0.5)}},
               "lr_schedulers": [{"last_epoch": np.int64(470000), "base_lrs": [1e-4]}]}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, CALLBACK, module)
        torch.save(content, tmp_path / "sd-v1-4.ckpt")
    return tmp_path / "sd-v1-4.ckpt"


def test_a_lightning_file_loads_with_its_classes_left_inert(lightning_file):
    content = load_file(lightning_file)
    ((callback, state),) = content["callbacks"].items()
    assert callback.__name__ == "ModelCheckpoint" and not hasattr(callback, "on_train_end")
    assert state["best_model_score"] == 0.25 and state["current_score"] == np.float32(0.5)
    assert content["lr_schedulers"][0]["last_epoch"] == 470000
    assert same(load_state(lightning_file), TENSORS)


def test_torch_refuses_again_after_a_restricted_load(lightning_file):
    """What is allowed for one load is not allowed for the process, whether the load succeeds or fails."""
    before = list(torch.serialization.get_safe_globals())
    load_file(lightning_file)
    (lightning_file.parent / "bad.ckpt").write_bytes(lightning_file.read_bytes()[:-400])
    refusal(lightning_file.parent / "bad.ckpt")
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint|scalar"):
        torch.load(lightning_file, weights_only=True)


def write_zip(path: Path, content: object = TENSORS) -> None:
    torch.save(content, path)


def write_legacy(path: Path, content: object = TENSORS) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path, content: dict[str, Tensor] = TENSORS) -> None:
    save_file(content, path)


WRITERS = {"zip": write_zip, "legacy": write_legacy, "safetensors": write_safetensors}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors", ""])
@pytest.mark.parametrize("kind", WRITERS)
def test_content_decides_and_not_the_name(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITERS[kind](path)
    assert same(load_state(path), TENSORS)


# --- what is refused ----------------------------------------------------------------------------------------------

class Payload:
    """Pickles to a call."""

    def __init__(self, function: object, *args: object):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_bare(protocol: int):
    return lambda path, content: path.write_bytes(pickle.dumps(content, protocol))


HOSTILE = {"zip": write_zip, "legacy": write_legacy, "pickle 0": write_bare(0), "pickle 2": write_bare(2),
           "pickle 4": write_bare(4)}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("writer", HOSTILE)
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, writer, suffix):
    proof, path = tmp_path / "proof", tmp_path / f"model{suffix}"
    hostile = Payload(os.system, f"echo done > '{proof}'")
    pickle.loads(pickle.dumps(hostile))
    assert proof.exists()                                    # so does it work where it is let
    proof.unlink()
    HOSTILE[writer](path, {"state_dict": TENSORS if writer in WRITERS else {}, "callbacks": hostile})
    assert f"{os.system.__module__}.system" in refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("writer", ["zip", "legacy"])
@pytest.mark.parametrize("hostile, name", [
    (Payload(eval, "1 + 1"), "eval"), (Payload(getattr, "text", "upper"), "getattr"),
    (Payload(np.frombuffer, b"12345678"), "frombuffer"), (Path("somewhere"), "Path")],
    ids=["eval", "getattr", "numpy function", "path"])
def test_other_names_are_refused_too(tmp_path, writer, hostile, name):
    HOSTILE[writer](tmp_path / "model.ckpt", {"state_dict": {}, "extra": hostile})
    message = refusal(tmp_path / "model.ckpt")
    assert "is refused" in message and name in message


@pytest.mark.parametrize("kept", ["one byte", "eight bytes", "a half", "all but one byte"])
@pytest.mark.parametrize("kind", WRITERS)
def test_truncated_files_are_said_to_be_damaged(tmp_path, kind, kept):
    """And not to hold code: the advice is to copy the file again."""
    path = tmp_path / "cut.ckpt"
    WRITERS[kind](path)
    data = path.read_bytes()
    path.write_bytes(data[:{"one byte": 1, "eight bytes": 8, "a half": len(data) // 2}.get(kept, len(data) - 1)])
    assert "copy or download it again" in refusal(path)


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize("content", [
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n",
    b"<!DOCTYPE html><html><body>404: not found</body></html>",
    b"Read me: these are the weights.\n" * 20,
    struct.pack("<Q", 2**62) + HEADER + bytes(4),
    struct.pack("<Q", 2**64 - 1) + HEADER + bytes(4),
    struct.pack("<Q", len(HEADER)) + HEADER,
    struct.pack("<Q", 9) + b'{"a":oops' + bytes(4),
], ids=["lfs pointer", "html", "text", "header longer than the file", "header of 2^64 bytes", "no data", "no json"])
def test_other_files_are_said_to_be_no_checkpoint(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "copy or download it again" in refusal(path)


def test_missing_empty_and_tableless_files_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere.ckpt")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.ckpt").touch()
    assert "is empty" in refusal(tmp_path / "empty.ckpt")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    assert "holds a list" in refusal(tmp_path / "list.ckpt")


@pytest.mark.parametrize("content", [{"state_dict": {"a": 1}}, {"a": "text"}, {"state_dict": [1]}])
def test_a_file_without_tensors_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_state(tmp_path / "odd.ckpt")


def calls(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Lists the calls in a source file: the name called and its keywords, as text."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg})
            for node in nodes]


def test_no_other_door_reads_pickles_and_no_other_load_is_lenient():
    for path in [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        assert "weights_only=False" not in path.read_text(encoding="utf-8").replace(" ", ""), name
        for function, words in calls(path):
            assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), name
            assert words.get("allow_pickle", "False") == "False", name
            if function == "torch.load":
                assert name == "ldm/checkpoint.py" and words["weights_only"] == "True", name
            if function.endswith(".load_state_dict"):
                assert name == "ldm/checkpoint.py" or words.get("strict", "True") == "True", name


# --- what fits a model --------------------------------------------------------------------------------------------

def test_mismatches_are_reported_in_words():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    state = dict(model.state_dict()) | {"c.weight": torch.ones(1), "a.weight": torch.ones(5, 3)}
    del state["b.bias"]
    words = describe_mismatch(model, state)
    assert words == ("1 missing (b.bias); 1 unexpected (c.weight); "
                     "1 of another shape (a.weight (5, 3) instead of (2, 3))")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"'file.ckpt' does not fit this architecture: 1 missing \(b.bias\)"):
        load_weights(model, state, "file.ckpt")
    assert same(dict(model.state_dict()), before)                      # refused before anything is written
    assert describe_mismatch(model, model.state_dict()) == ""
    other = dict(model.state_dict()) | {"a.weight": torch.ones(2, 3).cfloat(), "a.bias": torch.ones(2).long()}
    assert describe_mismatch(model, other) == \
        "2 not of floating-point numbers (a.weight of torch.complex64, a.bias of torch.int64)"
    assert "4 missing (a.weight, a.bias, b.weight and 1 more)" in describe_mismatch(model, {})


@pytest.fixture
def model(small_world) -> LatentDiffusion:
    """A small model with weights of its own, unlike the file's."""
    torch.manual_seed(99)
    return instantiate_from_config(OmegaConf.load(small_world.folder / "model.yaml").model)


def released_extras() -> dict[str, Tensor]:
    """The fifteen entries of a released file that are no weights, with values that would be noticed."""
    buffers = {name: torch.full((1000,), 0.123) for name in SCHEDULE_BUFFERS}
    return {POSITIONS: torch.arange(77)[None], "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32), **buffers}


@pytest.mark.parametrize("lightning", [True, False], ids=["lightning", "bare"])
def test_a_released_file_loads_and_the_schedule_stays_the_models_own(small_world, model, tmp_path, lightning):
    stored = load_state(small_world.checkpoint)
    weights = {key: value for key, value in stored.items() if key not in SCHEDULE_BUFFERS}
    extras, schedule = released_extras(), {name: getattr(model, name).clone() for name in SCHEDULE_BUFFERS}
    assert len(extras) == 15
    state = weights | extras
    torch.save({"state_dict": state, "global_step": 1} if lightning else state, tmp_path / "released.ckpt")
    load_weights(model, load_state(tmp_path / "released.ckpt"), "released.ckpt")
    assert same(dict(model.state_dict()), weights | schedule)


@pytest.mark.parametrize("left_out", [POSITIONS, "model_ema.decay", *SCHEDULE_BUFFERS])
def test_no_extra_entry_is_needed(left_out):
    model = nn.Linear(2, 2)
    for name in SCHEDULE_BUFFERS:
        model.register_buffer(name, torch.zeros(1000))
    state = dict(nn.Linear(2, 2).state_dict()) | released_extras()
    del state[left_out]
    load_weights(model, state, "file.ckpt")
    assert torch.equal(model.weight, state["weight"]) and not model.betas.any()


def average_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `model_ema.*` entries of a full-EMA file: half of every U-Net weight."""
    return {"model_ema." + key.removeprefix("model.").replace(".", ""): value / 2
            for key, value in state.items() if key.startswith("model.")}


def test_a_full_ema_file_is_loaded_without_its_average(small_world, model):
    state = load_state(small_world.checkpoint)
    load_weights(model, state | average_of(state) | released_extras(), "full-ema.ckpt")
    assert torch.equal(model.state_dict()["model.diffusion_model.out.2.weight"],
                       state["model.diffusion_model.out.2.weight"])


def test_a_model_that_keeps_an_average_takes_the_files(small_world):
    config = OmegaConf.load(small_world.folder / "model.yaml").model
    config.params.use_ema = True
    model, state = instantiate_from_config(config), load_state(small_world.checkpoint)
    load_weights(model, state | average_of(state) | released_extras(), "full-ema.ckpt")
    weight = state["model.diffusion_model.out.2.weight"]
    assert torch.equal(model.model.diffusion_model.out[2].weight, weight)
    with model.ema_scope():
        assert torch.equal(model.model.diffusion_model.out[2].weight, weight / 2)
    assert torch.equal(model.model.diffusion_model.out[2].weight, weight)
    assert int(model.model_ema.num_updates) == 470000


def test_a_checkpoint_named_in_the_configuration_is_loaded(small_world):
    config = OmegaConf.load(small_world.folder / "model.yaml").model
    config.params.ckpt_path = str(small_world.checkpoint)
    assert same(dict(instantiate_from_config(config).state_dict()), load_state(small_world.checkpoint))


# --- writing ------------------------------------------------------------------------------------------------------

def test_save_and_read_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    path = save_safetensors(tmp_path / "new" / "delta.safetensors", {"rows": base.T, "part": base[:, 1]},
                            {"kind": "text", "steps": 3, "words": ["<new1>"]})
    assert same(load_state(path), {"rows": base.T, "part": base[:, 1]})
    assert read_metadata(path) == {"kind": "text", "steps": "3", "words": '["<new1>"]'}
    assert list(path.parent.iterdir()) == [path]


def test_equal_content_is_equal_bytes(tmp_path):
    """The library writes metadata in an order that changes from one save to the next."""
    metadata = {"format": "a", "Größe": "ö\n\x01\"\\ ☃", "concepts": [1], "base": {"b": 2}, "step": 3, "info": {}}
    files = [save_safetensors(tmp_path / f"{number}.safetensors", TENSORS, metadata) for number in range(8)]
    assert len({path.read_bytes() for path in files}) == 1
    assert read_metadata(files[0])["Größe"] == "ö\n\x01\"\\ ☃" and same(load_state(files[0]), TENSORS)


# --- the name of a set of weights ---------------------------------------------------------------------------------

def test_the_hash_names_the_weights_and_not_the_file(tmp_path):
    for kind, write in WRITERS.items():
        write(tmp_path / kind, dict(reversed(TENSORS.items())))
    assert {weights_hash(load_state(tmp_path / kind)) for kind in WRITERS} == {weights_hash(TENSORS)}
    assert weights_hash(TENSORS | {"a.weight": TENSORS["a.weight"].T.contiguous().T}) == weights_hash(TENSORS)


@pytest.mark.parametrize("change", [
    {"a.bias": torch.tensor([1.5, -2.0000002])}, {"a.weight": TENSORS["a.weight"].reshape(3, 2)},
    {"count": torch.tensor(7, dtype=torch.int32)}, {"half": TENSORS["half"].bfloat16()}, {"new": torch.ones(1)},
], ids=["one value by one bit", "a shape", "a type", "another 16-bit type", "a name more"])
def test_the_hash_differs_for_other_weights(change):
    assert weights_hash(TENSORS | change) != weights_hash(TENSORS)


def test_the_hash_differs_for_other_names():
    renamed = {key.replace("a.", "b."): value for key, value in TENSORS.items()}      # in the same order
    assert weights_hash(renamed) != weights_hash(TENSORS)
