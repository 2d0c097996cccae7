"""Tests that an index is served to this machine alone, with its own images only, and that all ends in a sentence."""
from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from web import Web

pytest.importorskip("clip_retrieval")

import pyarrow
import pyarrow.parquet
from color_clip import NAME, colored, write_clip
from PIL import Image
from retrieval import clip as clip_model
from retrieval import server as clip_server
from retrieval.index import build_index
from retrieval.server import Index, IndexServer

from ldm.util import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 6 images, red, green and blue in turn."""
    folder = tmp_path_factory.mktemp("served")
    architecture, weights = write_clip(folder)
    clip_model.register_architecture(architecture)
    (folder / "photos").mkdir()
    for number in range(6):
        colored(("red", "green", "blue")[number % 3], number).save(folder / "photos" / f"{number}.png")
    build_index(folder / "photos", folder / "index", f"open_clip:{NAME}/{weights}", say=lambda line: None)
    return folder / "index"


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[IndexServer]:
    with IndexServer(built, port=0) as server:
        yield server


def ask(server: IndexServer, content: object, method: str = "POST", path: str = "/knn-service",
        **headers: str) -> tuple[int, object]:
    """Sends a request and returns the status and the JSON that come back."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def question(**changes: object) -> dict[str, object]:
    return {"text": "red", "modality": "image", "num_images": 4, "indice_name": "index"} | changes


def image(color: str) -> str:
    file = BytesIO()
    colored(color, 9).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def rows(folder: Path, *paths: object) -> None:
    """Gives the images of an index other paths."""
    file = folder / "metadata" / "metadata_0.parquet"
    table = pyarrow.parquet.read_table(file).to_pydict()
    table["image_path"] = [*paths, *table["image_path"][len(paths):]]
    pyarrow.parquet.write_table(pyarrow.table(table), file)


def test_texts_images_and_vectors_find_their_color(server: IndexServer, built: Path) -> None:
    status, found = ask(server, question())
    assert status == 200 and {entry["id"] for entry in found[:2]} == {0, 3} and len(found) == 4
    for entry in found[:2]:
        red, green, blue = np.asarray(Image.open(BytesIO(base64.b64decode(entry["image"])))).mean(axis=(0, 1))
        assert red > green + 60 and red > blue + 60 and "image_path" not in entry
    _, found = ask(server, question(text=None, image=image("green"), num_images=2))
    assert {entry["id"] for entry in found} == {1, 4}
    vector = Index(built).clip.texts(["blue"])[0].tolist()
    _, found = ask(server, question(text=None, embedding_input=vector, num_images=2))
    assert {entry["id"] for entry in found} == {2, 5}
    assert len(ask(server, question(num_images=10_000))[1]) == 6
    assert ask(server, b"", "GET", "/indices-list") == (200, ["index"])


@pytest.mark.parametrize(("headers", "answered"), [
    ({"Host": "127.0.0.1:{}"}, True), ({"Host": "LOCALHOST:{}"}, True), ({"Host": "[::1]:{}"}, True),
    ({"Host": "localhost:{}", "Origin": "http://localhost:{}"}, True), ({"Host": "127.0.0.1"}, False),
    ({"Host": "127.0.0.1:1"}, False), ({"Host": "evil.example:{}"}, False), ({"Host": ""}, False),
    ({"Host": "127.0.0.1.evil.example:{}"}, False), ({"Origin": "http://evil.example"}, False),
    ({"Origin": "null"}, False),
    ({"Origin": "https://127.0.0.1:{}"}, False), ({"Origin": "http://127.0.0.1:1"}, False)])
def test_callers_from_elsewhere_are_refused(server: IndexServer, headers: dict[str, str], answered: bool) -> None:
    port = server.url.rpartition(":")[2]
    headers = {name: value.format(port) for name, value in headers.items()}
    for content, method, path in ((question(), "POST", "/knn-service"), (b"", "GET", "/indices-list")):
        status, answer = ask(server, content, method, path, **headers)
        assert status == (200 if answered else 403), answer
        assert answered or answer == {"message": "only programs on this machine are answered"}


def test_no_address_is_fetched(server: IndexServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(base64.b64decode(image("red")))
    with Web() as web:
        web.offer(1)
        for url in (f"{web.url}/0.jpg", f"file://{tmp_path}/a.png", ""):
            status, answer = ask(server, question(text=None, image_url=url))
            assert status == 400 and "image_url is not fetched" in answer["message"]
        assert not web.served


@pytest.mark.parametrize(("content", "message"), [
    (b"", "Invalid JSON"), (b"{", "Invalid JSON"), (b"[" * 100_000, "Invalid JSON"), (b"\xff", "Invalid JSON"),
    (b"[]", "should be an object"), (question(text=None), "must have one of"), (question(text=""), "must have one of"),
    (question(text=7), "'text' should be"), (question(text="a" * 20_000), "'text' should have at most 10000"),
    (question(image=image("red")), "must have one of"),
    (question(text=None, image=7), "'image' should be"), (question(text=None, image="!"), "'image' should be"),
    (question(text=None, image=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()), "the image is not"),
    (question(text=None, embedding_input=[1]), "has 1 numbers instead of 16"),
    (question(text=None, embedding_input=[[1] * 16]), "'embedding_input.0' should be"),
    (question(text=None, embedding_input=[float("nan")] * 16), "'embedding_input.0' should be a finite"),
    (question(text=None, embedding_input=[10 ** 400] * 16), "'embedding_input.0' should be a finite"),
    (question(num_images=0), "'num_images' should be"), (question(num_images=10_001), "'num_images' should be"),
    (question(num_images=True), "'num_images' should be"), (question(num_images="4"), "'num_images' should be"),
    (question(modality="text"), "modality"), (question(indice_name="other"), "no such index"),
    (question(indice_name=["index"]), "'indice_name' should be")])
def test_bad_questions_are_answered_in_a_sentence(server: IndexServer, content: object, message: str,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    status, answer = ask(server, content)
    assert status == 400 and message in answer["message"] and len(answer["message"]) < 200
    assert capfd.readouterr() == ("", "")


def test_other_services_do_not_exist(server: IndexServer) -> None:
    for method, path in (("GET", "/"), ("GET", "/knn-service"), ("POST", "/indices-list"), ("POST", "/metadata"),
                         ("GET", "/../../etc/hosts"), ("GET", "/metrics")):
        assert ask(server, question(), method, path)[0] == 404


def test_large_slow_and_broken_requests_end(built: Path, monkeypatch: pytest.MonkeyPatch,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(clip_server, "SECONDS", 0.5)
    monkeypatch.setattr(clip_server._Handler, "timeout", 0.5)
    with IndexServer(built, port=0) as server:
        host = server.url.removeprefix("http://")
        head = f"POST /knn-service HTTP/1.0\r\nHost: {host}\r\n"
        for start, drip, status in (
                (f"{head}Content-Length: 16000001\r\n\r\n", b"", b"413"), (f"{head}\r\n", b"", b"411"),
                (f"{head}Content-Length: -1\r\n\r\n", b"", b"411"),
                (f"{head}Content-Length: {'9' * 5000}\r\n\r\n", b"", b"411"), ("\0\0\r\n\r\n", b"", b""),
                (f"{head}Content-Length: 1000\r\n\r\n", b" ", b""), (head, b"X", b""), ("", b"G", b""), ("", b"", b"")):
            with socket.create_connection(host.split(":")) as caller:
                caller.sendall(start.encode())
                begun, answer = time.monotonic(), b""
                while time.monotonic() < begun + 5:
                    try:
                        caller.sendall(drip)
                        caller.settimeout(0.1)
                        part = caller.recv(1000)
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                    if not part:
                        break
                    answer += part
                assert time.monotonic() < begun + 5 and status in answer[:20]
        assert ask(server, question())[0] == 200
    assert capfd.readouterr() == ("", "")


def test_only_images_of_its_own_folder_are_given_out(index: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    colored("red", 1).save(secret)
    (index / "pictures" / "link.jpg").symlink_to(secret)
    (index / "pictures" / "text.jpg").write_text("a secret")
    colored("red", 1).save(index / "pictures" / "x.eps")
    rows(index, str(secret), "../secret.jpg", "images/link.jpg", "images/text.jpg", "images/x.eps", "no\0thing")
    with IndexServer(index, port=0) as server:
        status, found = ask(server, question(num_images=6))
    assert status == 200 and len(found) == 6 and not any("image" in entry for entry in found)


@pytest.mark.parametrize(("name", "damage"), [
    ("index.json", b""), ("index.json", b"{"), ("index.json", b"[" * 100_000), ("index.json", b"[]"),
    ("index.json", b'{"name": 7, "clip": "x"}'), ("index.json", b'{"name": "\\u001b[2J", "clip": "ViT-B/32"}'),
    ("index.json", bytes(100)), ("image.index", b""), ("image.index", bytes(1000)),
    ("image.index", b"IxFI" + b"\xff" * 99), ("image.index", b"IwFl" + bytes(99)), ("metadata/metadata_0.parquet", b""),
    ("metadata/metadata_0.parquet", b"PAR1" + bytes(100) + b"PAR1"), ("metadata/metadata_0.parquet", bytes(100))])
def test_a_damaged_index_is_refused_in_a_sentence(index: Path, call_script: Call, name: str, damage: bytes) -> None:
    (index / name).write_bytes(damage)
    error = call_script("retrieve", "serve", index, "--port", 0).error
    assert f"{index}/{name}'" in error and ("damaged" in error or "is no JSON" in error or "is empty" in error
                                           or "not UTF-8" in error), error


def test_parts_that_do_not_fit_each_other_are_refused(index: Path, tmp_path: Path) -> None:
    import faiss
    def write(count: int, width: int, value: float = 0.25) -> None:
        vectors = faiss.IndexFlatIP(width)
        vectors.add(np.full((count, width), value, np.float32))
        faiss.write_index(vectors, str(index / "image.index"))

    for count, width, value, message in ((5, 16, 0.25, "5 vectors and 6"), (6, 8, 0.25, "vectors of 8 numbers"),
                                         (6, 16, float("nan"), "not finite")):
        write(count, width, value)
        with pytest.raises(UserError, match=message):
            Index(index)
    write(6, 16)
    rows(index, None)
    with pytest.raises(UserError, match="is no text"):
        Index(index)
    (index / "metadata" / "metadata_0.parquet").unlink()
    with pytest.raises(UserError, match="does not exist"):
        Index(index)


@pytest.mark.parametrize("port", ["80000", "-1", "65536"])
def test_a_port_out_of_range_is_refused(index: Path, call_script: Call, port: str) -> None:
    assert f"--port {port} is none" in call_script("retrieve", "serve", index, f"--port={port}").error


def test_a_folder_of_something_else_gets_no_index(built: Path, tmp_path: Path) -> None:
    """Not even where its folders are called as an index's; one that was begun goes on."""
    clip = json.loads((built / "index.json").read_text())["clip"]
    photos = built.with_name("photos")
    for name in ("embeddings", "pictures"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "00000.jpg").write_bytes(b"mine")
        with pytest.raises(UserError, match=f"holds '{name}', which is of no index"):
            build_index(photos, tmp_path / name, clip, say=lambda line: None)
        assert [path.name for path in (tmp_path / name).rglob("*") if path.is_file()] == ["00000.jpg"]
    begun = Path(shutil.copytree(built, tmp_path / "begun"))
    (begun / "index.json").unlink()
    (begun / "pictures" / "00002.jpg").write_bytes(bytes(900))          # a power cut's
    before = (begun / "pictures" / "00001.jpg").stat().st_mtime_ns
    assert build_index(photos, begun, clip, say=lambda line: None).images == 6
    assert (begun / "pictures" / "00001.jpg").stat().st_mtime_ns == before
    for name in ("image.index", "pictures/00002.jpg", "metadata/metadata_0.parquet"):
        assert (begun / name).read_bytes() == (built / name).read_bytes()


