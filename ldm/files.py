"""The one writer of files: whole or not at all, on the disk before they are announced, never over what is not ours."""
from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from ldm.util import UserError

DAMAGED = ".damaged"            # what a file that is set aside has at the end of its name
RECORD = ".made-by-dci-ico"     # in a folder of results: the names that this program has given there, one a line

_host = re.sub(r"[^\w-]", "_", socket.gethostname())[:40]      # other machines may write to the same disk
_cleared: set[Path] = set()                                    # folders this process has cleared of parts


class NameTaken(Exception):
    """A file that must be new has a name that is taken."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object], new: bool = False) -> Path:
    """Lets `write` fill a temporary file beside `path`, puts it on the disk, then gives it its name.

    A failure, a kill or a power cut leaves what was there before, or the whole file. What processes of this machine
    were killed over in that folder is cleared away.

    Args:
        new: takes a free name only; of several processes that want the same one, one gets it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
        NameTaken: the name is not free, though the file must be new.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{_host}.{os.getpid()}.part")
    try:
        make_folder(path.parent)
        _clear_parts(path.parent)
        write(part)
        part.chmod(0o666 & ~_umask())          # some writers make files only their owner can read
        _sync(part)
        (_take_name if new else os.replace)(part, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_write_failure(error):
            raise
        raise UserError(f"'{path}' could not be written ({error}); free some space or choose another folder; "
                        "earlier files are intact.") from error
    finally:
        with suppress(OSError):          # nothing there, or no folder; the error above is the one to tell
            part.unlink()
    return path


def write_text(path: str | os.PathLike[str], text: str, new: bool = False) -> Path:
    """Writes a UTF-8 text atomically; bytes of names that are no UTF-8 become escapes.

    Raises:
        UserError, NameTaken: as `write_atomically` does.
    """
    content = text.encode("utf-8", errors="backslashreplace")
    return write_atomically(path, lambda part: part.write_bytes(content), new)


def _take_name(part: Path, path: Path) -> None:
    """Gives a file a name that nobody has."""
    try:
        os.link(part, path)
    except FileExistsError as error:
        raise NameTaken(str(path)) from error
    except OSError:                            # a file system without links
        try:
            path.open("xb").close()
        except FileExistsError as error:
            raise NameTaken(str(path)) from error
        os.replace(part, path)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, so that they outlast a power cut as what is written there does."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def take_folder(folder: Path) -> Path:
    """Makes a folder of a name that nobody has.

    Raises:
        NameTaken: the name is not free.
        OSError: the disk refuses.
    """
    make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise NameTaken(str(folder)) from error
    _sync_folder(folder.parent)     # the name itself must be on the disk
    return folder


def append_durably(path: Path, text: str) -> None:
    """Appends text to a file and waits until it is on the disk.

    Raises:
        OSError: the disk refuses.
    """
    make_folder(path.parent)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Waits until a folder's names are on the disk; Windows cannot be asked to, and some network disks refuse."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_parts(folder: Path) -> None:
    """Removes, once per process, the temporary files of processes of this machine that are no more."""
    if folder in _cleared or os.name == "nt":
        return
    _cleared.add(folder)
    for part in folder.glob(f".*.{_host}.*.part"):
        number = part.name.split(".")[-2]     # process that was writing it
        if number.isdecimal() and not _lives(int(number)):
            part.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Says whether a process of this machine is still there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:      # somebody else's
        return True
    return True


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_write_failure(error: RuntimeError) -> bool:
    """Says whether torch's zip writer failed for want of space (it raises RuntimeError, not OSError)."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "No space", "enforce fail", "iostream"))


def set_aside(path: Path, why: str) -> Path:
    """Renames a damaged file or folder, says so, and returns where it is now: what it held is to be made again.

    Args:
        why: what is wrong with it, worded to follow its name.
    """
    place, count = path.with_name(path.name + DAMAGED), 1
    while place.exists():
        place, count = path.with_name(f"{path.name}-{count}{DAMAGED}"), count + 1
    path.rename(place)
    print(f"warning: '{path}' {why}; it is kept as '{place.name}' and made again.", flush=True)
    return place


def claim_results(folder: Path, names: Sequence[str], known: bool = False) -> None:
    """Notes that files of these names are written to a folder of results, where they replace earlier ones of ours.

    Args:
        known: what is there is known to be ours, though no note of it was made, as by earlier versions.

    Raises:
        UserError: one of them is there and was not made here, or the folder cannot be written.
    """
    record = folder / RECORD
    try:
        ours = set(record.read_text(encoding="utf-8", errors="replace").split("\n")) if record.is_file() else set()
        foreign = [name for name in names if name not in ours and not known and (folder / name).exists()]
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be used ({error.strerror}); choose another.") from error
    if foreign:
        raise UserError(f"'{folder}' holds '{foreign[0]}', which was not made here and would be replaced; choose "
                        "another folder.")
    if not ours.issuperset(names):
        write_text(record, "".join(f"{name}\n" for name in sorted({*ours, *names} - {""})))
