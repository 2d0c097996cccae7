"""The judge: a classifier of the small world that says which noun, scene, style and color an image shows."""
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

from ldm.checkpoint import load_state, load_weights, read_metadata, refuse_non_finite, save_safetensors
from ldm.data.framing import square, to_tensor
from ldm.records import BadRecord, Count, Line, Record, read_record
from ldm.util import UserError

SIDE = 64                                   # px the judge sees
HEADS = ("noun", "scene", "style", "colour")
EDITS = ("scene", "style", "colour")        # what a prompt can ask for beside the thing itself
FORMAT = "dci-ico-judge-1"


class Block(nn.Module):
    """Depthwise 5x5, then two pointwise layers, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width),
                                    nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Judge(nn.Module):
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
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
                       *(Block(width) for _ in range(depth))]
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
        device, found = next(self.parameters()).device, []
        for first in range(0, len(images), batch):
            x = torch.stack([to_tensor(square(image.convert("RGB"), SIDE))
                             for image in images[first:first + batch]])         # (B, 64, 64, 3)
            orders = {head: logits.argsort(dim=1, descending=True).tolist()
                      for head, logits in self.read(x.permute(0, 3, 1, 2).to(device)).items()}
            found += [{head: [self.labels[head][label] for label in order[row]] for head, order in orders.items()}
                      for row in range(len(x))]
        return found


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for: acceptable scenes and styles, and all colors that must be there; empty where silent."""

    scene: frozenset[str] = frozenset()
    style: frozenset[str] = frozenset()
    colour: frozenset[str] = frozenset()


def read_wish(prompt: str, phrases: Mapping[str, Mapping[str, Sequence[str]]]) -> Wish:
    """Finds in a prompt the phrases by which the world's captions name scenes, styles and colors.

    Args:
        phrases: per kind and label the wordings that ask for it, such as {"scene": {"beach": ["on the beach"]}}.
    """
    text = " ".join(re.findall(r"[\w'-]+", prompt.lower()))

    def says(wordings: Sequence[str]) -> bool:
        return any(re.search(rf"(?<!\w){re.escape(wording)}(?!\w)", text) for wording in wordings)

    return Wish(**{kind: frozenset(label for label, wordings in phrases.get(kind, {}).items() if says(wordings))
                   for kind in EDITS})


def grant(wish: Wish, ranked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Says for each kind the prompt speaks of whether the image shows it: 1.0 or 0.0.

    A scene or style is right where the likeliest label is a wished one. Colors are right where the wished ones, and no
    others, are the likeliest: two colors are asked of a two-coloured thing.
    """
    verdict = {kind: float(ranked[kind][0] in asked)
               for kind, asked in (("scene", wish.scene), ("style", wish.style)) if asked}
    if wish.colour:
        verdict["colour"] = float(set(ranked["colour"][:len(wish.colour)]) == wish.colour)
    return verdict


@dataclass(frozen=True, eq=False)
class Court:
    """A judge and how the prompts' words map to its labels.

    Attributes:
        phrases: as `read_wish` takes them.
        accuracy: share of right answers on held-out renders, per head.
        held_out: how many renders that was measured on.
    """

    judge: Judge
    phrases: Mapping[str, Mapping[str, Sequence[str]]]
    accuracy: Mapping[str, float]
    held_out: int

    def wishes(self, prompt: str) -> bool:
        """Whether a prompt asks for a scene, style or color that the judge knows."""
        return any(vars(read_wish(prompt, self.phrases)).values())

    def rows(self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str) -> list[dict[str, Any]]:
        """Judges images: `judge_edit` is the share of the prompt's scene, style and color that came true (None where
        it asks for none), `judge_noun` whether the class noun is recognized (None for a noun the world lacks)."""
        rows = []
        for ranked, prompt in zip(self.judge.ranked(images), prompts, strict=True):
            verdict = grant(read_wish(prompt, self.phrases), ranked)
            known = class_noun in self.judge.labels["noun"]
            row: dict[str, Any] = {f"judge_{kind}": verdict.get(kind) for kind in EDITS}
            row["judge_edit"] = float(np.mean(list(verdict.values()))) if verdict else None
            row["judge_noun"] = float(ranked["noun"][0] == class_noun) if known else None
            row |= {f"saw_{head}": ranked[head][0] for head in HEADS}
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


def save_court(court: Court, path: Path) -> Path:
    """Writes one safetensors file in fp16 with labels, phrases and accuracy as metadata."""
    return save_safetensors(path, {key: value.half() for key, value in court.judge.state_dict().items()},
                            {"format": FORMAT, "labels": court.judge.labels, "phrases": dict(court.phrases),
                             "accuracy": dict(court.accuracy), "held_out": court.held_out})


def load_court(path: Path) -> Court:
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
    judge = Judge(metadata.labels.model_dump())
    state = load_state(path, "judge")
    refuse_non_finite(state, f"judge '{path}'")
    load_weights(judge, state, path)
    return Court(judge.eval().requires_grad_(False), metadata.phrases, metadata.accuracy, metadata.held_out)
