"""Images about images: labeled sheets, mask panels, files with their settings inside."""
from __future__ import annotations

import json
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydantic import Field
from torch import Tensor

from ldm.data.images import texts_of
from ldm.files import write_atomically
from ldm.records import BadRecord, Line, Prose, Record, parse_json, read_record
from ldm.util import UserError

MARGIN = 8     # px between cells, and around the page
WIDEST, TALLEST = 4000, 12000   # px of a page, where its cells are not at their least already
FONT = Path(__file__).parent / "fonts" / "DejaVuSans-subset.ttf"
DRAWN = 2000                    # letters of a text that is written on a sheet
SETTINGS_KEY = "dci-ico"        # PNG text entry with all settings as JSON
PARAMETERS_KEY = "parameters"   # the entry other tools read
Whole = Annotated[int, Field(gt=-2 ** 64, lt=2 ** 64)]


class _Concept(Record):
    """What an image's settings say of its concept."""

    class_noun: Line = ""


class _Settings(Record):
    """The settings we read back; others may come from other versions."""

    prompt: Prose = ""
    text: Prose = ""
    auxiliary_text: Prose = ""
    sampler: Line = ""
    seed: Whole = 0
    steps: Whole = 0
    scale: float = 1.0
    strength: float | None = None
    concept: _Concept = _Concept()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns the sheets' font at a size in px, laid out alike on every machine."""
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _shown(letter: str) -> str:
    """Returns a letter, or its number where the font would draw a box that says nothing."""
    face = font(16)
    missing = bytes(face.getmask("\uffff")) == bytes(face.getmask(letter))       # U+FFFF is no letter of any font
    return f"[U+{ord(letter):04X}]" if missing else letter


def readable(text: str) -> str:
    """Returns a text that the sheets' font can draw: accents joined to their letters, unknown letters as [U+732B]."""
    return "".join(map(_shown, unicodedata.normalize("NFC", text)))


def wrap(text: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into lines of at most `width` px, a longer word wherever it must be; absurd lengths are cut."""
    lines: list[str] = []
    if len(text) > DRAWN:
        text = f"{text[:DRAWN]} ..."
    for word in readable(text).split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and face.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def cell_side(images: Sequence[Image.Image | None], columns: int, rows: int, least: int) -> int:
    """Returns the side in px of a sheet's cells: the images' own where the page has room, at least `least`.

    Their median decides, so that one large reference does not enlarge all others.
    """
    sides = [max(image.size) for image in images if image is not None]
    room = min(WIDEST // max(1, columns), TALLEST // max(1, rows)) - MARGIN     # px a cell may have
    return max(least, min(room, int(statistics.median(sides or [least]))))


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image | None]]], cell: int = 160,
          title: str = "") -> Image.Image:
    """Lays images out under column headings, each row below its own caption; None leaves a cell empty.

    Args:
        cell: side of an image in px, at least; larger ones are shown in their own size as far as the page has room.
    """
    shown: list[Image.Image | None] = []
    for _, images in rows:
        shown += images
    cell = cell_side(shown, len(columns), len(rows), cell)
    face, small = font(max(12, cell // 12)), font(max(11, cell // 14))
    width = len(columns) * (cell + MARGIN) + MARGIN
    titles = wrap(title, width - 2 * MARGIN, face)
    captions = [wrap(caption, width - 2 * MARGIN, small) for caption, _ in rows]
    heads = [wrap(column, cell, face) for column in columns]
    top = MARGIN + _height(face) * (len(titles) + max(map(len, heads))) + MARGIN
    height = top + sum(map(len, captions)) * _height(small) + len(captions) * (cell + 2 * MARGIN)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    y = _write_lines(draw, (MARGIN, MARGIN), titles, face, "black")
    for index, lines in enumerate(heads):
        _write_lines(draw, (MARGIN + index * (cell + MARGIN), y), lines, face, "black")
    y = top
    for lines, (_, images) in zip(captions, rows, strict=True):
        y = _write_lines(draw, (MARGIN, y), lines, small, "#444444")
        for index, image in enumerate(images):
            if image is not None:
                page.paste(scaled(image, cell), (MARGIN + index * (cell + MARGIN), y))
        y += cell + 2 * MARGIN
    return page


def _height(face: ImageFont.FreeTypeFont) -> int:
    """Px from one line of text to the next."""
    return int(face.size * 1.4)


def _write_lines(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], face: ImageFont.FreeTypeFont,
           fill: str) -> int:
    """Writes lines below each other and returns how far down the next one would be."""
    x, y = place
    for line in lines:
        draw.text((x, y), line, fill=fill, font=face)
        y += _height(face)
    return y


def scaled(image: Image.Image, cell: int) -> Image.Image:
    """Scales an image so that its longer side is `cell` px."""
    scale = cell / max(image.size)     # pixels of small images stay visible
    size = (round(image.width * scale), round(image.height * scale))
    return image.convert("RGB").resize(size, Image.LANCZOS if scale < 1 else Image.BICUBIC)


def mask_panel(image: Image.Image, record: Sequence[tuple[str, Tensor]], title: str, columns: int = 8,
               cell: int = 96) -> Image.Image:
    """Draws the concept masks M^c of one image, beside it, per resolution and step (paper Fig. 11).

    Args:
        record: layer names and masks (2, 1, H, h, w), in order of time, as `Generator.masks` gives.
        title: which image it is.
        columns: how many of the record's joint steps to show, evenly spaced.

    Raises:
        UserError: the record is empty.
    """
    if not record:
        raise UserError("there are no masks to draw: agg_time leaves no step with two branches.")
    layers = len({name for name, _ in record})     # every joint step integrates in every layer once
    steps = len(record) // layers
    # First and last among them.
    shown = np.unique(np.linspace(0, steps - 1, min(columns, steps)).round().astype(int))
    sizes = {tuple(masks.shape[-2:]) for _, masks in record}
    rows = []
    for height, width in sorted(sizes, reverse=True):
        cells = [image]
        for step in shown:
            of_step = record[step * layers:(step + 1) * layers]
            maps = [masks[0].mean(dim=(0, 1)) for _, masks in of_step if masks.shape[-2:] == (height, width)]
            cells.append(_mask_image(torch.stack(maps).mean(dim=0), cell))
        caption = f"{height} x {width}: share of the concept branch, 0 black to 1 white, mean of layers and heads"
        rows.append((caption, cells))
    columns_shown = ["image"] + [f"step {step + 1}" for step in shown]
    return sheet(columns_shown, rows, cell, f"DBIM's concept masks M^c: {title}")


def _mask_image(mask: Tensor, cell: int) -> Image.Image:
    """Draws a mask (h, w) in [0, 1] as squares, its longer side `cell` px."""
    height, width = mask.shape
    scale = cell / max(height, width)
    gray = (255 * mask.numpy().clip(0, 1)).astype(np.uint8)                                 # (h, w)
    return Image.fromarray(gray).resize((round(width * scale), round(height * scale)), Image.NEAREST)


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Writes a PNG atomically, with its settings as text where given."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_text(SETTINGS_KEY, json.dumps(settings))
        info.add_text(PARAMETERS_KEY, describe(settings))     # shown by viewers of images
    return write_atomically(path, lambda part: image.save(part, format="png", pnginfo=info))


def describe(settings: Mapping[str, Any]) -> str:
    """Returns settings in the one-paragraph form web interfaces read: prompt, then key: value pairs."""
    strength = "off" if settings["strength"] is None else settings["strength"]
    prompt = settings.get("text", settings["prompt"])
    return (f"{prompt}\nSteps: {settings['steps']}, Sampler: {settings['sampler']}, CFG scale: {settings['scale']}, "
            f"Seed: {settings['seed']}, DCI lambda: {strength}")


def read_settings(path: Path) -> dict[str, Any]:
    """Reads back what `save_png` stored; empty where an image has none, or, with a warning, none that make sense.

    Raises:
        UserError: the file cannot be read.
    """
    text = texts_of(path).get(SETTINGS_KEY)
    if text is None:
        return {}
    try:
        settings = parse_json(text)
        read_record(_Settings, settings)
    except BadRecord as error:
        print(f"warning: the settings inside '{path.name}' are left out, as they are not what is written here "
              f"({error}).", flush=True)
        return {}
    return settings
