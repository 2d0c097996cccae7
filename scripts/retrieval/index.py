"""A clip-retrieval index of your own images, built from a folder or a list of addresses."""
from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ldm.data.captions import captioned
from ldm.data.folder_lock import LOCK, turn_in
from ldm.data.images import Unusable, decode
from ldm.files import write_atomically, write_text
from ldm.text import read_lines
from ldm.util import UserError
from retrieval.client import MISSING, SETUP
from retrieval.clip import BATCH, Clip, check_clip, load_clip, quiet
from retrieval.download import Downloader
from retrieval.image_store import ImageStore

DESCRIPTION = "index.json"      # written last: a folder without it is unfinished
BEGUN = ".index-begun"          # written first: a folder with it holds nothing but an index
IMAGES = "pictures"


@dataclass(frozen=True)
class Built:
    """A finished index: its folder, how many images it finds, why others were left out."""

    folder: Path
    images: int
    skipped: list[str]


def build_index(source: str | Path, folder: Path, clip: str, downloader: Downloader | None = None,
                say: Callable[[str], None] = print) -> Built:
    """Builds a clip-retrieval index that `IndexServer` serves; stopped at any moment, it continues where it was.

    Args:
        source: any layout `ldm.data.captions.captioned` reads, or a text file of web addresses, one per line, each
            with a caption after a tab if there is one.
        folder: absent, empty or begun by an earlier run; gets images/ (copies, small enough to serve), metadata/,
            image.index and index.json.
        clip: a CLIP, as `retrieval.clip.check_clip` takes it.

    Raises:
        UserError: there is no image, the CLIP cannot be loaded, the folder holds something else, the disk refuses.
    """
    folder, clip = Path(folder), check_clip(clip)
    _refuse_foreign(folder)
    loaded = load_clip(clip, "cuda" if torch.cuda.is_available() else "cpu")    # a wrong name should cost no time
    with turn_in(folder, say):
        _begin(folder)
        rows, skipped = _collect(source, folder / IMAGES, downloader, say)
        if not rows:
            why = "; ".join(skipped[:3]) or "it is empty"
            raise UserError(f"'{source}' gives no usable image ({why}); name a folder of images or a list of web "
                            "addresses.")
        say(f"embedding {len(rows)} images with {clip.partition('/')[0]}")
        _write_metadata(folder, rows)
        _write_faiss(folder, _embed(loaded, [folder / IMAGES / name for name in rows]))
        write_text(folder / DESCRIPTION,
                   json.dumps({"name": folder.name, "clip": clip, "pictures": len(rows)}, indent=1) + "\n")
    return Built(folder, len(rows), skipped)


def _refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds anything but an index that was begun."""
    try:
        there = [entry for entry in os.listdir(folder) if entry != LOCK]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"'{folder}' cannot be used as a folder ({error.strerror}); choose another --out.") from error
    if DESCRIPTION in there:
        raise UserError(f"'{folder}' holds an index already; serve it, or choose another --out.")
    if there and BEGUN not in there:
        raise UserError(f"'{folder}' holds '{there[0]}', which is of no index; choose another --out.")


def _begin(folder: Path) -> None:
    """Marks the folder as an index's, unless another run has done so, or has finished it, meanwhile."""
    _refuse_foreign(folder)
    if not (folder / BEGUN).exists():
        write_text(folder / BEGUN, "Everything in this folder was made by scripts/retrieve.py index.\n")


def _collect(source: str | Path, images: Path, downloader: Downloader | None,
             say: Callable[[str], None]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Copies every usable image; returns {file name: (caption, url)} and what was left out, in words."""
    store = ImageStore(images, images.with_name(".fetched.log"), downloader or Downloader(), say=say)
    addresses, rows = _addresses(Path(source)), {}
    if addresses:
        store.fetch([(number, url) for number, (url, _) in enumerate(addresses)])
        for number, (url, caption) in enumerate(addresses):
            if number not in store.reasons:
                rows[store.path(number).name] = (caption, url)
        return rows, [f"'{addresses[number][0]}' {reason}" for number, reason in store.reasons.items()]
    found = captioned(Path(source))
    skipped = list(map(str, found.skipped))
    for number, (path, caption) in enumerate(zip(found.paths, found.captions, strict=True)):
        try:
            if not store.has(number):            # an earlier run may have copied it
                store.keep(number, path)
        except Unusable as problem:
            skipped.append(f"'{path.name}' {problem}")
            continue
        rows[store.path(number).name] = (caption or "", "")
    return rows, skipped


def _addresses(source: Path) -> list[tuple[str, str]]:
    """Returns the (url, caption) pairs of a list of web addresses; none where `source` is something else."""
    if not source.is_file() or source.suffix.lower() not in (".txt", ".tsv", ".list"):
        return []
    lines = [line.partition("\t") for line in read_lines(source, "list") if line]
    if not lines or not lines[0][0].startswith(("http://", "https://")):
        return []
    return [(url.strip(), " ".join(caption.split())) for url, _, caption in lines]


def _embed(clip: Clip, paths: Sequence[Path]) -> torch.Tensor:
    """Returns the unit vectors (N, D) float32 of images."""
    parts = []
    for start in range(0, len(paths), BATCH):           # opened a batch at a time: all of them may not fit into memory
        parts.append(clip.images([decode(path).image for path in paths[start:start + BATCH]]))
    return torch.cat(parts)


def _write_metadata(folder: Path, rows: Mapping[str, tuple[str, str]]) -> None:
    """Writes metadata/: image_path (below the index's folder), caption and url of every vector, in their order."""
    pyarrow = library("pyarrow")
    parquet = library("pyarrow.parquet")
    captions, urls = map(list, zip(*rows.values(), strict=True))
    paths = [f"{IMAGES}/{name}" for name in rows]
    table = pyarrow.table({"image_path": paths, "caption": captions, "url": urls})
    write_atomically(folder / "metadata" / "metadata_0.parquet", lambda part: parquet.write_table(table, part))


def _write_faiss(folder: Path, vectors: torch.Tensor) -> None:
    """Builds image.index, exact over unit vectors (N, D)."""
    faiss = library("faiss")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    write_atomically(folder / "image.index", lambda part: faiss.write_index(index, str(part)))


def library(name: str) -> ModuleType:
    """Imports a module that comes with clip-retrieval, quietly."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{MISSING} that works ({error}); {SETUP}.") from error
