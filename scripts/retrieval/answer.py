"""Reads the answer of a clip-retrieval server, in little memory and believing nothing of it."""
from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

CHUNK = 1 << 16
LARGEST_ENTRY = 12_000_000    # bytes of one entry: its image as text is four thirds of a JPEG file
MOST_MARKS = 500              # signs of structure in one entry, which take time, memory and, nested, Python's stack
MESSAGE = 10_000              # bytes that are read of what is no list
CAPTION, URL, IDENTITY = 1000, 2000, 100                  # characters that are kept of each
_MARKS = re.compile(rb'["{}\[\],]')
_QUOTED = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)     # up to the quote that ends a text


class NoList(ValueError):
    """An answer is something else than a list; `content` is what, where that is JSON."""

    def __init__(self, content: Any):
        super().__init__("it is no list")
        self.content = content


@dataclass(frozen=True)
class Found:
    """An image the server names.

    Attributes:
        identity: tells it from the others.
        url: where it is, empty where only the server has it.
        caption: of printable characters.
        place: first and last byte of its entry in the answer if an image came with it, else None.
    """

    identity: str
    url: str
    caption: str
    place: tuple[int, int] | None


class Answer:
    """A server's list of images in a file; use it as a context.

    Args:
        file: what the server sent.
        most: entries that are read at most.

    Raises:
        NoList: it is JSON of another kind.
        ValueError: it is no JSON, is cut short, or an entry is absurdly large or deep.
    """

    def __init__(self, file: IO[bytes], most: int):
        self._file, self.found = file, []
        for place in islice(_places(file), most):        # what follows them costs no time
            text = self._text(place)
            if text:                                     # else the list is empty
                self.found.append(_found(_entry(text), place))

    def image(self, found: Found) -> bytes | None:
        """Returns the bytes of the image that came with an entry, no bytes if it is unreadable; None without one."""
        if found.place is None:
            return None
        try:
            return base64.b64decode(_entry(self._text(found.place))["image"], validate=True)
        except (binascii.Error, ValueError):
            return b""

    def _text(self, place: tuple[int, int]) -> bytes:
        """Reads one entry, and leaves the file where it was."""
        here = self._file.tell()
        self._file.seek(place[0])
        text = self._file.read(place[1] - place[0]).strip()
        self._file.seek(here)
        return text

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def printable(value: Any, most: int) -> str:
    """Returns a text's first characters on one line, what cannot be shown or written as spaces; no other kind's."""
    if not isinstance(value, str):
        return ""
    shown = [char if char.isprintable() else " " for char in value[:most]]
    return " ".join("".join(shown).split())


def _entry(text: bytes) -> dict[str, Any]:
    entry = json.loads(text)                 # neither large nor deep: the scanner has counted
    if not isinstance(entry, dict):
        raise NoList(None)
    return entry


def _found(entry: dict[str, Any], place: tuple[int, int] | None) -> Found:
    """Takes from an entry what is of use."""
    url, image = entry.get("url"), entry.get("image")
    if not isinstance(url, str) or url != printable(url, URL):
        url = ""                             # shortened or cleaned it would be another address
    identity = url or f"id {printable(str(entry.get('id')), IDENTITY)}"
    if not isinstance(image, str) or not image:
        place = None
    return Found(identity, url, printable(entry.get("caption"), CAPTION), place)


def _places(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Yields where each element of a JSON list begins and ends, first to last byte, as it is read."""
    file.seek(0)
    start = file.read(CHUNK).lstrip()
    if not start.startswith(b"["):
        raise NoList(json.loads(_small(start)))
    file.seek(0)
    scanner = _Scanner()
    while chunk := file.read(CHUNK):
        yield from scanner.feed(chunk)
    scanner.finish()


def _small(content: bytes) -> str:
    """Returns a small text that is not nested deeply."""
    # Counted before it is parsed: what is nested deeply would exhaust the parser's stack.
    if len(content) > MESSAGE or content.count(b"[") + content.count(b"{") > MOST_MARKS:
        raise ValueError("it is larger than a message")
    return content.decode("utf-8")


class _Scanner:
    """Finds the elements of a JSON list in pieces of its text, by its brackets, quotes and commas."""

    def __init__(self) -> None:
        self._passed = self._start = self._depth = self._marks = 0
        self._quoted = self._escaped = self._ended = False

    def feed(self, chunk: bytes) -> Iterator[tuple[int, int]]:
        """Yields the places of the elements that end in the next piece."""
        at = 0
        while (mark := self._next(chunk, at)) is not None:
            at, end, begun = mark + 1, self._passed + mark, self._depth > 0
            if self._closes(chunk[mark:at]):
                if begun:
                    yield self._start, end
                self._start, self._marks = end + 1, 0
        self._passed += len(chunk)
        if self._passed - self._start > LARGEST_ENTRY:
            raise ValueError("an entry is too large")

    def finish(self) -> None:
        """Raises ValueError where the list has not ended."""
        if not self._ended:
            raise ValueError("it is cut short")

    def _next(self, chunk: bytes, at: int) -> int | None:
        """Returns where the next sign is that counts: outside quotes any, within them their end."""
        if not self._quoted:
            mark = _MARKS.search(chunk, at)
            return mark.start() if mark else None
        end = _QUOTED.match(chunk, at + self._escaped).end()
        self._escaped = chunk[end:] == b"\\"             # its second half is in the next piece
        return end if chunk[end:end + 1] == b'"' else None

    def _closes(self, sign: bytes) -> bool:
        """Follows the structure by one sign; says whether an element of the list ends before it."""
        if self._ended:
            raise ValueError("something follows its end")
        self._marks += 1
        if sign == b'"':
            self._quoted = not self._quoted
        elif sign in b"[{":
            self._depth += 1
            if self._depth == 1:
                return True                  # the list itself begins
        elif sign in b"]}":
            self._depth -= 1
            self._ended = self._depth == 0
        if self._marks > MOST_MARKS:
            raise ValueError("an entry is too large")
        return self._ended or (self._depth == 1 and sign == b",")
