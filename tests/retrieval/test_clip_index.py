"""Tests one's own index end to end: images in, clip-retrieval's back end on loopback, a regularization set out."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from web import Web

pytest.importorskip("clip_retrieval")

from color_clip import COLORS, NAME, colored, write_clip
from retrieval import clip as clip_model
from retrieval import index as clip_index
from retrieval.client import Query, ask_server
from retrieval.download import Downloader
from retrieval.index import build_index
from retrieval.server import IndexServer

from ldm.data.regularization import read_regularization
from ldm.util import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a small CLIP in a local file."""
    architecture, weights = write_clip(tmp_path_factory.mktemp("clip"))
    assert clip_model.register_architecture(architecture) == NAME
    return f"open_clip:{NAME}/{weights}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 captioned images in three colors, of several kinds, and junk."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(30):
        color = list(COLORS)[number % 3]
        kind = ("jpg", "png", "webp")[number % 4 % 3]
        colored(color, number).save(folder / f"{number}.{kind}")
        (folder / f"{number}.txt").write_text(f"a {color} thing, number {number}")
    (folder / "0.txt").write_text("a blue thing by mistake")            # it is red
    colored("red", 99).convert("RGBA").save(folder / "alpha.png")      # clip-retrieval itself cannot serve these
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0junk")
    return folder


@pytest.fixture(scope="module")
def served(clip: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IndexServer]:
    folder = tmp_path_factory.mktemp("index") / "mine"
    built = build_index(photos, folder, clip, say=lambda line: None)
    assert built.images == 31 and [line for line in built.skipped if "broken.jpg" in line]
    moved = folder.with_name("moved")
    shutil.move(folder, moved)                                          # an index may be carried elsewhere
    with IndexServer(moved, port=0) as server:
        yield server


def test_a_set_from_ones_own_index(served: IndexServer, photos: Path, tmp_path: Path, call_script: Call) -> None:
    assert served.url.startswith("http://127.0.0.1:")
    outcome = call_script("retrieve", "--class_noun", "red", "--num", 8, "--url", served.url, "--out", tmp_path / "set",
                          "--deduplicate", "false", "--oversample", 1)
    assert outcome.status == 0, outcome.err
    found = read_regularization(tmp_path / "set", "red")
    assert len(found.paths) == 8
    for path, caption in zip(found.paths, found.captions, strict=True):
        assert " red " in caption or caption in ("a blue thing by mistake", "a photo of a red")
        red, green, blue = np.asarray(clip_index.decode(path).image, float).mean(axis=(0, 1))
        assert red > green + 60 and red > blue + 60


def test_captions_are_compared_by_the_local_clip(served: IndexServer, clip: str, tmp_path: Path,
                                                 call_script: Call) -> None:
    outcome = call_script("retrieve", "--class_noun", "red", "--num", 9, "--url", served.url, "--out", tmp_path / "set",
                          "--deduplicate", "false", "--index", "mine", "--clip", clip)
    assert outcome.status == 0, outcome.err
    captions = read_regularization(tmp_path / "set", "red").captions
    assert len(captions) == 9 and all("red" in caption.split() for caption in captions)
    assert "has a caption unlike" in outcome.out
    same, other = clip_model.text_similarities(clip, "a photo of a red", ["one red thing", "one blue thing"])
    assert same > 0.95 and other < 0.7


def test_an_index_of_addresses(clip: str, tmp_path: Path) -> None:
    with Web() as web:
        web.offer(5)
        web.pages["/3.jpg"] = b"junk"
        lines = [f"{web.url}/{number}.jpg\timage {number}\n" for number in range(6)]
        (tmp_path / "list.txt").write_text("".join(lines))
        fetcher = Downloader(allow_private=True, retries=0)
        built = build_index(tmp_path / "list.txt", tmp_path / "index", clip, fetcher, say=lambda line: None)
        assert built.images == 4 and len(built.skipped) == 2
        with IndexServer(tmp_path / "index", port=0) as server:
            answer = ask_server(Query("thing", url=server.url, deduplicate=False), 10)
    assert sorted(found.url for found in answer.found) == [f"{web.url}/{number}.jpg" for number in (0, 1, 2, 4)]
    assert all(found.caption == f"image {found.url[-5]}" and answer.image(found) for found in answer.found)
    assert max(web.served.values()) == 1


def test_what_cannot_be_indexed_or_served_is_said(clip: str, photos: Path, tmp_path: Path, served: IndexServer,
                                                  call_script: Call) -> None:
    index = ["retrieve", "index", photos, "--out", tmp_path / "index"]
    port = served.url.rpartition(":")[2]
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    for command, message in [
            ([*index, "--clip", "open_clip:no-such-net/x.pt"], "'no-such-net' is unknown to open_clip"),
            ([*index, "--clip", f"open_clip:{NAME}/{tmp_path}/none.pt"], "none.pt' does not exist"),
            ([*index, "--clip", f"open_clip:{NAME}/{tmp_path}/weights.safetensors"], "cannot be read"),
            (["retrieve", "index", tmp_path / "none", "--clip", clip], "does not exist"),
            ([*index, "--clip", clip, "--clip_config", tmp_path / "none.json"], "none.json' does not exist"),
            (["retrieve", "serve", tmp_path / "index"], "holds no finished index"),
            (["retrieve", "serve", served.folder, "--port", port], f"port {port} is taken")]:
        assert message in call_script(*command).error, message
    with pytest.raises(UserError, match="holds an index already"):
        build_index(photos, served.folder, clip)
