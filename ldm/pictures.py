"""Pictures about pictures: labelled sheets, mask panels, files with their settings inside."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ldm.checkpoint import write_atomically
from ldm.util import UserError

MARGIN = 8
SETTINGS_KEY = "dci-ico"        # PNG text entry with all settings as JSON
PARAMETERS_KEY = "parameters"   # the entry other tools read


def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns Pillow's own font at a size in px."""
    return ImageFont.load_default(size)


def wrap(text: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a text into lines of at most `width` px."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image | None]]], cell: int = 160,
          title: str = "") -> Image.Image:
    """Lays pictures out under column headings, each row below its own caption; None leaves a cell empty."""
    face, small = font(max(12, cell // 11)), font(max(11, cell // 13))
    width = len(columns) * (cell + MARGIN) + MARGIN
    line = int(small.size * 1.4)
    titles = wrap(title, width - 2 * MARGIN, face)
    captions = [wrap(caption, width - 2 * MARGIN, small) for caption, _ in rows]
    heads = [wrap(column, cell, face) for column in columns]
    head = int(face.size * 1.35) * max(len(lines) for lines in heads) + MARGIN
    top = head + int(face.size * 1.6) * len(titles) + MARGIN
    height = top + sum(len(lines) * line + cell + 2 * MARGIN for lines in captions)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for text in titles:
        draw.text((MARGIN, y), text, fill="black", font=face)
        y += int(face.size * 1.6)
    for index, lines in enumerate(heads):
        draw.multiline_text((MARGIN + index * (cell + MARGIN), y), "\n".join(lines), fill="black", font=face)
    y = top
    for lines, (_, pictures) in zip(captions, rows, strict=True):
        draw.multiline_text((MARGIN, y), "\n".join(lines), fill="#444444", font=small)
        y += len(lines) * line
        for index, picture in enumerate(pictures):
            if picture is not None:
                page.paste(fit(picture, cell), (MARGIN + index * (cell + MARGIN), y))
        y += cell + 2 * MARGIN
    return page


def fit(picture: Image.Image, cell: int) -> Image.Image:
    """Scales a picture so that its longer side is `cell` px."""
    scale = cell / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.LANCZOS if scale < 1 else Image.BICUBIC)


def mask_panel(picture: Image.Image, record: Sequence[tuple[str, Tensor]], title: str, columns: int = 8,
               cell: int = 96) -> Image.Image:
    """Draws the concept masks M^c of one picture, beside it, per resolution and step (paper Fig. 11).

    Args:
        record: layer names and masks (2, 1, H, h, w), in order of time, as `Generator.masks` gives.
        title: which picture it is.
        columns: how many of the record's joint steps to show, evenly spaced.

    Raises:
        UserError: the record is empty.
    """
    if not record:
        raise UserError("there are no masks to draw: agg_time leaves no step with two branches.")
    layers = len({name for name, _ in record})
    steps = len(record) // layers
    shown = np.unique(np.linspace(0, steps - 1, min(columns, steps)).round().astype(int))
    rows = []
    for height, width in sorted({tuple(masks.shape[-2:]) for _, masks in record}, reverse=True):
        scale = cell / max(height, width)
        cells = []
        for step in shown:
            maps = [masks[0].mean(dim=(0, 1)) for _, masks in record[step * layers:(step + 1) * layers]
                    if masks.shape[-2:] == (height, width)]
            mean = np.mean([values.numpy() for values in maps], axis=0)                     # (h, w)
            cells.append(Image.fromarray((255 * mean.clip(0, 1)).astype(np.uint8)).resize(
                (round(width * scale), round(height * scale)), Image.NEAREST))
        caption = f"{height} x {width}: share of the concept branch, 0 black to 1 white, mean of layers and heads"
        rows.append((caption, [picture, *cells]))
    return sheet(["picture", *(f"step {step + 1}" for step in shown)], rows, cell, f"DBIM's concept masks M^c: {title}")


def save_png(picture: Image.Image, path: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Writes a PNG atomically, with its settings as text where given."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_text(SETTINGS_KEY, json.dumps(settings))
        info.add_text(PARAMETERS_KEY, describe(settings))
    return write_atomically(path, lambda part: picture.save(part, format="png", pnginfo=info))


def describe(settings: Mapping[str, Any]) -> str:
    """Returns settings in the one-paragraph form web interfaces read: prompt, then key: value pairs."""
    strength = "off" if settings["strength"] is None else settings["strength"]
    pairs = [("Steps", settings["steps"]), ("Sampler", settings["sampler"]), ("CFG scale", settings["scale"]),
             ("Seed", settings["seed"]), ("DCI lambda", strength)]
    return settings.get("text", settings["prompt"]) + "\n" + ", ".join(f"{key}: {value}" for key, value in pairs)


def read_settings(path: Path) -> dict[str, Any]:
    """Reads back what `save_png` stored; empty where a picture has none."""
    with Image.open(path) as picture:
        return json.loads(getattr(picture, "text", {}).get(SETTINGS_KEY, "{}"))
