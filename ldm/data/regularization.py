"""Reads a regularization set: a real_reg folder, or any folder of images."""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ldm.data.captions import CAPTIONS, IMAGES, captioned, read_captions
from ldm.data.images import to_rgb, why_unusable
from ldm.data.listing import Skipped, find_listed, some_skipped
from ldm.files import write_atomically
from ldm.text import read_lines
from ldm.util import UserError, folder_name, shipped
from ldm.words import article

URLS = "urls.txt"


@dataclass(frozen=True)
class RegularizationSet:
    """Images of the class with one caption each, a sentence for the log, and what was passed over."""

    paths: list[Path]
    captions: list[str]
    source: str
    skipped: list[Skipped]


def class_caption(class_noun: str) -> str:
    """Words the caption of an image about which only the class is known."""
    return f"a photo of {article(class_noun)} {class_noun}"


def read_regularization(path: Path, class_noun: str, caption: str | None = None) -> RegularizationSet:
    """Reads the images and captions of a real_reg folder, of an images.txt, or of a folder of images.

    `caption` is one text for every image, or the path of a text file with a caption per line of images.txt.
    Without it a list takes its captions from the caption.txt beside it, a plain folder those beside its images
    (a.txt, metadata.jsonl, metadata.csv), else "a photo of a <noun>".

    Raises:
        UserError: something is missing, the lists do not match, or no image is usable.
    """
    path = shipped(path)
    if not os.path.exists(path):
        raise UserError(f"regularization folder '{path}' does not exist; give one with images of the class, fill "
                        f"one with scripts/retrieve.py --class_noun '{class_noun}', or use --reg_mode generate.")
    caption_file = _caption_file(caption)     # a path where a caption is expected is a common mistake
    if path.is_dir() and (path / IMAGES).exists():
        path = path / IMAGES     # the list decides which of the folder's images are meant
    if path.is_file():
        return _read_listed(path, None if caption_file else caption, caption_file or path.with_name(CAPTIONS))
    unmatched = caption_file
    if unmatched is None and (path / CAPTIONS).exists():
        unmatched = path / CAPTIONS
    if unmatched:
        raise UserError(f"the captions of '{unmatched}' cannot be matched to images: '{path}' has no {IMAGES}; "
                        "write one, with one image per line in the order of the captions.")
    found, text = captioned(path, captions=not caption), caption or class_caption(class_noun)
    captions = [own or text for own in found.captions]           # none is there where `caption` is given
    count = sum(map(bool, found.captions))
    if not count:
        kind = f"each captioned '{text}'"
    elif count == len(captions):
        kind = "each with its own caption"
    else:
        kind = f"{count} with their own captions, the others captioned '{text}'"
    return _as_set(found.paths, captions, found.skipped, f"of '{path}', {kind}")


def _caption_file(caption: str | None) -> Path | None:
    """Returns the file `caption` names; None where it is a caption itself, or none was given."""
    if caption is None or not (os.path.isfile(caption) or caption.endswith(".txt")):
        return None
    if not os.path.isfile(caption):  # else its path would be learned as if it described the images
        raise UserError(f"caption file '{caption}' does not exist; give its path, or a caption in words.")
    return Path(caption)


def _read_listed(images: Path, caption: str | None, caption_file: Path) -> RegularizationSet:
    """Reads the images a list names, with `caption` for all; damaged ones are skipped with their captions."""
    lines = read_lines(images, "list of images")
    if not lines:
        raise UserError(f"list '{images}' names no image; write one path per line.")
    if caption:
        captions, kind = [caption] * len(lines), f"each captioned '{caption}'"
    else:
        captions, kind = read_captions(caption_file, images, len(lines)), f"captioned by '{caption_file}'"
    listed = [_find(line, number, images) for number, line in enumerate(lines, 1)]
    paths, texts, skipped = [], [], []
    for path, text in zip(listed, captions, strict=True):
        reason = why_unusable(path)
        if reason:
            skipped.append(Skipped(path, reason))
            continue
        paths.append(path)
        texts.append(text)
    if not paths:
        raise UserError(f"list '{images}' names no usable image ({some_skipped(skipped)}); replace its images.")
    return _as_set(paths, texts, skipped, f"listed in '{images}', {kind}")


def _find(line: str, number: int, images: Path) -> Path:
    """Finds the image of one line, seen from the list's folder, that folder's parent, or the current one."""
    path = find_listed(line, images)
    if line and path.is_file():
        return path
    raise UserError(f"line {number} of '{images}' names '{line}', which is neither below the list's folder, its "
                    "parent, nor the current directory; correct the line or put the image there.")


def _as_set(paths: list[Path], captions: list[str], skipped: list[Skipped], origin: str) -> RegularizationSet:
    source = f"regularization: {len(paths)} image(s) {origin}; {len(skipped)} file(s) skipped."
    return RegularizationSet(paths, captions, source, skipped)


def write_regularization(folder: Path, class_noun: str,
                         images: Iterable[tuple[Image.Image, str, str]]) -> list[Path]:
    """Writes (image, caption, url or "") triples as a real_reg folder and returns the paths of the images.

    An empty caption becomes "a photo of a <noun>". Images get numbers no earlier one has and the lists come
    last, so a run that is cut short leaves an earlier set whole.

    Raises:
        UserError: there is no image to write, or the disk refuses.
    """
    folder, name = Path(folder), folder_name(class_noun)     # the layout of Custom Diffusion's real_reg
    # Numbers of an earlier set.
    taken = [int(path.stem) for path in (folder / name).glob("*.jpg") if path.stem.isdecimal()]
    paths, rows = [], []
    for number, (image, caption, url) in enumerate(images, max(taken, default=-1) + 1):
        paths.append(save_jpeg(to_rgb(image), folder / name / f"{number:05d}.jpg"))
        rows.append((f"{name}/{number:05d}.jpg", caption.strip() or class_caption(class_noun), url))
    if not paths:
        raise UserError(f"there is no image to write to '{folder}'; a regularization set needs at least one.")
    write_lists(folder, rows)
    return paths


def write_lists(folder: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """Writes images.txt, caption.txt and urls.txt of (path below `folder`, caption, url) rows, all three or none.

    Those that hold the same already stay untouched.

    Raises:
        UserError: the disk refuses.
    """
    files = []
    for place, name in enumerate((IMAGES, CAPTIONS, URLS)):
        lines = [" ".join(row[place].split()) for row in rows]      # a caption's line ends would part it
        files.append((folder / name, "".join(f"{line}\n" for line in lines)))
    if not all(holds(path, text) for path, text in files):
        _write_together(files)


def holds(path: Path, text: str) -> bool:
    """Says whether a file is there and holds exactly a text."""
    try:
        return path.read_bytes() == text.encode("utf-8")     # rewriting the same would change its time
    except OSError:
        return False


def save_jpeg(image: Image.Image, path: Path, new: bool = False) -> Path:
    """Writes an RGB image as a JPEG of high quality, as `ldm.files.write_atomically` does."""
    return write_atomically(path, partial(image.save, format="JPEG", quality=95, subsampling=0), new)


def _write_together(texts: list[tuple[Path, str]]) -> None:
    """Writes several text files of which none is renamed into place before all are on the disk."""
    (path, text), *rest = texts

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8", newline="\n")
        if rest:
            _write_together(rest)      # so that this one's renaming comes after theirs

    write_atomically(path, write)
