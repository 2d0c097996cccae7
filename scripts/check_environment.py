"""Says whether the Python that runs this file holds what the checkout needs, from package metadata alone.

It runs before anything is installed, so it uses the standard library, and imports no package it asks about.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  older ones have no tomllib to read pyproject.toml with
    print("is Python " + ".".join(map(str, sys.version_info[:2])))
    sys.exit(1)

import argparse  # noqa: E402
import hashlib  # noqa: E402
import tomllib  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def core_requirements() -> list[str]:
    """Returns the requirements of pyproject.toml that every command has."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def extra_requirements(extra: str) -> list[str]:
    """Returns the requirements of pyproject.toml's optional group `extra`; none for the empty name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][extra] if extra else []


def stamp(extra: str) -> str:
    """Names the file that .venv holds once these very pins and extras are installed in it."""
    pins = "\0".join([(ROOT / "requirements.txt").read_text(encoding="utf-8"), *extra_requirements(extra)])
    return f".installed-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"


def unmet(requirement: str) -> str | None:
    """Says how the installed version misses `requirement`, as a clause; None where it is met."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # a fresh .venv has pip's copy only
        from pip._vendor.packaging.requirements import Requirement
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return None
    try:
        installed = version(wanted.name)
    except (PackageNotFoundError, KeyError):  # KeyError: metadata that an interrupted installation left empty
        installed = None
    if installed is None:
        return f"lacks {wanted.name}"
    met = wanted.specifier.contains(installed, prereleases=True)
    return None if met else f"has {wanted.name} {installed}, not {wanted.specifier}"


def stamp_obstacle(extra: str) -> str | None:
    """Says what the stamps of the repository's own .venv object to, as a clause; None elsewhere or for nothing."""
    own = ROOT / ".venv"
    if Path(sys.prefix).resolve() != own.resolve():
        return None
    stamps = {path.name for path in own.glob(".installed-*")}
    # Without any stamp it was made by hand: then what it holds counts, not how that came there.
    return "is not completely installed" if stamps and stamp(extra) not in stamps else None


def obstacle(extra: str) -> str | None:
    """Says what keeps this Python from running the checkout, as a clause after its name; None for nothing."""
    try:
        missing = next(filter(None, map(unmet, core_requirements() + extra_requirements(extra))), None)
    except ImportError:  # transformers needs packaging, so it is not here either
        missing = "lacks packaging"
    if missing is not None:
        return missing
    found = find_spec("ldm")  # as every script finds it: this file's own folder is scripts/
    ours = found is not None and found.origin is not None and Path(found.origin).resolve().is_relative_to(ROOT)
    return stamp_obstacle(extra) if ours else "does not find this checkout's ldm"


def main() -> int:
    """Prints the interpreter's path and returns 0, or prints the obstacle and returns 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", default="", help="optional group of pyproject.toml to ask for as well")
    parser.add_argument("--show", choices=("requirements", "stamp"),
                        help="print the extra's requirements, or the stamp's name, and check nothing")
    args = parser.parse_args()
    if args.show is not None:
        print(*([stamp(args.extra)] if args.show == "stamp" else extra_requirements(args.extra)), sep="\n")
        return 0
    found = obstacle(args.extra)
    print(sys.executable if found is None else found)
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main())
