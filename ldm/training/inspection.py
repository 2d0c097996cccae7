"""Shows before training exactly what the network will see: contact sheets, and a table of what became of every file."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw

from ldm.config import DataConfig, require
from ldm.data.captions import Captioned, captioned
from ldm.data.framing import Framing, bars_advice, has_black_bars, trim_bars
from ldm.data.images import Unusable, check_color, decode
from ldm.files import claim_results, write_text
from ldm.sheets import font, save_png, scaled, sheet
from ldm.training.references import framing_of
from ldm.util import UserError

COLUMNS, PER_PAGE = 6, 48     # images in a row, and on a page
CELL, LABEL = 176, 24     # px of an image's longer side, and of its name below it
SIDE = 512     # of SD v1, where the model's configuration does not tell
ALARMS = ("enlarged", bars_advice(False), bars_advice(True))     # how notes end that a reader must not miss
TABLE = "files.tsv"
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
    """One usable image as the network sees it, and as it would were its black bars left: (S, S, 3) uint8.

    The mask is (S, S) uint8; where no bars were cropped off, `barred` is None.
    """

    pixels: np.ndarray
    mask: np.ndarray
    size: tuple[int, int]
    notes: tuple[str, ...]
    barred: np.ndarray | None


class _Reader:
    """Decodes each file once, keeping what the network will see of it."""

    def __init__(self, framing: Framing):
        self.framing, self.seen, self._lock = framing, {}, Lock()

    def __call__(self, path: Path) -> str | None:
        """Says why a file is unusable, or remembers its image."""
        try:
            image = decode(path, self.framing.background)
        except Unusable as problem:
            return str(problem)
        kept = trim_bars(image) if self.framing.trim_bars else image     # as training crops, before anything else
        pixels, mask = self.framing.frame(kept)
        if not mask.any():
            return "is transparent all over"     # nothing of it would count in the loss
        barred = None if kept is image else replace(self.framing, trim_bars=False).frame(image)[0]
        notes = list(kept.notes)
        width, height = kept.image.size
        if width != height:
            notes.append("sides cut off" if self.framing.crop == "center" else "padded")
        if min(width, height) < self.framing.size:
            notes.append(f"smaller than {self.framing.size} px: enlarged")
        if has_black_bars(pixels):
            notes.append(f"has {bars_advice(self.framing.trim_bars)}")
        with self._lock:     # files are decoded by several threads
            self.seen[path] = _Seen(pixels, mask, image.image.size, tuple(notes), barred)
        return None


def inspect_sets(sets: Sequence[tuple[str, Path, bool]], framing: Framing, folder: Path, flip: bool = True) -> Report:
    """Writes files.tsv and sheet-*.png about named sets of images into `folder`.

    Args:
        sets: a name, any layout `ldm.data.captions.captioned` reads, and whether its captions are used, for each.
        framing: how training frames images.
        flip: whether training mirrors them at random; the sheets then show them mirrored too.

    Raises:
        UserError: a set is missing or has no usable image, `folder` holds files of these names that were not made
            here, or the disk refuses.
    """
    rows: list[tuple[str, ...]] = []
    lines, sheets, used, skipped = [], [], 0, 0
    _claim(folder)     # before files are decoded, which takes minutes for large folders
    for name, source, captions in sets:
        reader = _Reader(framing)
        found = captioned(source, reader, captions)
        used, skipped = used + len(found.paths), skipped + len(found.skipped)
        lines.append(f"{name}: {len(found.paths)} images used, {len(found.skipped)} files skipped ({found.layout})")
        for item in found.skipped:
            lines.append(f"{name}: skipped {item}")
        for path in found.paths:
            width, height = reader.seen[path].size
            for note in reader.seen[path].notes:
                if note.endswith(ALARMS):
                    lines.append(f"{name}: warning: '{path.name}' is {width} x {height} px, {note}")
        rows += _table_rows(name, found, reader)
        sheets += _draw_pages(name, found, reader, folder, flip, len(sheets))
    return Report(used, skipped, lines, _write_table(rows, folder), sheets)


def _write_table(rows: Sequence[tuple[str, ...]], folder: Path) -> Path:
    """Writes the rows below their headings, with tabs between the cells."""
    lines = []
    for row in [HEADINGS, *rows]:
        cells = [" ".join(cell.split()) for cell in row]      # a caption may hold tabs and line ends
        lines.append("\t".join(cells) + "\n")
    return write_text(folder / TABLE, "".join(lines))


def _claim(folder: Path) -> None:
    """Notes that the table and every sheet that is there are ours to replace.

    Earlier versions made no note; theirs is a folder whose table has our headings.
    """
    table = folder / TABLE
    known = table.is_file() and table.read_bytes().startswith("\t".join(HEADINGS).encode())
    sheets = [path.name for path in sorted(folder.glob("sheet-*.png"))]
    claim_results(folder, [TABLE, *sheets], known)


def _table_rows(name: str, found: Captioned, reader: _Reader) -> list[tuple[str, ...]]:
    rows = []
    for number, (path, caption) in enumerate(zip(found.paths, found.captions, strict=True)):
        seen = reader.seen[path]
        width, height = seen.size
        rows.append((name, str(number), path.name, "used", f"{width} x {height}", "; ".join(seen.notes), caption or ""))
    for item in found.skipped:
        rows.append((name, "", item.path.name, f"skipped: {item.reason}", "", "", ""))
    return rows


def _draw_pages(name: str, found: Captioned, reader: _Reader, folder: Path, flip: bool, drawn: int) -> list[Path]:
    """Draws a set as pages of rows: images, with their black bars where some were cropped off, mirrored, and their
    loss masks where anything is left out.
    """
    # A row of white masks would say nothing.
    masked = any((reader.seen[path].mask < 255).any() for path in found.paths)
    pages = []
    for first in range(0, len(found.paths), PER_PAGE):
        rows = []
        for start in range(first, min(first + PER_PAGE, len(found.paths)), COLUMNS):
            paths = found.paths[start:min(start + COLUMNS, first + PER_PAGE)]
            seen = [reader.seen[path] for path in paths]
            names = [f"{start + place}: {path.name}" for place, path in enumerate(paths)]
            rows += _rows_of(seen, names, flip, masked)
        last = min(first + PER_PAGE, len(found.paths)) - 1
        title = (f"{name}: {reader.framing.size} px, crop {reader.framing.crop}, images {first} to {last} of "
                 f"{len(found.paths)}")
        page = sheet([""] * min(COLUMNS, len(found.paths)), rows, CELL + LABEL, title)
        sheet_name = f"sheet-{drawn + len(pages):02d}.png"
        claim_results(folder, [sheet_name])     # a page more than the run before had is claimed as it comes
        pages.append(save_png(page, folder / sheet_name))
    return pages


def _rows_of(seen: Sequence[_Seen], names: Sequence[str], flip: bool,
             masked: bool) -> list[tuple[str, list[Image.Image]]]:
    """Draws what a few images are to the network: a caption and their cards for each way of seeing them."""
    rows = []
    if any(one.barred is not None for one in seen):
        cards = []
        for one in seen:
            pixels = one.pixels if one.barred is None else one.barred
            cards.append(_card(Image.fromarray(pixels)))
        rows.append(("with black bars, before data.trim_bars", cards))
    images = [Image.fromarray(one.pixels) for one in seen]
    rows.append(("what is learned", list(map(_card, images, names))))
    if flip:
        mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
        rows.append(("mirrored, as every second time", list(map(_card, mirrored))))
    if masked:
        cards = [_card(Image.fromarray(one.mask)) for one in seen]
        rows.append(("what counts in the loss (white)", cards))
    return rows


def _card(image: Image.Image, name: str = "") -> Image.Image:
    """Puts a name below an image, its middle left out where it is too long for one line."""
    card, face = Image.new("RGB", (CELL, CELL + LABEL), "white"), font(14)
    card.paste(scaled(image, CELL))
    shown, half = name, len(name) // 2
    while face.getlength(shown) > CELL and half:
        half -= 1     # letters are left out in the middle: ends tell files apart
        shown = f"{name[:half]}...{name[-half:]}"
    ImageDraw.Draw(card).text((0, CELL + 3), shown, fill="black", font=face)
    return card


def side_of(config: DictConfig) -> int:
    """Returns the side in px of the images a run trains on, read off the model's configuration."""
    if config.trainer.image_size is not None:
        return config.trainer.image_size
    latent = OmegaConf.select(config, "model.params.image_size")
    levels = OmegaConf.select(config, "model.params.first_stage_config.params.ddconfig.ch_mult")
    if not isinstance(latent, int) or not levels:
        return SIDE
    return latent * 2 ** (len(levels) - 1)      # each level but the last halves the sides


def inspect_run(config: DictConfig, folder: Path) -> None:
    """Writes contact sheets and the table of files of every concept and its regularization set, and prints the gist.

    Raises:
        UserError: no images are configured or usable, or the disk refuses.
    """
    data: DataConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config.data))
    sets = []
    for index, concept in enumerate(config.concepts):
        require(concept, index, "images")
        sets.append((concept.name, Path(concept.images), data.captions))
        if concept.regularization is not None and data.reg.mode in (None, "folder"):
            sets.append((f"{concept.name}, regularization", Path(concept.regularization),
                         not concept.regularization_caption))
    if not sets:
        raise UserError("no concept is configured; give DATAPATH for train.sh, or --datapath.")
    check_color(data.background)
    framing = framing_of(data, side_of(config))
    report = inspect_sets(sets, framing, folder, config.method.flip)
    for line in report.lines:
        print(line)
    print(f"table:  {report.table}")
    for path in report.sheets:
        print(f"sheet:  {path}")
