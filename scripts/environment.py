"""Prints the Python that runs this checkout: this one if it holds what pyproject.toml asks for, else .venv's.

.venv is made from requirements.txt where it is missing and repaired where it is incomplete, with uv where that is on
the PATH, else with pip. This file runs before anything is installed, so it uses the standard library alone.
"""
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = 10           # seconds between two lines that say how far an installation is


@dataclass(frozen=True)
class Environment:
    """What belongs into an environment, and the folder with a Python of its own that is made where there is none."""

    folder: Path
    pins: Path              # the file whose exact versions are installed
    beside: list[str]       # requirements installed with the pins
    ranges: list[str]       # requirements that any environment must meet to be used
    newest: int             # minor version of the last Python 3 that the pins have builds for

    @property
    def python(self) -> Path:
        """The folder's interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(purpose: str) -> Environment:
    """Returns what `run`, `test` or `retrieval` needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if purpose == "retrieval":      # clip-retrieval's numpy and pyarrow have no builds for later Pythons
        return Environment(ROOT / ".venv-retrieval", ROOT / "requirements-retrieval.txt", [], extras["retrieval"], 12)
    beside = extras["test"] if purpose == "test" else []
    return Environment(ROOT / ".venv", ROOT / "requirements.txt", beside, project["dependencies"] + beside, 14)


def obstacle(needed: Environment) -> str | None:
    """Says what keeps the running Python from being used, as a clause after its name; None for nothing."""
    try:                            # packaging is missing only where transformers, which needs it, is missing, too
        from packaging.requirements import Requirement
        for asked in map(Requirement, needed.ranges):
            installed = metadata(asked.name).get("Version") or "0"     # a killed installation may leave it empty
            if not asked.specifier.contains(installed, prereleases=True):
                return f"has {asked.name} {installed}, not {asked.specifier}"
    except ImportError as missing:
        return f"lacks {missing.name}"
    note = needed.folder / ".installed"
    wanted = {*needed.pins.read_text(encoding="utf-8").splitlines(), *needed.beside}
    ours = Path(sys.prefix).resolve() == needed.folder.resolve() and note.exists()
    if ours and not wanted <= set(note.read_text(encoding="utf-8").splitlines()):
        return "is not completely installed"
    return None


def works(*command: object) -> bool:
    """Says whether a command can be run and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def take_turn(folder: Path) -> None:
    """Waits for another run that installs; the turn lasts until this process and an installer it started have ended."""
    lock = os.open(__file__, os.O_RDWR)     # there is none to create; what is only read cannot be locked on NFS
    os.set_inheritable(lock, True)
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for the run that is installing into {folder}.", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):          # Windows, file systems without locks: two at a time are the user's to avoid
        pass


def make(needed: Environment, uv: str | None) -> None:
    """Makes the folder afresh, with the running Python unless that is too new for the pins."""
    names = [getattr(sys, "_base_executable", sys.executable)]
    if sys.version_info[:2] > (3, needed.newest):
        names = [f"python3.{minor}" for minor in range(needed.newest, 10, -1)]
    base = next((name for name in names if works(name, "-c", "")), None)
    folder = needed.folder.resolve()        # a link to another disk stays one
    command = [base, "-I", "-m", "venv", folder]
    if uv:                          # --seed: with a pip, so that `pip install` in the folder goes into the folder
        base = base or f">=3.11,<3.{needed.newest + 1}"
        command = [uv, "venv", "--quiet", "--allow-existing", "--seed", "--python", base, folder]
    if base:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / ".installed").touch()     # first of all: what is cut short from here on is made afresh
    if not base or subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, close_fds=False).returncode:
        sys.exit(f"{needed.folder} cannot be made: that takes a Python 3.11 to 3.{needed.newest} with its venv module, "
                 "or uv, which brings one, and a connection.")


def install(needed: Environment) -> None:
    """Fills the folder with the pins and what goes beside them, over what is there unless that was cut short."""
    uv = shutil.which("uv")
    note, log = needed.folder / ".installed", needed.folder / "install.log"
    before = note.read_text(encoding="utf-8") if note.exists() else ""
    cut_short = note.exists() and not before
    earlier = any(needed.folder.glob(".installed-*"))       # notes of the first version: clip-retrieval is in there
    if cut_short or earlier or not works(needed.python, "-c", ""):
        make(needed, uv)
    what = ["-r", needed.pins, *needed.beside]
    attempts = [[needed.python, "-I", "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *what]]
    if uv:
        attempts = [[uv, "pip", "install", "--python", needed.python, *what]]
        if "UV_TORCH_BACKEND" not in os.environ:    # the builds for this machine, if PyTorch's own index can be reached
            attempts.insert(0, [*attempts[0], "--torch-backend", "auto"])
    note.write_text("")             # until all is there, so that a killed installation is known by it
    if not any(watch(command, log) for command in attempts):
        note.write_text(before, encoding="utf-8")
        sys.exit(f"{last_lines(log, 3)}\nThe installation stopped; {log} says more, and the next run takes it up.")
    note.write_text("\n".join([needed.pins.read_text(encoding="utf-8"), *needed.beside]), encoding="utf-8")


def watch(command: Sequence[object], log: Path) -> bool:
    """Runs an installer and says now and then what it is at; returns whether it succeeded."""
    start = time.monotonic()
    with log.open("wb") as file:    # close_fds: the installer has its turn even where this process is killed
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, close_fds=False)
        while process.poll() is None:
            try:
                process.wait(TICK)
            except subprocess.TimeoutExpired:
                print(f"  {time.monotonic() - start:3.0f} s: {last_lines(log, 1)[:100]}", file=sys.stderr, flush=True)
    return process.returncode == 0


def last_lines(log: Path, count: int) -> str:
    """Returns the last lines of a log that are not blank, none longer than can be read."""
    lines = filter(str.strip, log.read_text(encoding="utf-8", errors="replace").splitlines())
    return "\n".join(line.strip()[:300] for line in list(lines)[-count:])


def main() -> int:
    """Prints the interpreter's path and returns 0; with --check prints what is wrong with this one and returns 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("purpose", nargs="?", default="run", choices=("run", "test", "retrieval"))
    parser.add_argument("--check", action="store_true", help="look at this Python only, and install nothing")
    options = parser.parse_args()
    needed = environment(options.purpose)
    why = obstacle(needed)
    if options.check or why is None:
        print(why or sys.executable)
        return int(why is not None)
    check = (needed.python, __file__, "--check", options.purpose)
    if not works(*check):
        take_turn(needed.folder)
        if not works(*check):           # another run may have done it
            print(f"Installing {needed.pins.name} into {needed.folder}, because {sys.executable} {why}: up to 6 GB and "
                  "a few minutes the first time.", file=sys.stderr, flush=True)
            install(needed)
    elif os.environ.get("PYTHON"):
        print(f"Using {needed.folder}, because {sys.executable} {why}.", file=sys.stderr)
    print(needed.python)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nThe installation was stopped; the next run takes it up again.")
