"""Tests of the sheet that shows what contexts and words hold."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SmallWorld
from experiments import contexts
from experiments.contexts import BOTH, CONTEXTS, WORDS, main, prompts_of
from PIL import Image

from ldm.customization.delta import load_concept
from ldm.customization.ico import PromptScheme
from ldm.pipeline import Generator
from ldm.training.run import Run
from ldm.util import UserError


def test_the_parts_of_a_fine_tuning_prompt() -> None:
    """P_2 = [I]_2,1 V noun [I]_2,2, without V, and without the contexts."""
    assert prompts_of(PromptScheme(("<new1>", "<new2>"), "teddy bear", 1, 1), 2) == {
        CONTEXTS: "<ctx-0-2-0> teddy bear <ctx-0-2-1>", WORDS: "<new1> <new2> teddy bear",
        BOTH: "<ctx-0-2-0> <new1> <new2> teddy bear <ctx-0-2-1>"}


def test_a_row_for_each_reference_and_what_was_counted(small_world: SmallWorld, small_run: Run, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """With the small model in the embedded one's place; the wall is in every image that has V, says the judge."""
    asked = []

    def small(config: object) -> Generator:
        return Generator(*small_world.build())

    def scenes(images: list[Image.Image]) -> list[str]:
        asked.append(len(images))
        return ["wall"] * len(images)

    monkeypatch.setattr(contexts, "load_generator", small)
    monkeypatch.setattr(contexts, "scenes_seen", scenes)
    monkeypatch.setattr(contexts, "CONFIG", str(small_world.folder / "sampling.yaml"))
    main(["--delta_ckpt", str(small_run.concept), "--seeds", "2", "--out", str(tmp_path / "sheet.png")])
    assert asked == [2, 2, 2, 2, 2, 2, 2]          # the two references, then of each three parts of two seeds
    assert f"{CONTEXTS}: 4 of 4; {WORDS}: 4 of 4; {BOTH}: 4 of 4" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.width == 4 * (160 + 8) + 8


def test_a_concept_without_contexts_or_references_is_refused(small_run: Run, tmp_path: Path) -> None:
    concept, alone = load_concept(small_run.concept), tmp_path / "alone.safetensors"
    concept.save(alone)
    with pytest.raises(UserError, match="no reference images beside"):
        main(["--delta_ckpt", str(alone)])
    replace(concept, contexts={}).save(alone, torch.float32)
    with pytest.raises(UserError, match="holds no contexts"):
        main(["--delta_ckpt", str(alone)])
