"""Writes tensors as .safetensors files: whole or not at all, equal content as equal bytes."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm.files import write_atomically


def save_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor],
                     metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes tensors and metadata (values that are not text become JSON) atomically; equal content as equal bytes."""
    text = {}
    for key, value in (metadata or {}).items():
        text[key] = value if isinstance(value, str) else json.dumps(value)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def write(part: Path) -> None:
        save_file(contiguous, part, metadata=text or None)
        _sort_metadata(part)

    return write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Puts a safetensors file's metadata in order of names: its library writes them in any order, another each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))        # which its library has just written
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # The same length: sorting adds nothing.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of '{path}' has {len(text)} bytes instead of {size}")
        file.seek(8)
        file.write(text.ljust(size))
