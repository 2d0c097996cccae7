"""Prints the Python that runs this checkout: this one if it holds what pyproject.toml asks for, else .venv's.

.venv is made from requirements.txt where it is missing and mended where it is incomplete: with uv where that is on the
PATH, else with pip. This file runs before anything is installed, so it uses the standard library alone.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = 20           # seconds between two lines that say how far an installation is, where there is no terminal


@dataclass(frozen=True)
class Environment:
    """What belongs into an environment, and the folder with a Python of its own that is made where there is none.

    Attributes:
        folder: the virtual environment.
        pins: the file whose exact versions are installed.
        beside: requirements installed with the pins.
        ranges: requirements that any environment must meet to be used.
        newest: Python the pins have builds for.
    """

    folder: Path
    pins: Path
    beside: list[str]
    ranges: list[str]
    newest: tuple[int, int]

    @property
    def python(self) -> Path:
        """The folder's interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def note(self) -> Path:
        """The file that lists what was installed into the folder; empty until all is."""
        return self.folder / ".installed"

    @property
    def log(self) -> Path:
        """What the last installer said."""
        return self.folder / "install.log"

    @property
    def wanted(self) -> list[str]:
        """What the note must list."""
        return [*self.pins.read_text(encoding="utf-8").splitlines(), *self.beside]


def environment(purpose: str) -> Environment:
    """Returns what `run`, `test` or `retrieval` needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if purpose == "retrieval":      # clip-retrieval's numpy and pyarrow have no builds for later Pythons
        return Environment(ROOT / ".venv-retrieval", ROOT / "requirements-retrieval.txt", [], extras["retrieval"],
                           (3, 12))
    beside = extras["test"] if purpose == "test" else []
    return Environment(ROOT / ".venv", ROOT / "requirements.txt", beside, project["dependencies"] + beside, (3, 99))


def unmet(requirement: str) -> str | None:
    """Says how the running Python misses `requirement`, as a clause; None where it is met."""
    name = re.match(r"[\w.-]+", requirement)[0]
    try:
        installed = version(name)
    except (PackageNotFoundError, KeyError):      # KeyError: metadata that an interrupted installation left empty
        return f"lacks {name}"
    try:
        from packaging.requirements import Requirement
    except ImportError:             # transformers needs packaging, so it is not here either
        return "lacks packaging"
    wanted = Requirement(requirement)
    met = installed is not None and wanted.specifier.contains(installed, prereleases=True)
    return None if met else f"has {name} {installed}, not {wanted.specifier}"


def obstacle(needed: Environment) -> str | None:
    """Says what keeps the running Python from being used, as a clause after its name; None for nothing."""
    missing = next(filter(None, map(unmet, needed.ranges)), None)
    ours = Path(sys.prefix).resolve() == needed.folder.resolve() and needed.note.exists()
    if missing is None and ours and not set(needed.wanted) <= set(needed.note.read_text("utf-8").splitlines()):
        return "is not completely installed"
    return missing


def works(*command: object) -> bool:
    """Says whether a command can be run and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[tuple[int, ...]]:
    """Waits for another run that installs; yields the lock, which the installer keeps should this process be killed."""
    try:
        import fcntl
    except ImportError:             # Windows: two installations at a time are the user's to avoid
        yield ()
        return
    with open(__file__) as lock:    # this very file, so that there is none to create or to leave behind
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"Waiting for the run that is installing into {folder}.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield (lock.fileno(),)


def base_python(newest: tuple[int, int], uv: str | None) -> str:
    """Returns the Python to make a folder with; a range of versions lets uv find one, or bring it."""
    if sys.version_info[:2] <= newest:
        return getattr(sys, "_base_executable", sys.executable)
    if uv:
        return f">=3.11,<3.{newest[1] + 1}"
    names = [f"python3.{minor}" for minor in range(newest[1], 10, -1)]
    found = next((name for name in names if works(name, "-c", "")), None)
    if found is None:
        sys.exit(f"Python 3.11 to 3.{newest[1]} is needed for this, but there is no {' or '.join(names)} on the PATH; "
                 "install one, or uv, which brings one.")
    return found


def make(needed: Environment, uv: str | None, lock: Sequence[int]) -> None:
    """Makes the folder afresh where its Python does not run or an installation into it was cut short."""
    begun = needed.note.exists() and not needed.note.read_bytes()
    earlier = any(needed.folder.glob(".installed-*"))   # notes of this script's first version: clip-retrieval is in it
    if not begun and not earlier and works(needed.python, "-c", ""):
        return
    base = base_python(needed.newest, uv)
    shutil.rmtree(needed.folder, ignore_errors=True)
    needed.folder.mkdir(exist_ok=True)
    needed.note.touch()             # first of all: what is cut short from here on is made afresh
    command = [base, "-I", "-m", "venv", needed.folder]
    if uv:                          # --seed: with a pip, so that `pip install` in the folder goes into the folder
        command = [uv, "venv", "--allow-existing", "--seed", "--python", base, needed.folder]
    if not watch(command, needed.log, lock):
        sys.exit(f"{last_lines(needed.log, 3)}\n{base} cannot make {needed.folder}; without uv it needs the venv "
                 "module (Debian: apt install python3-venv).")


def install(needed: Environment, lock: Sequence[int]) -> None:
    """Fills the folder with the pins and what goes beside them."""
    uv = shutil.which("uv")
    make(needed, uv, lock)
    before = needed.note.read_bytes() if needed.note.exists() else b"\n"
    needed.note.write_bytes(b"")    # until all is there, so that a killed installation is known by it
    what = ["-r", needed.pins, *needed.beside]
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    attempts = [[needed.python, "-I", "-m", "pip", "install", *quiet, *what]]
    if uv:
        attempts = [[uv, "pip", "install", "--python", needed.python, *what]]
        if "UV_TORCH_BACKEND" not in os.environ:    # the builds for this machine, if PyTorch's own index can be reached
            attempts.insert(0, [*attempts[0], "--torch-backend", "auto"])
    if not any(watch(command, needed.log, lock) for command in attempts):
        needed.note.write_bytes(before)
        sys.exit(f"{last_lines(needed.log, 3)}\nThe installation stopped; {needed.log} says more, and the next run "
                 "takes it up again.")
    needed.note.write_text("\n".join(needed.wanted) + "\n", encoding="utf-8")


def watch(command: Sequence[object], log: Path, lock: Sequence[int]) -> bool:
    """Runs an installer and says now and then what it is at; returns whether it succeeded."""
    start, terminal = time.monotonic(), sys.stderr.isatty()
    head, tail = ("\r\033[K", "") if terminal else ("", "\n")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=lock)
        while process.poll() is None:
            try:
                process.wait(1 if terminal else TICK)
            except subprocess.TimeoutExpired:
                done = [*log.parent.glob("lib/*/site-packages/*.dist-info"),
                        *log.parent.glob("Lib/site-packages/*.dist-info")]
                now = f"  {time.monotonic() - start:3.0f} s, {len(done)} packages; {last_lines(log, 1)[:90]}"
                print(f"{head}{now}", end=tail, file=sys.stderr, flush=True)
    print(head, end="", file=sys.stderr)
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
        with one_at_a_time(needed.folder) as lock:
            if not works(*check):       # another run may have done it
                print(f"Installing {needed.pins.name} into {needed.folder}, because {sys.executable} {why}: up to 6 GB "
                      "and a few minutes the first time.", file=sys.stderr, flush=True)
                install(needed, lock)
    elif os.environ.get("PYTHON"):
        print(f"Using {needed.folder}, because {sys.executable} {why}.", file=sys.stderr)
    print(needed.python)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nThe installation was stopped; the next run takes it up again.")
