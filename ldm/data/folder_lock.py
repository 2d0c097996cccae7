"""Lets one process at a time work in a folder; the others wait, and say so."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.files import make_folder

LOCK = ".lock"


@contextmanager
def turn_in(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Waits until no other process is at work in a folder, and keeps the others out while the context lasts.

    Where nothing can be locked (a folder that may only be read, a file system without locks) nobody waits.
    """
    lock = FileLock(folder / LOCK)     # released with the process, however it ends
    try:
        make_folder(folder)
        _take(lock, folder, say)
    except (OSError, NotImplementedError):       # what cannot be written either is told by who tries
        pass
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock, folder: Path, say: Callable[[str], None]) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another run that works in '{folder}'")
        lock.acquire()
