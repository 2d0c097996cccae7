"""The judge: a small classifier of the small world that says which noun, scene, style and color an image shows."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, Json
from torch import Tensor, nn

from ldm.checkpoint import load_state, load_weights, read_metadata, refuse_non_finite
from ldm.data.framing import square, to_tensor
from ldm.records import BadRecord, Count, Line, Record, read_record
from ldm.saving import save_safetensors
from ldm.util import UserError

SIDE = 64                                   # px the classifier sees
HEADS = ("noun", "scene", "style", "colour")     # as files of judges spell them
EDITS = ("scene", "style", "colour")        # what a prompt can ask for beside the thing itself
FORMAT = "dci-ico-judge-1"     # of the file that ships in ldm/tiny


class Block(nn.Module):
    """Depthwise 5x5, then two pointwise layers, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width),
                                    nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class AttributeClassifier(nn.Module):
    """A small convolutional network with one linear head per kind of label.

    Args:
        labels: the label names of each head; their order is the order of the logits.
        widths, depths: channels and blocks of the levels, each at half the resolution of the one before.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]], widths: Sequence[int] = (32, 64, 128, 192),
                 depths: Sequence[int] = (1, 1, 2, 2)):
        super().__init__()
        self.labels = {head: tuple(names) for head, names in labels.items()}
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(widths, depths, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [Block(width) for _ in range(depth)]
            channels = width
        self.body = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(2 * channels)
        self.heads = nn.ModuleDict({head: nn.Linear(2 * channels, len(names)) for head, names in self.labels.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns logits (B, labels) per head of images (B, 3, 64, 64) in [-1, 1]."""
        h = self.body(x)                                                            # (B, C, 4, 4)
        # A small object is lost in the mean, a texture in the maximum.
        h = self.norm(torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1))   # (B, 2C)
        return {head: layer(h) for head, layer in self.heads.items()}

    @torch.no_grad()
    def read(self, x: Tensor) -> dict[str, Tensor]:
        """Returns logits like `forward`, the mean over each image and its mirror image, which is a little surer."""
        seen, mirrored = self(x), self(x.flip(3))
        return {head: (seen[head] + mirrored[head]) / 2 for head in seen}

    @torch.no_grad()
    def ranked(self, images: Sequence[Image.Image], batch: int = 64) -> list[dict[str, list[str]]]:
        """Returns, per image and head, the labels from the likeliest to the least likely."""
        device = next(self.parameters()).device
        found: list[dict[str, list[str]]] = [{} for _ in images]
        for first in range(0, len(images), batch):
            squares = [to_tensor(square(image.convert("RGB"), SIDE)) for image in images[first:first + batch]]
            x = torch.stack(squares).permute(0, 3, 1, 2).to(device)             # (B, 3, 64, 64)
            for head, logits in self.read(x).items():
                names = self.labels[head]
                for row, order in enumerate(logits.argsort(dim=1, descending=True).tolist()):
                    found[first + row][head] = [names[label] for label in order]
        return found


@dataclass(frozen=True)
class RequestedAttributes:
    """What a prompt asks for: acceptable scenes and styles, and all colors that must be there; empty where silent."""

    scene: frozenset[str] = frozenset()
    style: frozenset[str] = frozenset()
    colour: frozenset[str] = frozenset()


def read_request(prompt: str, phrases: Mapping[str, Mapping[str, Sequence[str]]]) -> RequestedAttributes:
    """Finds in a prompt the phrases by which the world's captions name scenes, styles and colors.

    Args:
        phrases: per kind and label the wordings that ask for it, such as {"scene": {"beach": ["on the beach"]}}.
    """
    text = " ".join(re.findall(r"[\w'-]+", prompt.lower()))
    requested: dict[str, frozenset[str]] = {}
    for kind in EDITS:
        labels = set()
        for label, wordings in phrases.get(kind, {}).items():
            for wording in wordings:
                if re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", text):      # whole words: "red" is not in "predawn"
                    labels.add(label)
        requested[kind] = frozenset(labels)
    return RequestedAttributes(**requested)


def score_request(requested: RequestedAttributes, ranked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Scores each kind the prompt speaks of: 1.0 where the image shows what was requested, 0.0 where not.

    A scene or style is right where the likeliest label is a requested one. Colors are right where the requested ones,
    and no others, are the likeliest: two colors are asked of a two-coloured thing.
    """
    scores = {}
    if requested.scene:
        scores["scene"] = float(ranked["scene"][0] in requested.scene)
    if requested.style:
        scores["style"] = float(ranked["style"][0] in requested.style)
    if requested.colour:
        likeliest = set(ranked["colour"][:len(requested.colour)])
        scores["colour"] = float(likeliest == requested.colour)
    return scores


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier, and how the prompts' words map to its labels.

    Attributes:
        classifier: says what an image shows.
        phrases: as `read_request` takes them.
        accuracy: share of right answers on held-out renders, per head.
        held_out: how many renders that was measured on.
    """

    classifier: AttributeClassifier
    phrases: Mapping[str, Mapping[str, Sequence[str]]]
    accuracy: Mapping[str, float]
    held_out: int

    def wishes(self, prompt: str) -> bool:
        """Whether a prompt asks for a scene, style or color that the judge knows."""
        return any(vars(read_request(prompt, self.phrases)).values())

    def rows(self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str) -> list[dict[str, Any]]:
        """Judges images: `judge_edit` is the share of the prompt's scene, style and color that came true (None where
        it asks for none), `judge_noun` whether the class noun is recognized (None for a noun the world lacks)."""
        rows = []
        for ranked, prompt in zip(self.classifier.ranked(images), prompts, strict=True):
            scores = score_request(read_request(prompt, self.phrases), ranked)
            # A noun the world lacks cannot be right or wrong.
            known = class_noun in self.classifier.labels["noun"]
            row: dict[str, Any] = {}
            for kind in EDITS:
                row[f"judge_{kind}"] = scores.get(kind)
            row["judge_edit"] = float(np.mean(list(scores.values()))) if scores else None
            row["judge_noun"] = float(ranked["noun"][0] == class_noun) if known else None
            for head in HEADS:
                row[f"saw_{head}"] = ranked[head][0]
            rows.append(row)
        return rows


class _Labels(Record):
    """Label names of each head."""

    noun: tuple[Line, ...]
    scene: tuple[Line, ...]
    style: tuple[Line, ...]
    colour: tuple[Line, ...]


class _JudgeMetadata(Record):
    """What a judge's file says of it."""

    labels: Json[_Labels]
    phrases: Json[dict[Line, dict[Line, list[Line]]]]
    accuracy: Json[dict[Line, Annotated[float, Field(ge=0, le=1)]]]
    held_out: Json[Count]


def save_judge(judge: Judge, path: Path) -> Path:
    """Writes one safetensors file in fp16 with labels, phrases and accuracy as metadata."""
    # 2.5 MB; the answers stay the same.
    weights = {key: value.half() for key, value in judge.classifier.state_dict().items()}
    return save_safetensors(path, weights,
                            {"format": FORMAT, "labels": judge.classifier.labels, "phrases": dict(judge.phrases),
                             "accuracy": dict(judge.accuracy), "held_out": judge.held_out})


def load_judge(path: Path) -> Judge:
    """Reads a judge.

    Raises:
        UserError: the file is missing, damaged or no judge.
    """
    entries = read_metadata(path, "judge")
    if entries.get("format") != FORMAT:
        raise UserError(f"judge '{path}' is another kind of file; train one with scripts/pretrain/judge.py.")
    try:
        metadata = read_record(_JudgeMetadata, entries)
    except BadRecord as error:
        raise UserError(f"judge '{path}' is damaged ({error}); train one with scripts/pretrain/judge.py.") from error
    classifier = AttributeClassifier(metadata.labels.model_dump())
    state = load_state(path, "judge")
    refuse_non_finite(state, f"judge '{path}'")
    load_weights(classifier, state, path)
    return Judge(classifier.eval().requires_grad_(False), metadata.phrases, metadata.accuracy, metadata.held_out)
