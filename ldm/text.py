"""The one reader of text files people write: UTF-8 with or without a byte-order mark, any line ends, lines."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError

LONGEST = 10_000                        # letters of a text that is believed; prompts end at 77 tokens
MOST_BYTES = 64_000_000                 # of a text file
_LOOKUP = re.compile(r"(\\*)\$\{")      # backslashes make what follows them a text of its own, in pairs themselves
_HALF = re.compile("[\ud800-\udfff]")     # of a letter: what Python makes of bytes that are no text
# "an" goes by the first sound: vowels but those that begin with a "y" or "w" (unicorn, user, European, one-eyed), the
# silent h (hour, heir, honest), and letters that are spelled (x-ray).
_TAKES_AN = re.compile(r"(?!uni(?![nm])|u[kst][aeiou]|ufo|u\b|eu|ewe|one(?:sies?)?\b|once)[aeiou]|hour|heir"
                       r"|hon(?:est|ou?r)|[fhlmnrsx](?=-|\b)", re.IGNORECASE)
NEW_WORD = re.compile(r"<[^<>\s|]+>")   # how a new word is written: <new1>, <ctx-0-2>


def article(noun: str) -> str:
    """Returns "an" or "a", as the first sound of `noun` wants it; that of new words is unknown, and they take "a"."""
    return "an" if _TAKES_AN.match(noun) else "a"


def is_unicode(text: str) -> bool:
    """Says whether a text can be written as UTF-8: names of files and command lines may hold any bytes."""
    return _HALF.search(text) is None


def literal(value: Any) -> Any:
    """Returns texts, in lists and tables too, as OmegaConf has to be told them if it is to look nothing up in them."""
    if isinstance(value, str):
        return _LOOKUP.sub(lambda found: 2 * found[1] + r"\${", value)
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(item) for item in value]
    return value


def looks_up(value: Any) -> bool:
    """Says whether OmegaConf would look something up in a text, or in one of a list's or table's."""
    if isinstance(value, str):
        return any(len(found[1]) % 2 == 0 for found in _LOOKUP.finditer(value))
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(looks_up(item) for item in items)


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
    lines = [line.strip() for line in read_text(path, what).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
