"""Tests of the judge: labels in order, what prompts ask for, when a wish is granted, files, the training targets."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

from ldm.checkpoint import load_state, read_metadata
from ldm.evaluation.judge import (
    HEADS,
    AttributeClassifier,
    Judge,
    RequestedAttributes,
    load_judge,
    read_request,
    save_judge,
    score_request,
)
from ldm.saving import save_safetensors
from ldm.util import UserError

LABELS = {"noun": ("cat", "fish"), "scene": ("snow", "beach", "night"), "style": ("photo", "oil painting"),
          "colour": ("red", "green", "blue")}
PHRASES = {"scene": {"snow": ["in the snow", "on the snow"], "beach": ["on the beach"], "night": ["at night"]},
           "style": {"oil painting": ["oil painting"]}, "colour": {name: [name] for name in LABELS["colour"]}}


class MeanColor(nn.Module):
    """Logits that rank labels by how much of the first, second, ... channel an image has."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.labels = LABELS

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        channels = x.mean(dim=(2, 3))
        return {head: channels[:, :len(names)] for head, names in LABELS.items()}

    read, ranked = AttributeClassifier.read, AttributeClassifier.ranked


def plain(*colors: str) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), color) for color in colors]


def test_labels_come_in_the_order_of_the_logits() -> None:
    ranked = MeanColor().ranked(plain("#ff8000", "#0080ff"), batch=1)
    assert ranked[0] == {"noun": ["cat", "fish"], "scene": ["snow", "beach", "night"],
                         "style": ["photo", "oil painting"], "colour": ["red", "green", "blue"]}
    assert ranked[1]["noun"] == ["fish", "cat"] and ranked[1]["colour"] == ["blue", "green", "red"]


def test_a_image_and_its_mirror_image_are_read_alike() -> None:
    torch.manual_seed(0)
    judge, x = AttributeClassifier(LABELS).eval(), torch.randn(2, 3, 64, 64)
    found, mirrored, seen = judge.read(x), judge.read(x.flip(3)), (judge(x), judge(x.flip(3)))
    for head in HEADS:
        assert torch.allclose(found[head], (seen[0][head] + seen[1][head]) / 2)
        assert torch.allclose(found[head], mirrored[head]) and not torch.allclose(*(one[head] for one in seen))


@pytest.mark.parametrize(("prompt", "scene", "style", "color"), [
    ("a photo of a {} in the snow", {"snow"}, (), ()),
    ("An OIL painting of a red and  blue cat, on the beach.", {"beach"}, {"oil painting"}, {"red", "blue"}),
    ("a cat in the snowy predawn", (), (), ()),                   # neither "in the snow" nor "red"
    ("a cat", (), (), ())])
def test_what_a_prompt_asks_for(prompt: str, scene, style, color) -> None:
    assert read_request(prompt, PHRASES) == RequestedAttributes(frozenset(scene), frozenset(style), frozenset(color))


def test_wishes_granted() -> None:
    ranked = {"noun": ["cat"], "scene": ["snow", "beach"], "style": ["photo", "oil painting"],
              "colour": ["red", "blue", "green"]}
    assert score_request(RequestedAttributes(), ranked) == {}
    requested = RequestedAttributes(scene=frozenset({"snow"}), style=frozenset({"oil painting"}))
    assert score_request(requested, ranked) == {"scene": 1, "style": 0}
    for colors, right in (({"red"}, 1), ({"blue"}, 0), ({"red", "blue"}, 1), ({"red", "green"}, 0)):
        assert score_request(RequestedAttributes(colour=frozenset(colors)), ranked) == {"colour": right}


def test_rows_of_a_judge() -> None:
    judge = Judge(MeanColor(), PHRASES, {"noun": 0.9}, 10)
    rows = judge.rows(plain("#ff8000", "#0080ff", "#ff8000"),
                      ["a red cat in the snow", "a red cat at night", "a cat"], "cat")
    assert [row["judge_edit"] for row in rows] == [1.0, 0.5, None]
    assert [row["judge_noun"] for row in rows] == [1.0, 0.0, 1.0]
    assert (rows[1]["judge_scene"], rows[1]["judge_colour"], rows[1]["judge_style"]) == (1.0, 0.0, None)
    assert [rows[1][f"saw_{head}"] for head in HEADS] == ["fish", "night", "oil painting", "blue"]
    assert judge.rows(plain("red"), ["a teapot"], "teapot")[0]["judge_noun"] is None      # no such label


def test_a_judge_on_disk_judges_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = AttributeClassifier(LABELS, widths=(8, 16), depths=(1, 1)).half().float()
    judge = Judge(classifier, PHRASES, {"noun": 0.96}, 500)
    with pytest.raises(UserError, match="does not fit"):
        load_judge(save_judge(judge, tmp_path / "odd.safetensors"))       # another architecture than ships
    torch.manual_seed(0)
    judge = Judge(AttributeClassifier(LABELS).half().float(), PHRASES, {"noun": 0.96}, 500)
    loaded = load_judge(save_judge(judge, tmp_path / "judge.safetensors"))
    images = plain("red", "navy", "white")
    assert loaded.classifier.ranked(images) == judge.classifier.ranked(images)
    assert (loaded.phrases, loaded.accuracy, loaded.held_out) == (PHRASES, {"noun": 0.96}, 500)
    assert loaded.classifier.labels == LABELS


def test_a_judge_ships_small() -> None:
    names = {"noun": range(48), "scene": range(16), "style": range(7), "colour": range(10)}
    judge = AttributeClassifier({head: [str(index) for index in labels] for head, labels in names.items()})
    assert 2 * sum(parameter.numel() for parameter in judge.parameters()) < 3e6


@pytest.mark.parametrize("content", [b"", b"no judge at all"])
def test_other_files_are_no_judges(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "judge.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="judge"):
        load_judge(tmp_path / "judge.safetensors")


@pytest.mark.parametrize("change", [
    {"labels": "{}"}, {"labels": '{"noun": 7}'}, {"phrases": "[]"}, {"accuracy": '{"noun": 7}'}, {"held_out": "-1"},
    {"labels": json.dumps({head: ["\x1b[2J"] for head in LABELS})}, {"phrases": "[" * 100_000}],
    ids=lambda change: str(change)[:30])
def test_a_judge_with_damaged_metadata_is_a_sentence(tmp_path: Path, change: dict[str, str]) -> None:
    path = save_judge(Judge(AttributeClassifier(LABELS), PHRASES, {"noun": 0.96}, 500), tmp_path / "judge.safetensors")
    save_safetensors(path, load_state(path), read_metadata(path) | change)
    with pytest.raises(UserError, match="judge '.*' is damaged"):
        load_judge(path)


def test_a_judge_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = save_judge(Judge(AttributeClassifier(LABELS), PHRASES, {"noun": 0.96}, 500), tmp_path / "judge.safetensors")
    state = load_state(path)
    state["norm.weight"].fill_(float("nan"))
    save_safetensors(path, state, read_metadata(path))
    with pytest.raises(UserError, match="not finite, in norm.weight"):
        load_judge(path)


# How it is trained.

@pytest.fixture(scope="module")
def stage() -> ModuleType:
    pytest.importorskip("cv2")
    folder = ROOT / "scripts" / "pretrain"
    sys.path.insert(0, str(folder))                # stages import each other, as scripts do
    try:
        spec = importlib.util.spec_from_file_location("stage_judge", folder / "judge.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        for name in ("common", "world", "muon"):
            sys.modules.pop(name, None)
    return module


def test_targets_count_what_can_be_seen(stage: ModuleType) -> None:
    """Colors where they cover the thing, in styles that have colors; of two nouns side by side either."""
    def truth(colors: list[str], pattern: str | None, style: str = "photo", second: str | None = None) -> dict:
        return {"noun": "fish", "scene": "beach", "style": style, "colours": colors, "pattern": pattern,
                "second": second}

    found = stage.targets([truth(["blue"], None), truth(["red", "blue"], "striped"), truth(["red"], "striped"),
                           truth([], None), truth(["blue"], None, "pencil sketch"), truth([], None, second="cat"),
                           truth([], None, second="top hat")],
                          {**LABELS, "style": ("photo", "pencil sketch")})
    assert found["noun"].tolist() == [[1, 1]] * 5 + [[1, 0], [1, 1]] and found["scene"].tolist() == [1] * 7
    assert found["colour"].tolist() == [[2, 2], [0, 2]] + [[-1, -1]] * 5


def test_shared_loss_by_hand(stage: ModuleType) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    answers = torch.tensor([[0, 0], [0, 1], [-1, -1]])
    likelihoods = torch.tensor([[0.98, 0.0, 0.0], [0.49, 0.49, 0.0]]) + 0.02 / 3          # smoothed
    expected = -(likelihoods * logits[:2]).sum() / 2
    assert stage.shared_loss(logits, answers).item() == pytest.approx(expected.item())
    assert stage.shared_loss(logits, torch.full((3, 2), -1)).item() == 0


def test_accuracies_by_hand(stage: ModuleType) -> None:
    x = torch.zeros(4, 3, 64, 64)
    x[:, 0], x[:, 2] = 1.0, 0.5                                      # seen: cat, snow, photo, red then blue
    truth = {"noun": torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]]), "scene": torch.tensor([0, 0, 1, 1]),
             "style": torch.tensor([0, 0, 0, 0]), "colour": torch.tensor([[0, 0], [2, 2], [2, 0], [-1, -1]])}
    found = stage.accuracies(MeanColor(), x, truth)
    assert found == pytest.approx({"noun": 0.75, "scene": 0.5, "style": 1.0, "colour": 2 / 3})


def test_phrases_ask_for_painted_styles_only(stage: ModuleType) -> None:
    phrases = stage.phrases()
    assert "photo" not in phrases["style"] and "pencil sketch" in phrases["style"]["pencil sketch"]
    labels = stage.labels(5)
    assert len(labels["noun"]) == 5 and set(phrases["scene"]) == set(labels["scene"])
    wish = read_request("a watercolour painting of a green {} on a table", phrases)
    assert wish == RequestedAttributes(frozenset({"wooden table"}), frozenset({"watercolour"}), frozenset({"green"}))
    evaluation = (ROOT / "configs" / "prompts" / "evaluation.txt").read_text().splitlines()
    assert len(evaluation) == 16
    assert all(read_request(prompt, phrases) != RequestedAttributes() for prompt in evaluation)


def test_weathering_keeps_images_images(stage: ModuleType) -> None:
    x = torch.full((2, 3, 16, 16), 0.25)
    y = stage.weathered(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and abs(y.mean() - 0.25) < 0.01 and y.std() < 0.06
