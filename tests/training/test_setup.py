"""Tests of a run's preparation: it says what will be trained, refuses what cannot work, and writes nothing."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SmallWorld, contents

from ldm.config import TrainConfig, typed
from ldm.training.setup import prepare
from ldm.util import UserError


def test_preparing_writes_nothing(small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(small_world.folder)
    monkeypatch.chdir(tmp_path)
    setup = prepare(small_world.train_config(tmp_path / "logs"))
    assert not list(tmp_path.iterdir()) and contents(small_world.folder) == before
    assert setup.counts == [2] and setup.references.images.shape == (2, 32, 32, 3) and setup.resumed is None
    assert setup.references.captions == setup.module.captions and setup.framing.size == 32
    assert setup.device == torch.device("cpu") and setup.module.effective_learning_rate == 1e-3
    assert setup.identity.class_pictures is None and setup.identity.photos.text.startswith("2 (")


@pytest.mark.parametrize(("change", "message"), [
    ("concepts.0.images=nowhere", "image folder 'nowhere' does not exist"), ("base.ckpt=none.ckpt", "does not exist"),
    ("data.background=nocolor", "color 'nocolor' is unknown"), ("trainer.image_size=33", "trainer.image_size is 33 px"),
    ("method.train=all", "method.train 'all' is unknown"), ("trainer.precision=8-bit", "trainer.precision '8-bit'")])
def test_what_cannot_work_is_refused_before_anything_is_written(small_world: SmallWorld, tmp_path: Path, change: str,
                                                                message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(small_world.train_config(tmp_path / "logs", change))
    assert not (tmp_path / "logs").exists()


def test_a_configuration_becomes_objects_that_checked_themselves(small_world: SmallWorld, tmp_path: Path) -> None:
    config = typed(small_world.train_config(tmp_path))
    assert type(config) is TrainConfig and config.method.steps == 2 and config.model.target.endswith("LatentDiffusion")
    assert typed(config) is config
    with pytest.raises(UserError, match="method.batch_size is 0; give a finite number, at least 1"):
        typed(small_world.train_config(tmp_path, "method.batch_size=0"))
