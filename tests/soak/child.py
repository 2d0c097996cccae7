"""Scripts in forked children, which have everything imported already and can be killed, cut off or interrupted."""
from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import SCRIPTS

import ldm.evaluation.evaluate  # noqa: F401  imported once, before any child is made
import ldm.evaluation.scoring  # noqa: F401
import ldm.training.run  # noqa: F401
from ldm import cli
from soak.world import World

PATIENCE = 120      # seconds after which a child hangs


@dataclass
class Child:
    """A script in a process of its own, whose output goes to files."""

    process: int
    folder: Path
    status: int | None = None

    def send(self, number: int) -> None:
        if self.status is None:
            os.kill(self.process, number)

    def ended(self, seconds: float) -> bool:
        """Waits for the end; says whether it came in time, and sets `status` (minus the signal that killed it)."""
        end = time.monotonic() + seconds
        while self.status is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.005)
        return True

    def wait(self) -> None:
        """Waits for the end; a child that hangs is killed, and its status is 71."""
        if not self.ended(PATIENCE):
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.status = 71

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")


def made_elsewhere(folder: Path) -> World:
    """Makes a world in a child: whoever has computed has threads, and forks no more."""
    world = World(folder)
    if not (process := os.fork()):
        os._exit(0 if world.metrics and world.concept.exists() else 1)
    os.waitpid(process, 0)
    return world


def start(folder: Path, script: str, *arguments: object, prepare: Callable[[], object] | None = None) -> Child:
    """Starts a script whose output goes to `folder`; `prepare` runs before it, in the child."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return Child(process, folder)
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = [f"{script}.py", *map(str, arguments)]
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        module = importlib.util.module_from_spec(SCRIPTS[script])
        SCRIPTS[script].loader.exec_module(module)
        if prepare:
            prepare()
        cli.run(module.main)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
