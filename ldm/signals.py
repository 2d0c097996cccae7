"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGUSR1, which Slurm can send before a job's time is up."""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupt(KeyboardInterrupt):
    """The process is to end, by signal `number`; the message, if any, says what was saved and how to go on."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status shells expect: 130 after Ctrl-C, 143 after SIGTERM, 138 after Linux's SIGUSR1."""
        return 128 + self.number


class Signals:
    """Raises Interrupt at once, or, while `held`, only remembers the signal's `number` for the next seam of the work.

    Args:
        leave: ends the process, which it owns, while a module is imported: C++ modules abort where an exception
            reaches them as they load, and nothing is written meanwhile. None: Interrupt is raised there too.
    """

    def __init__(self, leave: Callable[[int], object] | None = None) -> None:
        self.number: int | None = None
        self.held = False
        self.leave = leave

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        self.number = number
        if self.held:     # parameters change or files are written; the work asks later
            return
        if self.leave is not None and _importing(frame):
            self.leave(number)
        raise Interrupt(number)

    def install(self) -> None:
        """Answers all ending signals from here on but those that who started the process told it to ignore."""
        _answer({number: self for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN})


def _importing(frame: FrameType | None) -> bool:
    """Says whether a module is being imported where a frame is."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):     # Python's own import machinery
            return True
        frame = frame.f_back
    return False


def _answer(handlers: Mapping[int, Any]) -> None:
    """Sets handlers of signals, which Python allows a process's first thread only."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def heeded(leave: Callable[[int], object] | None = None) -> Iterator[Signals]:
    """Answers ending signals within a block, and leaves it with Interrupt when one came.

    Blocks may be nested; what `leave` (see `Signals`) the outer one has holds in the inner ones.

    Libraries turn an exception that reaches them in the middle of their work into one of their own (reading
    safetensors: ValueError), so whatever error follows a signal counts as its consequence.
    """
    before = {number: signal.getsignal(number) for number in ENDING}     # to put them back, whoever's they are
    outer = [getattr(handler, "leave", None) for handler in before.values()]
    signals = Signals(next(filter(None, [leave, *outer]), None))
    signals.install()
    try:
        yield signals
    except Exception as error:
        if signals.number is None:
            raise
        raise Interrupt(signals.number) from error     # the error is the signal's consequence
    finally:
        _answer(before)
