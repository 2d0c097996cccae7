"""The small CLIP: the embedded model's text tower and an image tower that shares its space."""
from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, Json
from torch import Tensor, nn

from ldm.checkpoint import load_state, load_weights, read_metadata, refuse_non_finite, weights_hash
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.records import BadRecord, Line, Record, read_record
from ldm.saving import save_safetensors
from ldm.util import UserError

SIDE = 64                                        # px the image tower sees
TEXT_PREFIX = "cond_stage_model.transformer."    # where the embedded model keeps the text tower
FORMAT = "dci-ico-small-clip-1"
PACK = "pack it again with scripts/pretrain/pack.py"


class _TextConfig(Record):
    """Arguments of the FrozenCLIPEmbedder whose tower it is; bounds as of CLIP's largest."""

    version: Literal["openai/clip-vit-large-patch14", "tiny"]
    max_length: Annotated[int, Field(ge=2, le=1024)] = 77
    width: Annotated[int, Field(ge=1, le=4096)] = 768
    layers: Annotated[int, Field(ge=1, le=64)] = 12
    heads: Annotated[int, Field(ge=1, le=64)] = 12


class _ClipMetadata(Record):
    """What a small CLIP's file says of it."""

    text_tower: Line
    text_config: Json[_TextConfig]


class ImageTower(nn.Sequential):
    """Strided convolutions from a 64x64 image to one vector."""

    def __init__(self, dim: int, width: int = 32):
        layers: list[nn.Module] = []
        channels = 3
        for mult in (1, 2, 4, 6):
            layers += [nn.Conv2d(channels, width * mult, 3, stride=2, padding=1), nn.GroupNorm(8, width * mult),
                       nn.SiLU(), nn.Conv2d(width * mult, width * mult, 3, padding=1, groups=mult), nn.SiLU()]
            channels = width * mult
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * 16, dim))


class SmallCLIP(nn.Module):
    """A text tower, an image tower and the two projections into one space (Radford et al. 2021)."""

    def __init__(self, text: FrozenCLIPEmbedder, width: int, dim: int = 128):
        super().__init__()
        self.text = text.transformer.requires_grad_(True)
        self.image = ImageTower(dim)
        self.text_projection = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))     # logit scale e^2, as trained from

    def encode_text(self, ids: Tensor, end: Tensor) -> Tensor:
        """Unit vectors (B, dim) from the states at the end tokens; ids may stop at the batch's longest text."""
        states = self.text(ids).last_hidden_state                                   # (B, T, D)
        return F.normalize(self.text_projection(states[torch.arange(len(ids)), end]), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, dim) of images (B, 3, 64, 64) in [-1, 1]."""
        return F.normalize(self.image(images), dim=-1)


def embedded(name: str) -> Path:
    """Returns where a file of ldm/tiny lies."""
    return Path(str(resources.files("ldm.tiny") / name))


def pack_small_clip(state: Mapping[str, Tensor], text_config: Mapping[str, Any], path: Path) -> Path:
    """Writes what a SmallCLIP has beside its text tower, in fp16; the tower itself ships inside the embedded model.

    Args:
        text_config: arguments of the FrozenCLIPEmbedder whose tower it is.
    """
    # Named by a hash alone: it ships once.
    text, rest = {}, {}
    for key, value in state.items():
        if key.startswith("text."):
            text[key.removeprefix("text.")] = value.half()
        else:
            rest[key] = value.half()
    return save_safetensors(path, rest, {"format": FORMAT, "text_tower": weights_hash(text),
                                         "text_config": dict(text_config)})


def load_small_clip(path: Path, model_path: Path) -> tuple[SmallCLIP, FrozenCLIPEmbedder]:
    """Reads the small CLIP of `path`, its text tower from the embedded model; returns it with its tokenizer's owner.

    Raises:
        UserError: a file is missing or no small CLIP, or the two were not trained together.
    """
    metadata = _read_clip_metadata(path)
    tower, text = {}, {}
    for key, value in load_state(model_path).items():
        if key.startswith(TEXT_PREFIX):
            tower[key.removeprefix(TEXT_PREFIX)] = value
            text[f"text.{key.removeprefix(TEXT_PREFIX)}"] = value
    if weights_hash(tower) != metadata.text_tower:
        raise UserError(f"small CLIP '{path}' was not trained with the text tower of '{model_path}'; pack both again "
                        "with scripts/pretrain/pack.py.")
    config = metadata.text_config
    embedder, rest = FrozenCLIPEmbedder(**config.model_dump()), load_state(path, "small CLIP")
    refuse_non_finite(rest, f"small CLIP '{path}'")     # a NaN would make every alignment one
    model = SmallCLIP(embedder, config.width, _vector_length(path, rest))
    load_weights(model, {**text, **rest}, path)
    return model.eval().requires_grad_(False), embedder


def _read_clip_metadata(path: Path) -> _ClipMetadata:
    """Reads what a small CLIP's file says of it."""
    entries = read_metadata(path, "small CLIP")
    if entries.get("format") != FORMAT:
        raise UserError(f"small CLIP '{path}' is another kind of file; {PACK}.")
    try:
        return read_record(_ClipMetadata, entries)
    except BadRecord as error:
        raise UserError(f"small CLIP '{path}' is damaged ({error}); {PACK}.") from error


def _vector_length(path: Path, state: Mapping[str, Tensor]) -> int:
    """Returns how long its vectors are, by its projection's shape."""
    projection = state.get("text_projection.weight")
    if projection is None or projection.ndim != 2:
        raise UserError(f"small CLIP '{path}' is damaged (it has no projection of texts); {PACK}.")
    return len(projection)


@torch.no_grad()
def text_vectors(model: SmallCLIP, embedder: FrozenCLIPEmbedder, texts: list[str]) -> Tensor:
    """Returns unit vectors (N, dim) of texts."""
    ids = embedder.tokenize(texts)                                                  # (N, 77)
    return model.encode_text(ids, (ids == embedder.tokenizer.eos_token_id).int().argmax(dim=1))
