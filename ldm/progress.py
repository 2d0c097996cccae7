"""Progress bars, all made in one place: a line that moves on a terminal, a line a minute in a file."""
from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm

LOG_INTERVAL = 60.0     # seconds between lines where nobody watches


class _Lines:
    """Passes what a bar writes over itself on as lines of their own."""

    def __init__(self, stream: TextIO):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:      # a bar that ends says again what it said
            self.stream.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        self.stream.flush()


def progress(items: Iterable | None = None, *, desc: str, unit: str, total: float | None = None, initial: int = 0,
             quiet: bool = False, form: str | None = None) -> tqdm:
    """Makes a bar on stderr, which counts `items` or what its `update` is told.

    Args:
        total: how many there are, where `items` do not say it.
        initial: how many were done before.
        quiet: show nothing.
        form: tqdm's bar_format, where its own does not fit.
    """
    # Position 0: a bar within another takes its line meanwhile, instead of one below it.
    settings = {"desc": desc, "unit": unit, "total": total, "initial": initial, "disable": quiet, "bar_format": form,
                "position": 0}
    if sys.stderr.isatty():
        return tqdm(items, **settings)
    # With `miniters` given, tqdm's watching thread adds no lines of its own.
    return tqdm(items, file=_Lines(sys.stderr), mininterval=LOG_INTERVAL, miniters=0, **settings)
