"""The one reader of text files people write: UTF-8 with or without a byte-order mark, any line ends, lines, JSON."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ldm.util import UserError

NEW_WORD = re.compile(r"<[^<>\s|]+>")   # how a new word is written: <new1>, <ctx-0-2>


def read_text(path: Path, what: str) -> str:
    """Reads a UTF-8 text file; `what` it is begins the error's sentence.

    Raises:
        UserError: the file is missing or is not UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{what} '{path}' does not exist; check its path.") from error
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read ({error.strerror}); check it.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} '{path}' is not UTF-8 text; save it as plain text in UTF-8.") from error
    if "\0" in text:     # UTF-16 without its mark, for one
        raise UserError(f"{what} '{path}' is not UTF-8 text; save it as plain text in UTF-8.")
    return text


def read_lines(path: Path, what: str) -> list[str]:
    """Reads the stripped lines of a text file, without the blank ones at its end.

    Only line feeds end a line: captions from the web hold other separators, which `str.splitlines` would split.

    Raises:
        UserError: as `read_text` does.
    """
    lines = [line.strip() for line in read_text(path, what).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_json(path: Path, what: str) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: as `read_text` does, or it is no JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} '{path}' is no JSON ({error}); correct it.") from error
