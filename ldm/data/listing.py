"""Finds the usable images of a folder or a list, and names every file that is passed over."""
from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from ldm.data.images import why_unusable
from ldm.text import read_lines
from ldm.util import UserError

WORKERS = 2     # decoding threads


@dataclass(frozen=True)
class Skipped:
    """A file that was passed over, and why, worded to follow its name ("is empty")."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"'{self.path.name}' {self.reason}"


def list_images(folder: Path, check: Callable[[Path], str | None] | None = None) -> tuple[list[Path], list[Skipped]]:
    """Finds the usable images of a folder (in natural order), of a list file (in its order), or one file.

    What a file holds decides, not its suffix: each is decoded whole. A list file is UTF-8 text with one path
    per line, seen from the list's folder, that folder's parent, or the current one. `check` says why a file is
    unusable, in place of `why_unusable`; it is called from several threads.

    Raises:
        UserError: nothing is there, or nothing there is a usable image.
    """
    folder, check = Path(folder), check or why_unusable
    if folder.is_dir():
        candidates = sorted(entries_of(folder), key=_natural)
    elif folder.is_file():
        problem = check(folder)
        if problem is None:
            return [folder], []
        try:
            lines = [line for line in read_lines(folder, "list") if line]
            candidates = [find_listed(line, folder) for line in lines]
        except UserError as error:
            raise UserError(f"'{folder}' {problem}; give a folder of images or a list of them.") from error
    else:
        raise UserError(f"image folder '{folder}' does not exist; give a folder of images or a list of them.")
    in_folder = folder.is_dir()

    def why_not(path: Path) -> str | None:
        if in_folder and path.name.startswith("."):      # a list may name what it likes
            return "is hidden"
        return check(path)

    paths, skipped = [], []
    with ThreadPoolExecutor(WORKERS) as pool:            # Pillow decodes outside the interpreter's lock
        for path, reason in zip(candidates, pool.map(why_not, candidates), strict=True):
            if reason is None:
                paths.append(path)
            else:
                skipped.append(Skipped(path, reason))
    if not paths:
        raise UserError(f"'{folder}' holds no usable image ({some_skipped(skipped) or 'it is empty'}); "
                        "put at least one JPEG, PNG or WebP there.")
    return paths, skipped


def entries_of(folder: Path) -> list[Path]:
    """Lists what a folder holds, in order of names.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be opened ({error.strerror}); check it.") from error


def find_listed(line: str, listing: Path) -> Path:
    """Returns the path a list's line means; where nothing is there, as seen from the list's folder."""
    for base in (listing.parent, listing.absolute().parent.parent, Path()):
        if isfile(base / line):     # a line may be anything, also what no file can be called
            return base / line
    return listing.parent / line


def some_skipped(skipped: list[Skipped]) -> str:
    """Names the first three skipped files with their reasons, and counts the others."""
    named = [str(item) for item in skipped[:3]]
    if len(skipped) > 3:
        named.append(f"and {len(skipped) - 3} more")
    return "; ".join(named)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Orders names as people number them: img2 before img10."""
    parts = re.split(r"(\d+)", path.name.casefold())  # text and digits take turns, so like meets like
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name
