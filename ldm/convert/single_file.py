"""Rewrites a checkpoint as .safetensors, in full or half precision, without training state and spare averages."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import ACCEPTED_EXTRA, AVERAGE, SCHEDULE_BUFFERS, averages_alone, load_file, unwrapped
from ldm.saving import save_safetensors
from ldm.util import UserError


@dataclass(frozen=True)
class Converted:
    """What was written, and how many entries of the source had no place in it."""

    path: Path
    tensors: int
    left_out: int
    bytes: int


def convert(source: Path, target: Path, half: bool = False) -> Converted:
    """Writes the weights of `source` to `target`; the source is memory-mapped, so that it is in memory once at most.

    Args:
        source: .ckpt or .safetensors with a state dict.
        half: writes weights as float16; the schedule stays float32.

    Raises:
        UserError: the source is no checkpoint, the target exists or has another suffix, or a weight exceeds float16.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"'{target}' must end in .safetensors, which is what is written.")
    if target.exists():
        raise UserError(f"'{target}' exists already; remove it first, or choose another name.")
    state = unwrapped(load_file(source))     # mapped: tensors take memory as they are read
    # Averages are half the file, and sampling never reads them.
    others = ACCEPTED_EXTRA if averages_alone(state) else (*ACCEPTED_EXTRA, AVERAGE)
    kept = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or key.startswith(others):
            continue
        if half and key not in SCHEDULE_BUFFERS:
            value = to_half(key, value)
        kept[key] = value
    if not kept:
        raise UserError(f"checkpoint '{source}' holds no weights.")
    save_safetensors(target, _apart(kept), {"format": "pt"})     # the metadata other tools look for
    return Converted(target, len(kept), len(state) - len(kept), target.stat().st_size)


def to_half(key: str, value: Tensor) -> Tensor:
    """Returns a floating tensor as float16, any other as it is.

    Raises:
        UserError: a value has no float16, so that the image would be lost.
    """
    if not value.is_floating_point() or value.dtype == torch.float16:
        return value
    half = value.half()
    if not bool(half.isfinite().all()):
        raise UserError(f"'{key}' has values that float16 cannot hold; convert without --half.")
    return half


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives entries that share memory in the source a copy of their own, as the format demands."""
    seen: set[int] = set()
    apart = {}
    for key, value in state.items():
        shared = value.numel() > 0 and value.data_ptr() in seen     # empty tensors share an address by chance
        apart[key] = value.clone() if shared else value
        seen.add(value.data_ptr())
    return apart
