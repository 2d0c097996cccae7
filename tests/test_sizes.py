"""Tests that sizes beyond all reason are refused by arithmetic: in no time, and before memory is asked for."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import Call, SmallWorld
from omegaconf import OmegaConf

from ldm.base import empty_model
from ldm.checkpoint import load_file
from ldm.config import typed
from ldm.pipeline import Generator
from ldm.training.run import Run
from ldm.util import UserError


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"n_samples": 10 ** 9}, "too many images"), ({"n_iter": 10 ** 9}, "too many images"),
    ({"n_samples": 1000, "n_iter": 99}, "too many images"), ({"height": 102400}, "H is 102400 px"),
    ({"width": 10 ** 18}, "W is 1000000000000000000 px")])
def test_images_without_number_or_measure(small_world: SmallWorld, settings: dict[str, int], sentence: str) -> None:
    generator = Generator(*small_world.build())
    config = small_world.sample_config(*(f"{name}={value}" for name, value in settings.items()))
    with pytest.raises(UserError, match=sentence):
        generator.requests([f"a cat, {number}" for number in range(9)], config)


@pytest.mark.parametrize("change", ["method.batch_size=1000000000", "method.prefix_length=1000000000",
                                    "trainer.devices=1000000000", "method.accumulate=1000000000000"])
def test_training_without_measure(small_world: SmallWorld, tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match="give at most"):
        typed(small_world.train_config(tmp_path, change))


@pytest.mark.parametrize(("part", "name", "value"), [
    ("unet_config", "num_res_blocks", 10 ** 7), ("unet_config", "transformer_depth", 10 ** 7),
    ("unet_config", "channel_mult", [1] * 1000), ("unet_config", "model_channels", 10 ** 12),
    ("unet_config", "model_channels", -1), ("unet_config", "model_channels", 0),
    ("cond_stage_config", "layers", 10 ** 7), ("cond_stage_config", "width", "wide")])
def test_models_without_measure(small_world: SmallWorld, part: str, name: str, value: object) -> None:
    node = copy.deepcopy(OmegaConf.load(small_world.folder / "model.yaml").model)
    node.params[part].params[name] = value
    with pytest.raises(UserError, match="the model cannot be built|normalization in 0 groups"):
        empty_model(node)


def hollow(kind: str) -> object:
    """Returns tensors that claim what they do not hold, or are none of weights."""
    few = torch.ones(2)
    return {"stride": {"x": torch.ones(1).expand(10 ** 13)}, "nested": {"a": [{"b": (few.expand(10 ** 9, 2),)}]},
            "sparse": {"x": torch.eye(3).to_sparse()}, "meta": {"x": torch.empty(10 ** 12, device="meta")},
            "quantised": {"x": torch.quantize_per_tensor(few, 1.0, 0, torch.qint8)}}[kind]


@pytest.mark.parametrize("kind", ["stride", "nested", "sparse", "meta", "quantised"])
def test_tensors_that_are_hollow(tmp_path: Path, kind: str) -> None:
    torch.save(hollow(kind), tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a.ckpt' (is refused|cannot be read)"):
        load_file(tmp_path / "a.ckpt")


def test_views_of_what_is_there_are_whole(tmp_path: Path) -> None:
    held = torch.arange(12.0).reshape(3, 4)
    torch.save({"rows": held.T, "part": held[:, 1], "none": held[:0]}, tmp_path / "a.ckpt")
    assert torch.equal(load_file(tmp_path / "a.ckpt")["rows"], held.T)


def test_sizes_on_a_command_line(call_script: Call, small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    arguments = ["-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--prompt", "{}",
                 "--outdir", tmp_path]
    for option in (["--n_samples", "1000000000"], ["--H", "102400"]):
        outcome = call_script("sample", *arguments, *option)
        assert outcome.status == 1 and "Traceback" not in outcome.err, outcome.err
