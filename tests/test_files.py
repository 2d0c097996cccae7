"""Tests of writing files: whole or not at all, on the disk first, never over what is not ours."""
from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm import files
from ldm.files import NameTaken, append_durably, claim_results, set_aside, write_atomically, write_text
from ldm.util import UserError


@pytest.mark.parametrize("failure", [
    OSError(28, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
], ids=["os", "enforce", "writer"])
def test_a_failed_write_leaves_the_earlier_file(tmp_path, failure):
    def write(part: Path) -> None:
        part.write_bytes(b"half of the")
        raise failure

    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="could not be written .*earlier files are intact"):
        write_atomically(path, write)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("sizes do not match"), ValueError("no")],
                         ids=repr)
def test_what_is_no_failure_to_write_is_passed_on(tmp_path, failure):
    def write(part: Path) -> None:
        part.write_bytes(b"half of the")
        raise failure

    with pytest.raises(type(failure)) as caught:
        write_atomically(tmp_path / "new", write)
    assert caught.value is failure and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_a_real_limit_on_file_size_is_a_sentence(tmp_path, kind):
    """The operating system stops the writers themselves halfway."""
    resource = pytest.importorskip("resource")
    large = {"large": torch.zeros(100_000)}
    writers = {"torch": lambda part: torch.save(large, part), "safetensors": lambda part: save_file(large, part),
               "text": lambda part: part.write_text("x" * 400_000)}
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            write_atomically(path, writers[kind])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="could not be written"):
        write_atomically(tmp_path / "file" / "below.txt", lambda part: part.write_text("text"))


# --- on the disk first --------------------------------------------------------------------------------------------

def test_content_and_name_are_on_the_disk_before_the_write_returns(tmp_path, monkeypatch):
    """After a power cut a renamed file whose content was never written out is all zeros."""
    told = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        told.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removesuffix(".part")[:6]))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (told.append(("rename", paths[1].name)), replace(*paths)))
    write_text(tmp_path / "new" / "a.txt", "text")
    assert told == [("fsync", tmp_path.name[:6]), ("fsync", ".a.txt"), ("rename", "a.txt"), ("fsync", "new")]
    told.clear()
    append_durably(tmp_path / "new" / "log", "line\n")
    assert told == [("fsync", "log")] and (tmp_path / "new" / "log").read_text() == "line\n"


def test_parts_of_processes_that_are_no_more_are_cleared(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True,
                          check=True).stdout.strip()
    host = files._host
    names = [f".a.{host}.{gone}.part", f".a.{host}.{os.getppid()}.part", f".a.elsewhere.{gone}.part", "mine.part",
             f".a.{host}.x.part"]
    for name in names:
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "b.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "b.txt"])


# --- names --------------------------------------------------------------------------------------------------------

def claim_first_free(folder: str, count: int) -> list[str]:
    got = []
    for number in range(10_000):
        if len(got) < count:
            try:
                got.append(write_text(Path(folder) / f"{number:04d}", str(os.getpid()), new=True).name)
            except NameTaken:
                pass
    return got


def test_a_new_file_never_takes_another_ones_name(tmp_path):
    write_text(tmp_path / "0000", "mine")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        got = pool.starmap(claim_first_free, [(str(tmp_path), 25)] * 4)
    assert sorted(sum(got, [])) == [f"{number:04d}" for number in range(1, 101)]
    assert (tmp_path / "0000").read_text() == "mine" and len(list(tmp_path.iterdir())) == 101


def test_a_new_file_on_a_disk_without_links(tmp_path, monkeypatch):
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert write_text(tmp_path / "a", "first", new=True).read_text() == "first"
    with pytest.raises(NameTaken):
        write_text(tmp_path / "a", "second", new=True)
    assert (tmp_path / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_text_with_a_name_that_is_no_utf8(tmp_path):
    assert write_text(tmp_path / "a", "caf\udce9 ☃").read_text("utf-8") == "caf\\udce9 ☃"


# --- what is damaged, and what is not ours ------------------------------------------------------------------------

def test_what_is_set_aside_is_kept(tmp_path, capsys):
    for content in ("one", "two"):
        (tmp_path / "a.png").write_text(content)
        set_aside(tmp_path / "a.png", "is damaged")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.png.damaged": "one", "a.png-1.damaged": "two"}
    assert "a.png' is damaged; it is kept as 'a.png.damaged' and made again" in capsys.readouterr().out


def test_results_replace_ours_and_nothing_else(tmp_path):
    (tmp_path / "sheet.png").write_text("a user's")
    with pytest.raises(UserError, match="holds 'sheet.png', which was not made here"):
        claim_results(tmp_path, ["rows.csv", "sheet.png"])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    claim_results(tmp_path, ["rows.csv"])
    (tmp_path / "rows.csv").write_text("ours")
    claim_results(tmp_path, ["rows.csv", "table.md"])
    assert (tmp_path / files.RECORD).read_text() == "rows.csv\ntable.md\n"
