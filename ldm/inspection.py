"""Shows before training exactly what the network will see: contact sheets, and a table of every file and its fate."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.checkpoint import write_atomically
from ldm.data.images import CROPS, Framing, Unusable, check_colour, decode, has_black_bars
from ldm.data.layouts import Captioned, captioned
from ldm.pictures import save_png, sheet
from ldm.util import UserError

COLUMNS, PER_PAGE, CELL = 8, 48, 112
SIDE = 512     # of SD v1, where the model's configuration does not tell
ALARMS = ("enlarged", "would be learned too")     # how notes end that a reader should not miss
HEADINGS = ("set", "number", "file", "fate", "original size", "what was done", "caption")


@dataclass(frozen=True)
class Report:
    """What an inspection found and wrote: counts, a line per skipped file or warning, the table, the sheets."""

    used: int
    skipped: int
    lines: list[str]
    table: Path
    sheets: list[Path]


@dataclass(frozen=True, eq=False)
class _Seen:
    """One usable picture as the network sees it: (S, S, 3) and (S, S) uint8."""

    pixels: np.ndarray
    mask: np.ndarray
    size: tuple[int, int]
    notes: tuple[str, ...]


class _Reader:
    """Decodes each file once, keeping what the network will see of it."""

    def __init__(self, framing: Framing):
        self.framing, self.seen, self._lock = framing, {}, Lock()

    def __call__(self, path: Path) -> str | None:
        """Says why a file is unusable, or remembers its picture."""
        try:
            picture = decode(path, self.framing.background)
        except Unusable as problem:
            return str(problem)
        pixels, mask = self.framing.frame(picture)
        if not mask.any():
            return "is transparent all over"
        notes = list(picture.notes)
        width, height = picture.image.size
        if width != height:
            notes.append("sides cut off" if self.framing.crop == "center" else "padded")
        if min(width, height) < self.framing.size:
            notes.append(f"smaller than {self.framing.size} px: enlarged")
        if has_black_bars(pixels):
            notes.append("has black bars, which would be learned too")
        with self._lock:
            self.seen[path] = _Seen(pixels, mask, (width, height), tuple(notes))
        return None


def inspect_sets(sets: Sequence[tuple[str, Path]], framing: Framing, folder: Path, flip: bool = True) -> Report:
    """Writes files.tsv and sheet-*.png about named sets of pictures into `folder`.

    Args:
        sets: a name and any layout `ldm.data.layouts.captioned` reads, for each.
        framing: how training frames pictures.
        flip: whether training mirrors them at random; the sheets then show them mirrored too.

    Raises:
        UserError: a set is missing or has no usable picture, or the disk refuses.
    """
    rows: list[tuple[str, ...]] = []
    lines, sheets, used, skipped = [], [], 0, 0
    for name, source in sets:
        reader = _Reader(framing)
        found = captioned(source, reader)
        used, skipped = used + len(found.paths), skipped + len(found.skipped)
        lines.append(f"{name}: {len(found.paths)} pictures used, {len(found.skipped)} files skipped ({found.layout})")
        lines += [f"{name}: skipped {item}" for item in found.skipped]
        lines += [f"{name}: warning: '{path.name}' is {size[0]} x {size[1]} px, {note}" for path in found.paths
                  for size in [reader.seen[path].size] for note in reader.seen[path].notes if note.endswith(ALARMS)]
        rows += _table_rows(name, found, reader)
        sheets += _draw(name, found, reader, folder, flip, len(sheets))
    text = "".join("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in [HEADINGS, *rows])
    table = write_atomically(folder / "files.tsv", lambda part: part.write_text(text, encoding="utf-8"))
    return Report(used, skipped, lines, table, sheets)


def _table_rows(name: str, found: Captioned, reader: _Reader) -> list[tuple[str, ...]]:
    rows = [(name, str(number), path.name, "used", "{} x {}".format(*reader.seen[path].size),
             "; ".join(reader.seen[path].notes), caption or "")
            for number, (path, caption) in enumerate(zip(found.paths, found.captions, strict=True))]
    return rows + [(name, "", item.path.name, f"skipped: {item.reason}", "", "", "") for item in found.skipped]


def _draw(name: str, found: Captioned, reader: _Reader, folder: Path, flip: bool, drawn: int) -> list[Path]:
    """Draws a set as pages of rows: pictures, the same mirrored, and their loss masks where anything is left out."""
    masked = any((reader.seen[path].mask < 255).any() for path in found.paths)
    pages = []
    for first in range(0, len(found.paths), PER_PAGE):
        rows = []
        for start in range(first, min(first + PER_PAGE, len(found.paths)), COLUMNS):
            paths = found.paths[start:min(start + COLUMNS, first + PER_PAGE)]
            pictures = [Image.fromarray(reader.seen[path].pixels) for path in paths]
            rows.append(("  |  ".join(f"{start + place}: {path.name}" for place, path in enumerate(paths)), pictures))
            if flip:
                rows.append(("mirrored, as every second time", [_mirrored(picture) for picture in pictures]))
            if masked:
                masks = [Image.fromarray(reader.seen[path].mask) for path in paths]
                rows.append(("what counts in the loss (white)", masks))
        title = f"{name}: {reader.framing.size} px, crop {reader.framing.crop}, pictures {first} to " \
                f"{min(first + PER_PAGE, len(found.paths)) - 1} of {len(found.paths)}"
        page = sheet([""] * COLUMNS, rows, CELL, title)
        pages.append(save_png(page, folder / f"sheet-{drawn + len(pages):02d}.png"))
    return pages


def _mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def side_of(config: DictConfig) -> int:
    """Returns the side in px of the pictures a run trains on, read off the model's configuration."""
    if config.trainer.image_size is not None:
        return config.trainer.image_size
    latent = OmegaConf.select(config, "model.params.image_size")
    levels = OmegaConf.select(config, "model.params.first_stage_config.params.ddconfig.ch_mult")
    return latent * 2 ** (len(levels) - 1) if isinstance(latent, int) and levels else SIDE


def inspect_run(config: DictConfig, folder: Path) -> None:
    """Writes contact sheets and the table of files of every concept and its regularisation set, and prints the gist.

    Raises:
        UserError: no pictures are configured or usable, or the disk refuses.
    """
    data = config.data
    if data.crop not in CROPS:
        raise UserError(f"data.crop '{data.crop}' is unknown; use one of {', '.join(CROPS)}.")
    sets = []
    for index, concept in enumerate(config.concepts):
        if OmegaConf.is_missing(concept, "images"):
            raise UserError(f"concepts.{index}.images is not set; give --datapath.")
        sets.append((concept.name, Path(concept.images)))
        if concept.regularization is not None and data.reg.mode in (None, "folder"):
            sets.append((f"{concept.name}, regularisation", Path(concept.regularization)))
    if not sets:
        raise UserError("no concept is configured; give --datapath.")
    framing = Framing(side_of(config), data.crop, check_colour(data.background), data.alpha_mask)
    report = inspect_sets(sets, framing, folder, config.method.flip)
    for line in report.lines:
        print(line)
    print(f"table:  {report.table}")
    for path in report.sheets:
        print(f"sheet:  {path}")
