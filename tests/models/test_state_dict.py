"""Tests that the full Stable Diffusion v1 model has exactly the released file's keys and shapes."""
from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import ACCEPTED_EXTRA, SCHEDULE_BUFFERS
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
OURS, COMPVIS = ROOT / "configs/model/sd-v1.yaml", ROOT / "tests/fixtures/v1-inference.yaml"


def released() -> dict[str, tuple[tuple[int, ...], torch.dtype, str]]:
    """Reads what a released v1 file holds: key → (shape, dtype, group)."""
    with gzip.open(ROOT / "tests/fixtures/sd_v1_state_dict.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.split("\t") for line in file.read().splitlines()[1:]]
    return {key: (tuple(json.loads(shape)), getattr(torch, dtype), group) for key, shape, dtype, group in rows}


def build(path: Path) -> LatentDiffusion:
    """Builds the full model without memory for its weights."""
    with torch.device("meta"):
        return instantiate_from_config(OmegaConf.load(path).model)


@pytest.fixture(scope="module", params=[OURS, COMPVIS], ids=["sd-v1.yaml", "CompVis's yaml"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return build(request.param)


def test_the_stored_list_is_the_released_one():
    groups = Counter(group for _, _, group in released().values())
    assert groups == {"unet": 686, "vae": 248, "text": 196 + 1, "schedule": 12, "ema_meta": 2}
    assert {key for key, row in released().items() if row[2] == "schedule"} == set(SCHEDULE_BUFFERS)


def test_keys_shapes_and_dtypes_are_the_released_ones(model):
    """1130 weights and 12 buffers, and nothing else; a file's three other entries have no place in the model."""
    expected = {key: row[:2] for key, row in released().items() if key not in ACCEPTED_EXTRA}
    found = {key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}
    assert found == expected
    assert len(found) == 686 + 248 + 196 + 12


def test_weights_are_parameters_and_the_schedule_is_buffers(model):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert len(parameters) == 1130 and set(buffers) == set(SCHEDULE_BUFFERS)
    assert all(parameter.is_meta for parameter in parameters.values())


def test_only_the_unet_trains(model):
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 686 and all(name.startswith("model.diffusion_model.") for name in trained)
    assert not model.first_stage_model.training


def test_an_average_has_the_released_key_names():
    """With use_ema, a full-EMA file's model_ema.* entries: the U-Net's names with their dots taken out."""
    config = OmegaConf.load(COMPVIS).model
    config.params.use_ema = True
    with torch.device("meta"):
        keys = {key for key in instantiate_from_config(config).state_dict() if key.startswith("model_ema.")}
    unet = [key.removeprefix("model.").replace(".", "") for key, row in released().items() if row[2] == "unet"]
    assert keys == {"model_ema." + name for name in [*unet, "decay", "num_updates"]}


def test_our_configuration_differs_from_the_released_one_only_in_batch_keys():
    ours, theirs = (OmegaConf.to_container(OmegaConf.load(path)) for path in (OURS, COMPVIS))
    assert theirs["model"].pop("base_learning_rate") == 1e-4
    theirs["model"]["params"] |= {"first_stage_key": "image", "cond_stage_key": "caption"}
    assert ours == theirs
