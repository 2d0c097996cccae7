"""What campaigns share: numbered cases that a seed makes, scripts run in bounded time, counts, repeatable failures."""
from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from random import Random

from conftest import SCRIPTS

from ldm import cli


class Hang(BaseException):
    """A script took longer than it may; no `except Exception` of its own swallows this."""


@dataclass(frozen=True)
class Ended:
    """How a script ended: its status, what it wrote, and the trace of what no script may end by ("" for none)."""

    status: int | None
    out: str
    err: str
    fault: str

    @property
    def text(self) -> str:
        return self.out + self.err


class Campaign:
    """Cases by number, and what became of them.

    Attributes:
        folder: where everything is made.
        slack: seconds that a busy machine may add to a limit.
    """

    def __init__(self, kind: str, folder: str | Path, seed: int = 0, count: int = 0, only: int | None = None,
                 slack: float = 3.0):
        self.kind, self.folder, self.seed, self.count, self.only = kind, Path(folder), seed, count, only
        self.slack, self.counts, self.failures, self.index = slack, Counter(), [], 0

    def cases(self) -> Iterator[tuple[int, Random, Path]]:
        """Yields the number of each case, its own source of chance, and an empty folder."""
        for index in range(self.count) if self.only is None else [self.only]:
            self.index = index
            self._place().write_text(self.command())
            folder = self.folder / f"case-{index}"
            folder.mkdir()
            yield index, Random(f"{self.kind} {self.seed} {index}"), folder

    def command(self) -> str:
        """Returns what repeats the case at hand."""
        return f"bash tests/soak.sh {self.kind} --seed {self.seed} --only {self.index}"

    def current(self) -> str:
        """Returns the case that another process of this campaign is at."""
        return self._place().read_text() if self._place().exists() else "no case yet"

    def _place(self) -> Path:
        return self.folder / "current"

    def count_as(self, outcome: str) -> None:
        self.counts[outcome] += 1

    def fail(self, why: str) -> None:
        """Notes that the case at hand failed."""
        self.count_as("FAILED")
        self.failures.append(f"{self.command()}\n    {why.strip()}")
        print(self.failures[-1], file=sys.stderr, flush=True)

    def tell(self) -> None:
        """Prints the line of counts and every failure."""
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        print(f"{self.kind}: {sum(self.counts.values())} cases (seed {self.seed}): {counts}")
        for failure in self.failures:
            print(f"FAILED {failure}")


def call(script: str, *arguments: object, limit: float = 60) -> Ended:
    """Runs a script in this process, as its command line would, for `limit` seconds at most."""
    module = importlib.util.module_from_spec(SCRIPTS[script])
    SCRIPTS[script].loader.exec_module(module)
    streams = [TextIOWrapper(BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    before = sys.argv, sys.stdout, sys.stderr, warnings.formatwarning, signal.signal(signal.SIGALRM, _ring)
    sys.argv, sys.stdout, sys.stderr = [f"{script}.py", *map(os.fspath, map(_spelled, arguments))], *streams
    status, fault = None, ""
    try:
        signal.setitimer(signal.ITIMER_REAL, limit, 1.0)        # again each second: a callback may swallow one
        with warnings.catch_warnings():
            cli.run(module.main)
    except SystemExit as end:
        status = end.code
    except Hang:
        fault = f"hang: more than {limit:g} s\n{traceback.format_exc()}"
    except BaseException:
        fault = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.argv, sys.stdout, sys.stderr, warnings.formatwarning, handler = before
        signal.signal(signal.SIGALRM, handler)
    out, err = (stream.buffer.getvalue().decode("utf-8", errors="replace") for stream in streams)
    return Ended(status, out, err, fault)


def _spelled(argument: object) -> str:
    return argument if isinstance(argument, str) else str(argument)


def _ring(*_: object) -> None:
    raise Hang


def why_bad(ended: Ended) -> str | None:
    """Says what no command line may do: end by a fault, refuse without a sentence, or hang."""
    if ended.fault:
        return brief(ended.fault)
    if ended.status not in (0, 1, 2):
        return f"exit status {ended.status}: {ended.err[-300:]}"
    sentences = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.status and len(sentences) != 1:
        return f"{len(sentences)} sentences: {ended.err[-300:]}"
    return None


def brief(trace: str) -> str:
    """Returns a trace's last places in this repository, and its error."""
    lines = trace.strip().splitlines()
    places = [re.sub(r'File ".*?/((?:ldm|scripts)/)', r'File "\1', line.strip()) for line in lines if "/ldm/" in line]
    error = next(line for line in reversed(lines) if not line.startswith(" "))      # some end with further lines
    return " | ".join([*places[-3:], error[:300]])
