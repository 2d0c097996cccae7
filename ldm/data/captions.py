"""Captions people already have: beside images, in tables, in lists that come with a list of images."""
from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from os.path import isfile
from pathlib import Path
from typing import Any

from ldm.data.images import why_unusable
from ldm.data.listing import Skipped, find_listed, list_images, some_skipped
from ldm.records import BadRecord, parse_json
from ldm.text import read_lines, read_text
from ldm.util import UserError, shipped

IMAGES, CAPTIONS = "images.txt", "caption.txt"
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")


@dataclass(frozen=True)
class Captioned:
    """Usable images in order, what is said about each (None where nothing is), what was passed over, the layout."""

    paths: list[Path]
    captions: list[str | None]
    skipped: list[Skipped]
    layout: str


def captioned(path: Path, check: Callable[[Path], str | None] = why_unusable, captions: bool = True) -> Captioned:
    """Finds images and their captions.

    Args:
        path: a folder of images, perhaps with a.txt or a.caption beside a.jpg, or with metadata.jsonl or
            metadata.csv; a folder that holds images.txt; a list of images, whose captions are in caption.txt beside
            it if it is an images.txt; or one image. Paths in lists may start at the list's folder, its parent, or
            the current one.
        check: says why a file is unusable, None where it is not; called from several threads.
        captions: whether captions are wanted; files that hold them are not looked into where they are not.

    Raises:
        UserError: nothing is there or usable, or captions do not match images.
    """
    path = shipped(path)
    if (path / IMAGES).is_file():
        path = path / IMAGES
    if captions and path.is_file() and path.name == IMAGES and path.with_name(CAPTIONS).exists():
        return _listed(path, check)
    paths, skipped = list_images(path, check)
    if not path.is_dir():
        return Captioned(paths, [None] * len(paths), skipped, "list of images")
    texts = [path / name for name in METADATA]
    known = {*texts, *(sidecar for image in paths for sidecar in _sidecars(image))}
    skipped = [item for item in skipped if item.path not in known]
    said, layout = _folder_captions(paths, texts) if captions else ({}, "folder")
    return Captioned(paths, [said.get(image) for image in paths], skipped, layout)


def _folder_captions(paths: Sequence[Path], texts: Sequence[Path]) -> tuple[dict[Path, str], str]:
    """Returns what the first of the lists `texts` that is there, or else the texts beside images, say of `paths`."""
    found = next((text for text in texts if text.is_file()), None)
    if found is None:
        said = {image: text for image in paths if (text := _beside(image))}
        return said, f"folder with {len(said)} captions beside images" if said else "folder"
    listed = _read_caption_table(found)      # by resolved paths, as one image may be named from several folders
    said = {image: text for image in paths if (text := listed.get(image.resolve()))}
    return said, f"folder with {len(said)} captions in {found.name}"


def _sidecars(image: Path) -> list[Path]:
    """Lists where the text beside an image may be: a.txt or a.jpg.txt for a.jpg, or .caption for .txt."""
    return [place for suffix in SIDECARS
            for place in (image.with_suffix(suffix), image.with_name(image.name + suffix))]


def _beside(image: Path) -> str | None:
    """Returns the text beside an image; None where there is none."""
    for place in _sidecars(image):
        if isfile(place):     # a name may be too long for this disk
            return " ".join(" ".join(read_lines(place, "caption")).split()) or None
    return None


def _read_caption_table(path: Path) -> dict[Path, str]:
    """Reads captions by resolved image from metadata.jsonl or metadata.csv: file_name, text (or caption)."""
    said = {}
    for number, entry in (_csv_rows if path.suffix == ".csv" else _json_rows)(path):
        name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
        if not isinstance(name, str) or not name:
            raise UserError(f"line {number} of '{path}' does not say which image it is about; name it as file_name, "
                            "and what it shows as text.")
        image = find_listed(name, path)
        if not isfile(image):
            raise UserError(f"line {number} of '{path}' names '{name}', which is not there; correct it.")
        if isinstance(text, str) and text.strip():
            said[image.resolve()] = " ".join(text.split())
    return said


def _json_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads lines {"file_name": "a.jpg", "text": "..."} with their numbers."""
    rows = []
    for number, line in enumerate(read_lines(path, "list of captions"), 1):
        try:
            entry = parse_json(line) if line else None
        except BadRecord as error:
            raise UserError(f"line {number} of '{path}' is no JSON ({error}); correct it.") from error
        if line and not isinstance(entry, dict):
            raise UserError(f"line {number} of '{path}' is not as expected; write "
                            '{"file_name": "a.jpg", "text": "what it shows"}.')
        if line:
            rows.append((number, entry))
    return rows


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads the rows below a heading such as file_name,text with their lines' numbers."""
    reader = csv.DictReader(StringIO(read_text(path, "list of captions"), newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"line {reader.reader.line_num} of '{path}' is no CSV ({error}); correct it.") from error


def _listed(path: Path, check: Callable[[Path], str | None]) -> Captioned:
    """Reads images.txt with the caption.txt beside it."""
    lines = read_lines(path, "list")
    rows = [(find_listed(line, path), text) for line, text in
            zip(lines, read_captions(path.with_name(CAPTIONS), path, len(lines)), strict=True) if line]
    reasons = [check(image) for image, _ in rows]
    skipped = [Skipped(image, reason) for (image, _), reason in zip(rows, reasons, strict=True) if reason]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    if not kept:
        raise UserError(f"list '{path}' names no usable image ({some_skipped(skipped) or 'it is empty'}); "
                        "correct it.")
    return Captioned([image for image, _ in kept], [text for _, text in kept], skipped,
                     f"{IMAGES} with {CAPTIONS}")


def read_captions(path: Path, images: Path, count: int) -> list[str]:
    """Reads `count` captions, one per line.

    Raises:
        UserError: there are more or fewer, or one is empty.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; write one caption per line of '{images}', or give a caption.")
    captions = read_lines(path, "caption file")
    if len(captions) != count:
        raise UserError(f"'{images}' has {count} lines but '{path}' has {len(captions)}; "
                        "give every image exactly one caption, on the same line.")
    if "" in captions:
        raise UserError(f"line {captions.index('') + 1} of '{path}' is empty; say there what the image shows.")
    return captions
