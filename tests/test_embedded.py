"""Tests of what the embedded model is said to know: its card against the world it was drawn from, and the warnings."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from ldm.embedded import NAME, unknown_words, vocabulary, warn_of_photos, warn_of_words
from ldm.evaluation.judge import load_judge
from ldm.evaluation.small_clip import embedded

EMBEDDED, OTHER = {"name": NAME, "hash": "0"}, {"name": "sd-v1-4", "hash": "1"}


def words(phrases: object) -> set[str]:
    return set(re.findall("[a-z]+", " ".join(phrases)))


def test_the_card_lists_what_the_judge_was_taught() -> None:
    judge, known = load_judge(embedded("judge.safetensors")), vocabulary()
    assert known["Things"] == judge.classifier.labels["noun"] and known["Colours"] == judge.classifier.labels["colour"]
    for kind, entry in (("scene", "Scenes"), ("style", "Styles")):
        asked = {wording for wordings in judge.phrases[kind].values() for wording in wordings}
        assert words(asked) <= words(known[entry])


def test_the_card_lists_the_words_of_the_world() -> None:
    pytest.importorskip("cv2")
    from small_world.world import COLOURS, NOUNS, SCENES, STYLES, all_caption_words
    known, nouns = vocabulary(), list(NOUNS)
    assert list(known["Things"]) == nouns[:40] and list(known["Colours"]) == list(COLOURS)
    assert list(known["Scenes"]) == [phrase for scene in SCENES.values() for phrase in scene.phrases]
    assert set(known["Styles"]) == {prefix for style in STYLES.values() for prefix in style.prefixes} - {""}
    left_out = words(nouns[40:]) - words(nouns[:40])
    assert words(phrase for phrases in known.values() for phrase in phrases) == set(all_caption_words()) - left_out


@pytest.mark.parametrize(("text", "expected"), [
    ("a <new1> <new2> backpack on a pizza in outer space, cinematic lighting", ["pizza", "cinematic", "lighting"]),
    ("A Striped Red and Blue CAT next to a teddy bear", []), ("a café, a cafe\u0301; 2 cats!", ["café", "cats"]),
    ("an oil painting of a {} under the night sky", []), ("", [])])
def test_words_that_were_never_seen(text: str, expected: list[str]) -> None:
    assert unknown_words([text]) == expected


def test_all_prompts_that_ship_are_known() -> None:
    for path in [*(ROOT / "configs" / "prompts").glob("*.txt"), ROOT / "configs" / "captions" / "tiny.txt"]:
        assert unknown_words(path.read_text("utf-8").splitlines()) == []


def test_only_the_embedded_model_is_warned_about(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for side in (64, 128, 129):
        Image.new("RGB", (side, 2 * side)).save(tmp_path / f"{side}.png")
    warn_of_words(OTHER, ["a pizza"])
    warn_of_photos(OTHER, [tmp_path / "129.png"], 64)
    warn_of_words(EMBEDDED, ["a cat in the snow"])
    warn_of_photos(EMBEDDED, [tmp_path / "64.png", tmp_path / "128.png"], 64)
    assert capsys.readouterr().out == ""
    warn_of_words(EMBEDDED, ["a pizza", "a cat", "a pizza in rain, cinematic"])
    warn_of_photos(EMBEDDED, [tmp_path / "64.png", tmp_path / "129.png"], 64)
    first, second = capsys.readouterr().out.splitlines()
    assert "never saw the words pizza, cinematic and" in first and "ldm/tiny/README.md" in first
    assert "will not learn these photos" in second and "--ckpt FILE" in second
