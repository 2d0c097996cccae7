"""Small helpers every room uses: build objects named in YAML, defaults, paths and names, the one user-facing error."""
from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("configs", "ldm", "real_reg")      # the repository's folders whose files a user may name from anywhere
TARGETS = ("ldm.models", "ldm.modules", "ldm.lr_scheduler", "torch.nn")     # packages whose classes YAML may name
ALLOWED = "DCI_ICO_ALLOW_TARGET"     # environment variable of further ones, which the processes we start have too
NAME_BYTES = 120       # of a folder's name; file systems take 255, and time and number are added


class UserError(Exception):
    """An error the user can fix; its message is one sentence: what, where, what to do."""


def exists(value: object) -> bool:
    """Says whether `value` is anything but None."""
    return value is not None


def default(value: T | None, fallback: T) -> T:
    """Returns `value`, or `fallback` where it is None."""
    return value if value is not None else fallback


def shipped(path: str | os.PathLike[str]) -> Path:
    """Finds a file or folder: where the user stands, else, if it ships with the repository, there.

    What is in neither place comes back as it was given, so that a message names what was typed.
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] not in [(name,) for name in SHIPPED]:
        return path
    return ROOT / path if (ROOT / path).exists() else path


def from_here(name: str) -> str:
    """Names a file of the repository as a command line has to, from where the user stands."""
    return name if Path.cwd() == ROOT else shlex.quote(str(ROOT / name))


def folder_name(text: str, fallback: str = "class") -> str:
    """Makes one folder's name of any text: letters, digits, hyphens and underscores, of a length all disks take."""
    name = re.sub(r"[^\w-]+", "_", text).encode()[:NAME_BYTES].decode(errors="ignore")
    return name.strip("_") or fallback


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Imports the object behind a dotted name such as `ldm.models.autoencoder.AutoencoderKL`."""
    module_name, _, name = string.rpartition(".")
    if not module_name:
        raise UserError(f"target '{string}' is not a dotted name; write it as package.module.Class.")
    try:
        module = importlib.import_module(module_name)
        if reload:
            module = importlib.reload(module)
        return getattr(module, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"target '{string}' cannot be imported ({error}).") from error


def allow_targets(names: Iterable[str]) -> None:
    """Lets configurations name classes of one's own, by their dotted names or those of their packages."""
    os.environ[ALLOWED] = " ".join([os.environ.get(ALLOWED, ""), *names]).strip()


def _may_be_called(name: str) -> bool:
    """Says whether a dotted name lies in a package that configurations may use."""
    return any(name == package or name.startswith(f"{package}.")
               for package in (*TARGETS, *os.environ.get(ALLOWED, "").split()))


def instantiate_from_config(config: Mapping[str, Any]) -> Any:
    """Builds the object a `{target: dotted.Name, params: {...}}` node describes.

    A configuration may come from strangers, and calling anything it names would be running their code: the name is
    looked at before its module is imported, and what it leads to must be a class of such a package itself.

    Raises:
        KeyError: the node has no `target` (as CompVis's function does).
        UserError: the target is none of our classes or PyTorch's modules, nor allowed by `allow_targets`.
    """
    if "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    name = config["target"]
    found = get_obj_from_str(name) if isinstance(name, str) and _may_be_called(name) else None
    if not (isinstance(found, type) and _may_be_called(f"{found.__module__}.{found.__qualname__}")):
        raise UserError(f"target '{name}' is none of this project's classes or PyTorch's modules; if it is yours, "
                        "allow it by name with --allow_target.")
    return found(**(config.get("params") or {}))
