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
METADATA = ("metadata.jsonl", "metadata.csv")     # of Hugging Face's image folders
SIDECARS = (".txt", ".caption")     # of kohya's and other trainers


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
    if (path / IMAGES).is_file():     # a real_reg folder
        path = path / IMAGES
    if captions and path.is_file() and path.name == IMAGES and path.with_name(CAPTIONS).exists():
        return _listed(path, check)
    paths, skipped = list_images(path, check)
    if not path.is_dir():     # nothing stands beside the images of a list
        return Captioned(paths, [None] * len(paths), skipped, "list of images")
    texts = [path / name for name in METADATA]
    known = set(texts)                 # files of captions are not images that were skipped
    for image in paths:
        known.update(_sidecars(image))
    skipped = [item for item in skipped if item.path not in known]
    said, layout = {}, "folder"
    if captions:
        said, layout = _folder_captions(paths, texts)
    return Captioned(paths, [said.get(image) for image in paths], skipped, layout)


def _folder_captions(paths: Sequence[Path], texts: Sequence[Path]) -> tuple[dict[Path, str], str]:
    """Returns what the first of the lists `texts` that is there, or else the texts beside images, say of `paths`."""
    said: dict[Path, str] = {}
    for table in texts:
        if not table.is_file():
            continue
        listed = _read_caption_table(table)
        for image in paths:
            if image.resolve() in listed:
                said[image] = listed[image.resolve()]
        return said, f"folder with {len(said)} captions in {table.name}"
    for image in paths:
        text = _beside(image)
        if text:
            said[image] = text
    return said, f"folder with {len(said)} captions beside images" if said else "folder"


def _sidecars(image: Path) -> list[Path]:
    """Lists where the text beside an image may be: a.txt or a.jpg.txt for a.jpg, or .caption for .txt."""
    places = []
    for suffix in SIDECARS:
        places += [image.with_suffix(suffix), image.with_name(image.name + suffix)]
    return places


def _beside(image: Path) -> str | None:
    """Returns the text beside an image; None where there is none."""
    for place in _sidecars(image):
        if isfile(place):     # a name may be too long for this disk
            text = " ".join(read_lines(place, "caption"))
            return " ".join(text.split()) or None
    return None


def _read_caption_table(path: Path) -> dict[Path, str]:
    """Reads captions by resolved image from metadata.jsonl or metadata.csv: file_name, text (or caption).

    Paths are resolved, as one image may be named from several folders.
    """
    said = {}
    read_rows = _csv_rows if path.suffix == ".csv" else _json_rows
    for number, entry in read_rows(path):
        # Other columns are other tools'.
        name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
        if not isinstance(name, str) or not name:
            raise UserError(f"line {number} of '{path}' does not say which image it is about; name it as file_name, "
                            "and what it shows as text.")
        image = find_listed(name, path)
        if not isfile(image):
            raise UserError(f"line {number} of '{path}' names '{name}', which is not there; correct it.")
        if isinstance(text, str) and text.strip():
            # A caption's line ends and runs of spaces mean nothing.
            said[image.resolve()] = " ".join(text.split())
    return said


def _json_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads lines {"file_name": "a.jpg", "text": "..."} with their numbers."""
    rows = []
    for number, line in enumerate(read_lines(path, "list of captions"), 1):
        if not line:
            continue
        try:
            entry = parse_json(line)
        except BadRecord as error:
            raise UserError(f"line {number} of '{path}' is no JSON ({error}); correct it.") from error
        if not isinstance(entry, dict):
            raise UserError(f"line {number} of '{path}' is not as expected; write "
                            '{"file_name": "a.jpg", "text": "what it shows"}.')
        rows.append((number, entry))
    return rows


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads the rows below a heading such as file_name,text with their lines' numbers."""
    # Strict: a stray quote is an error, not half a row.
    reader = csv.DictReader(StringIO(read_text(path, "list of captions"), newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"line {reader.reader.line_num} of '{path}' is no CSV ({error}); correct it.") from error


def _listed(path: Path, check: Callable[[Path], str | None]) -> Captioned:
    """Reads images.txt with the caption.txt beside it."""
    lines = read_lines(path, "list")
    texts = read_captions(path.with_name(CAPTIONS), path, len(lines))
    paths, captions, skipped = [], [], []
    for line, text in zip(lines, texts, strict=True):
        if not line:
            continue
        image = find_listed(line, path)
        reason = check(image)
        if reason:
            skipped.append(Skipped(image, reason))
            continue
        paths.append(image)
        captions.append(text)
    if not paths:
        raise UserError(f"list '{path}' names no usable image ({some_skipped(skipped) or 'it is empty'}); "
                        "correct it.")
    return Captioned(paths, captions, skipped, f"{IMAGES} with {CAPTIONS}")


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
