"""Tests that retrieval and drawing take, replace and remove nothing they did not make, and repair what they did."""
from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Call, contents
from filelock import FileLock
from PIL import Image
from retrieval import image_store
from retrieval.client import Query
from retrieval.download import Downloader
from retrieval.image_set import Retrieved, retrieve
from retrieval.image_store import ImageStore
from web import Web, image_bytes

from ldm.data.images import Unusable
from ldm.util import UserError

FETCHER = Downloader(timeout=2, limit=3, retries=0, allow_private=True)
SET, LISTS = "cat", ("images.txt", "caption.txt", "urls.txt")


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as web:
        yield web


def collect(folder: Path, web: Web, num: int, say=lambda line: None) -> Retrieved:
    return retrieve(folder, Query("cat", num, web.url), FETCHER, workers=3, say=say)


def visible(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith(".")}


# ---- what others put there


def test_a_folder_of_the_users_images_is_left_as_it_is(web: Web, tmp_path: Path, call_script: Call) -> None:
    """With images, with a list, or with a link to images; a server is not even asked."""
    for name in ("pictures", "list", "link", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "cat").mkdir()
    for number in range(3):
        for folder in (tmp_path / "pictures" / "cat", tmp_path / "elsewhere"):
            (folder / f"{number:05d}.jpg").write_bytes(image_bytes(number))
    (tmp_path / "list" / "caption.txt").write_text("mine\n")
    (tmp_path / "link" / "cat").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    for name in ("pictures", "list", "link"):
        outcome = call_script("retrieve", "--class_noun", "cat", "--url", web.url, "--out", tmp_path / name)
        assert "holds a set that was not retrieved" in outcome.error
    assert contents(tmp_path) == before and not web.questions


def test_a_users_file_on_a_candidates_name_stays(web: Web, tmp_path: Path) -> None:
    web.offer(8)
    collect(tmp_path, web, 2)
    (tmp_path / SET / "00003.jpg").write_bytes(b"mine, and no image")
    (tmp_path / SET / "00005.jpg").write_bytes(image_bytes(5))       # even the very image
    (tmp_path / SET / "00099.jpg").write_bytes(b"mine")
    found = collect(tmp_path, web, 6)
    assert found.images == 6 and found.refused == {"would take the name of a file that is not of this set": 2}
    assert [line[4:9] for line in (tmp_path / "images.txt").read_text().split()] == \
        ["00000", "00001", "00002", "00004", "00006", "00007"]
    assert (tmp_path / SET / "00003.jpg").read_bytes() == b"mine, and no image"
    assert (tmp_path / SET / "00099.jpg").read_bytes() == b"mine"


def test_an_answer_that_was_not_noted_takes_only_its_own_images_away(web: Web, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / SET, tmp_path / ".retrieval.log", FETCHER)
    store.keep(0, image_bytes(50))
    store.keep(1, image_bytes(51))
    (tmp_path / SET / "00002.jpg").write_bytes(b"mine")
    web.offer(2)
    assert collect(tmp_path, web, 1).images == 1
    assert set(os.listdir(tmp_path / SET)) == {"00000.jpg", "00002.jpg"}
    assert web.served == {"/0.jpg": 1}                                  # 0 is the new candidate's image, not the old


def test_a_image_is_on_record_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    monkeypatch.setattr(image_store, "save_jpeg", lambda *a, **k: pytest.fail((tmp_path / "log").read_text()))
    with pytest.raises(pytest.fail.Exception, match="0\tkept\n"):
        store.keep(0, image_bytes(0))


def test_a_file_that_appears_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "00000.jpg").write_bytes(b"mine")
    store = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    monkeypatch.setattr("os.path.lexists", lambda path: False)          # it was not there when that was asked
    with pytest.raises(Unusable, match="of a file that is not of this set"):
        store.keep(0, image_bytes(0))
    store.remove(0)                                                     # nor is it removed
    again = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    again.remove(0)
    assert (tmp_path / "p" / "00000.jpg").read_bytes() == b"mine" and not again.kept and not store.kept


def test_the_journal_ends_a_removal_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(4):
        (tmp_path / "p" / f"{number:05d}.jpg").write_bytes(image_bytes(number))
    (tmp_path / "log").write_text("0\tkept\n1\tkept\n1\tremoving\tis a copy\n2\tkept\n2\tremoving\tgone\n"
                                  "2\tgone\n\0\0\0\n9\tanswered 404\nx\tkept\n3\tke")
    store = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    assert store.kept == {0} and store.reasons == {1: "is a copy", 9: "answered 404", 3: "ke"}
    assert sorted(os.listdir(tmp_path / "p")) == ["00000.jpg", "00002.jpg", "00003.jpg"]
    again = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    assert (again.kept, again.reasons) == (store.kept, store.reasons)


def test_sets_of_earlier_versions_go_on(web: Web, tmp_path: Path) -> None:
    """They noted refusals alone, so every candidate's file was theirs."""
    web.offer(8)
    web.pages["/1.jpg"] = b"junk"
    collect(tmp_path, web, 3)
    state = json.loads((tmp_path / ".retrieval.json").read_text())
    del state["journaled"]
    (tmp_path / ".retrieval.json").write_text(json.dumps(state))
    (tmp_path / ".retrieval.log").write_text("1\tis not a readable image\n")
    before = visible(tmp_path)
    assert collect(tmp_path, web, 3).images == 3 and visible(tmp_path) == before
    (tmp_path / SET / "00006.jpg").write_bytes(b"mine")                 # from here on only what is on record is ours
    assert collect(tmp_path, web, 6).images == 6
    assert max(web.served.values()) == 1 and (tmp_path / SET / "00006.jpg").read_bytes() == b"mine"


# ---- two at once


def test_two_retrievals_into_one_folder_take_turns(web: Web, tmp_path: Path) -> None:
    web.offer(24)
    web.pause = 0.01
    lines: list[str] = []
    runs = [threading.Thread(target=collect, args=(tmp_path, web, num, lines.append)) for num in (10, 20, 10)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    whole = collect(tmp_path, web, 20)
    assert whole.images == 20 and max(web.served.values()) == 1
    assert len((tmp_path / "images.txt").read_text().split()) == 20
    assert sum("waiting for another run" in line for line in lines) >= 1


def test_another_process_is_waited_for(web: Web, tmp_path: Path) -> None:
    web.offer(4)
    command = [sys.executable, ROOT / "scripts/retrieve.py", "--class_noun", "cat", "--num", "2", "--url", web.url,
               "--out", tmp_path, "--allow_private"]
    with FileLock(tmp_path / ".lock"):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                 env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})
        assert child.stdout.readline() == f"waiting for another run that works in '{tmp_path}'\n"
        assert not web.questions
    assert "2 of 2 images" in child.communicate()[0] and child.returncode == 0


# ---- damaged files


def test_kept_images_that_no_longer_decode_are_made_again(web: Web, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    web.offer(8)
    web.answer[2] = {"id": 2, "caption": "", "image": base64.b64encode(image_bytes(2)).decode()}
    collect(tmp_path, web, 5)
    before = visible(tmp_path)
    for number in (1, 2):
        path = tmp_path / SET / f"{number:05d}.jpg"
        path.write_bytes(bytes(path.stat().st_size))                   # what a power cut leaves
    assert collect(tmp_path, web, 5).images == 5
    after = visible(tmp_path)
    assert {name: content for name, content in after.items() if not name.endswith(".damaged")} == before
    assert set(after) - set(before) == {f"{SET}/0000{number}.jpg.damaged" for number in (1, 2)}
    assert web.served["/1.jpg"] == 2 and web.served["/0.jpg"] == 1
    assert capsys.readouterr().out.count("it is kept as") == 2


@pytest.mark.parametrize("damage", [b"", b"{", bytes(300), b"[" * 100_000, b"7", b"\xff\xfe", b'{"candidates": [7]}',
                                    b'{"sought": {}, "asked": "x", "reasons": {}, "candidates": []}',
                                    b'{"sought": {}, "asked": 1, "reasons": [], "candidates": []}',
                                    b'{"sought": 5, "asked": 1, "reasons": {"x": "y"}, "candidates": []}'])
def test_a_damaged_state_costs_no_image(web: Web, tmp_path: Path, damage: bytes,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    web.offer(9)
    web.pages["/1.jpg"] = b"junk"
    collect(tmp_path, web, 4)
    (tmp_path / SET / "00042.jpg").write_bytes(b"mine")
    before = visible(tmp_path)
    (tmp_path / ".retrieval.json").write_bytes(damage)
    assert collect(tmp_path, web, 4).images == 4 and visible(tmp_path) == before
    assert "'.retrieval.json.damaged' and made again" in capsys.readouterr().out
    assert collect(tmp_path, web, 6).images == 6                      # and it can be topped up
    assert max(count for path, count in web.served.items() if path != "/1.jpg") == 1
    assert all(visible(tmp_path)[name] == content for name, content in before.items() if name not in LISTS)


def test_a_damaged_state_without_lists_starts_anew(web: Web, tmp_path: Path) -> None:
    web.offer(6)
    collect(tmp_path, web, 3)
    before = visible(tmp_path)
    (tmp_path / ".retrieval.json").write_bytes(b"")
    (tmp_path / "images.txt").write_bytes(bytes(20))
    assert collect(tmp_path, web, 3).images == 3 and visible(tmp_path) == before


def test_damaged_lists_are_written_again(web: Web, tmp_path: Path) -> None:
    web.offer(6)
    collect(tmp_path, web, 3)
    before = visible(tmp_path)
    (tmp_path / "caption.txt").write_bytes(bytes(9))
    assert collect(tmp_path, web, 3).images == 3 and visible(tmp_path) == before


def test_images_of_other_formats_are_not_opened(tmp_path: Path) -> None:
    """Where a kept image has become PostScript, Pillow would start Ghostscript."""
    store = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    store.keep(0, image_bytes(0))
    Image.new("RGB", (8, 8)).save(tmp_path / "p" / "x.eps")
    os.replace(tmp_path / "p" / "x.eps", tmp_path / "p" / "00000.jpg")
    again = ImageStore(tmp_path / "p", tmp_path / "log", FETCHER)
    assert not again.has(0) and (tmp_path / "p" / "00000.jpg.damaged").exists()


def test_a_folder_that_cannot_be_used_is_said(web: Web, tmp_path: Path) -> None:
    (tmp_path / "cat").write_text("a file")
    with pytest.raises(UserError, match="cannot be used as a folder"):
        collect(tmp_path, web, 1)
