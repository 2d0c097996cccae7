"""The one reader of text files people write: UTF-8 with or without a byte-order mark, any line ends, lines."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError

MOST_BYTES = 64_000_000                 # of a text file
_LOOKUP = re.compile(r"(\\*)\$\{")      # backslashes make what follows them a text of its own, in pairs themselves


def literal(value: Any) -> Any:
    """Returns texts, in lists and tables too, as OmegaConf has to be told them if it is to look nothing up in them."""
    if isinstance(value, str):
        return _LOOKUP.sub(lambda found: 2 * found[1] + r"\${", value)
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(literal, value))
    return value


def looks_up(value: Any) -> bool:
    """Says whether OmegaConf would look something up in a text, or in one of a list's or table's."""
    if isinstance(value, str):
        return any(len(found[1]) % 2 == 0 for found in _LOOKUP.finditer(value))
    if isinstance(value, Mapping):
        return any(map(looks_up, value.values()))
    return isinstance(value, (list, tuple)) and any(map(looks_up, value))


def read_text(path: Path, what: str, most: int = MOST_BYTES) -> str:
    """Reads a UTF-8 text file; `what` it is begins the error's sentence.

    Raises:
        UserError: the file is missing, no file (a pipe would be waited for), of more than `most` bytes, or no UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{what} '{path}' is no file; give the path of a text file.")
        if path.stat().st_size > most:
            raise UserError(f"{what} '{path}' has more than {most:,} bytes, which no such file has; check it.")
        text = path.read_text(encoding="utf-8-sig")
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
    lines = list(map(str.strip, read_text(path, what).split("\n")))
    while lines and not lines[-1]:
        lines.pop()
    return lines
