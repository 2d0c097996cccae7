"""Tests that retrieval fills a real_reg folder with the right images, whatever kills it and whatever the web does."""
from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Call, contents
from PIL import Image
from retrieval import answer as clip_answer
from retrieval import client as clip_client
from retrieval import download, image_set
from retrieval.client import Query
from retrieval.download import Downloader, Refused, is_public
from retrieval.image_set import Retrieved, retrieve
from web import HOSTILE, Web, image_bytes, trickle

from ldm.data.regularization import read_regularization, write_regularization
from ldm.util import UserError

PATHS = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
STATE = (".retrieval.json", ".retrieval.log", ".lock")


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as web:
        yield web


@pytest.fixture
def fetcher() -> Downloader:
    return Downloader(max_bytes=100_000, timeout=2, limit=3, retries=1, allow_private=True)


def collect(folder: Path, web: Web, fetcher: Downloader, num: int, say: Callable[[str], None] = lambda line: None,
            **options: object) -> Retrieved:
    return retrieve(folder, Query("tabby cat", num, web.url, **options), fetcher, workers=3, say=say)


def files(folder: Path) -> dict[str, bytes]:
    """Returns the set's files, without what retrieval keeps for itself."""
    return {name: content for name, content in contents(folder).items() if name not in STATE}


# ---- what ends up in the set


def test_the_best_usable_different_images_are_kept_in_the_servers_order(web: Web, fetcher: Downloader,
                                                                        tmp_path: Path) -> None:
    web.offer(14)
    web.pages["/1.jpg"] = b"<html>sold</html>"
    web.pages["/3.jpg"] = image_bytes(2, size=(96, 80), kind="PNG")          # the second one's copy, larger
    web.pages["/4.jpg"] = b""
    web.pages["/6.jpg"] = image_bytes(6)[:300]
    del web.pages["/7.jpg"]
    web.answer[8]["caption"] = "  two\nlines "
    web.answer[9]["caption"] = None
    found = collect(tmp_path / "set", web, fetcher, 6)
    kept = [0, 2, 5, 8, 9, 10]
    assert found.images == 6 and sum(found.refused.values()) == 5
    assert found.refused["answered 404"] == found.refused["is empty"] == 1
    assert found.refused["shows the same as another image"] == 1
    result = read_regularization(tmp_path / "set", "tabby cat")
    assert [path.name for path in result.paths] == [f"{number:05d}.jpg" for number in kept]
    assert (tmp_path / "set" / "images.txt").read_text().split() == [f"tabby_cat/{number:05d}.jpg" for number in kept]
    assert result.captions[3:5] == ["two lines", "a photo of a tabby cat"]
    assert (tmp_path / "set" / "urls.txt").read_text().split() == [f"{web.url}/{number}.jpg" for number in kept]
    with Image.open(result.paths[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 40))
    assert {question["text"] for question in web.questions} == {"tabby cat"}
    assert web.questions[0]["indice_name"] == "photos" and web.questions[0]["num_images"] == 12
    assert max(web.served.values()) == 1 and "/13.jpg" not in web.served       # no more than needed


def test_a_second_run_fetches_nothing_and_a_larger_one_tops_up(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(12)
    collect(tmp_path / "set", web, fetcher, 4)
    before, asked = files(tmp_path / "set"), len(web.questions)
    assert collect(tmp_path / "set", web, fetcher, 4).images == 4
    assert files(tmp_path / "set") == before and len(web.questions) == asked
    assert collect(tmp_path / "set", web, fetcher, 10).images == 10
    assert max(web.served.values()) == 1 and set(before) < set(files(tmp_path / "set"))
    assert collect(tmp_path / "set", web, fetcher, 50).images == 12            # all there are


def test_the_server_is_asked_for_more_while_too_few_are_usable(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(40)
    web.pages = {path: content for path, content in web.pages.items() if int(path[1:-4]) >= 16}
    assert collect(tmp_path / "set", web, fetcher, 6, oversample=1.5).images == 6
    assert [question["num_images"] for question in web.questions] == [9, 18, 36]


def test_images_that_come_with_the_answer(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    for number in range(3):
        web.answer.append({"id": number, "image_path": f"images/{number}.jpg", "caption": f"cat {number}",
                           "image": base64.b64encode(image_bytes(number)).decode()})
    web.answer += [{"id": 3, "image": "!!", "caption": "x"}, {"id": 4, "caption": "neither"},
                   {"id": 5, "url": 7, "image": base64.b64encode(b"text").decode()}]
    found = collect(tmp_path / "set", web, fetcher, 5)
    assert found.images == 3 and found.refused == {"came without a readable image": 2} and not web.served
    assert read_regularization(tmp_path / "set", "cat").captions == ["cat 0", "cat 1", "cat 2"]


def test_large_images_are_shrunk(web: Web, tmp_path: Path) -> None:
    web.offer(1)
    web.pages["/0.jpg"] = image_bytes(0, size=(3000, 2000))
    collect(tmp_path / "set", web, Downloader(allow_private=True), 1)
    with Image.open(tmp_path / "set" / "tabby_cat" / "00000.jpg") as image:
        assert image.size == (1536, 1024)


def test_captions_unlike_the_class_are_left_out(web: Web, fetcher: Downloader, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    web.offer(6)
    cosines = [0.9, 0.84, 0.86, 0.1, 0.85, 0.99]

    def similarities(clip: str, target: str, texts: list[str]) -> list[float]:
        assert (clip, target) == ("ViT-B/32", "a photo of a tabby cat")
        return [cosines[int(text.split()[-1])] for text in texts]

    monkeypatch.setattr(image_set, "text_similarities", similarities)
    found = collect(tmp_path / "set", web, fetcher, 4, clip="ViT-B/32")
    assert found.images == 4
    assert found.refused == {"has a caption unlike 'a photo of a tabby cat'": 2}
    assert (tmp_path / "set" / "images.txt").read_text().split() == \
        [f"tabby_cat/0000{number}.jpg" for number in (0, 2, 4, 5)]
    assert set(web.served) == {f"/{number}.jpg" for number in (0, 2, 4, 5)}


# ---- killed, gone, full


def test_killed_at_any_moment_and_started_again(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(70)
    for number in range(0, 70, 9):
        web.pages[f"/{number}.jpg"] = b"junk" if number % 2 else image_bytes(number + 1)
    collect(tmp_path / "whole", web, fetcher, 40)
    web.served.clear()
    web.pause = 0.01
    dice, kills, stored = random.Random(4), 0, {}
    for attempt in range(100):
        # A fork needs no imports; the server's thread stays with the parent.
        process = multiprocessing.get_context("fork").Process(target=collect,
                                                              args=(tmp_path / "set", web, fetcher, 40))
        process.start()
        process.join(dice.uniform(0.05, 0.3) if attempt < 60 else 60)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        for path in (tmp_path / "set").glob("tabby_cat/0*.jpg"):
            stored.setdefault(path.name, web.served[f"/{int(path.stem)}.jpg"])
            with Image.open(path) as image:
                image.load()                                                     # nothing is half-written
    assert process.exitcode == 0 and kills >= 2
    assert files(tmp_path / "set") == files(tmp_path / "whole")
    assert all(web.served[f"/{int(name[:5])}.jpg"] == count for name, count in stored.items())


def test_a_set_of_other_origin_or_settings_is_refused(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(4)
    write_regularization(tmp_path / "mine", "cat", [(Image.new("RGB", (8, 8)), "by hand", "")])
    before = contents(tmp_path / "mine")
    with pytest.raises(UserError, match="holds a set that was not retrieved"):
        collect(tmp_path / "mine", web, fetcher, 2)
    assert contents(tmp_path / "mine") == before
    collect(tmp_path / "set", web, fetcher, 2)
    with pytest.raises(UserError, match=r"other settings \(text was 'tabby cat', is 'cats'\)"):
        collect(tmp_path / "set", web, fetcher, 2, text="cats")


def test_a_server_that_dies_leaves_what_was_found(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(4)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        web.answer = b"gone"                        # after the first answer

    found = collect(tmp_path / "set", web, fetcher, 9, say, oversample=1)
    assert found.images == 4 and any("4 of 9 images: the server" in line for line in lines)
    assert len(read_regularization(tmp_path / "set", "cat").paths) == 4


def test_disk_full_while_retrieving(web: Web, fetcher: Downloader, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    web.offer(6)

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match="No space left"):
            collect(tmp_path / "set", web, fetcher, 4)
    assert set(contents(tmp_path / "set")) == set(STATE)
    assert collect(tmp_path / "set", web, fetcher, 4).images == 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("answer", "indices", "arguments", "message"), [
    ([], ["photos"], [], "cannot be used (it named none)"),
    (b"<html>502 Bad Gateway</html>", None, [], "answers something that is no JSON"),
    (b"", None, [], "answers something that is no JSON"), ({"message": "Internal Server Error"}, None, [],
                                                          "answers 'Internal Server Error'; check --index"),
    ({"a": 1}, None, [], "no list of images"), ([1, 2], None, [], "no list of images"),
    ([], ["laion", "mine"], ["--index", "other"], "has no index 'other'; it has laion, mine"),
    ([], None, ["--url", "DEAD"], "does not answer (no connection); start one"),
    ([], None, ["--url", "ftp://x"], "is no http or https address"),
    ([], None, ["--num", "0"], "must both be at least 1"), ([], None, ["--class_noun", " "], "class noun is empty"),
    ([], None, ["--workers", "0"], "must be positive"), ([], None, ["--num", "many"], "invalid int value")])
def test_bad_servers_and_options_end_in_a_sentence(web: Web, call_script: Call, tmp_path: Path, answer: object,
                                                   indices: object, arguments: list[str], message: str) -> None:
    web.answer, web.indices = answer, indices
    arguments = [item.replace("DEAD", f"http://127.0.0.1:{free_port()}") for item in arguments]
    outcome = call_script("retrieve", "--class_noun", "cat", "--url", web.url, "--out", tmp_path / "set", *arguments)
    assert message in outcome.error
    assert not files(tmp_path / "set")


def test_no_server_is_assumed(call_script: Call, tmp_path: Path) -> None:
    outcome = call_script("retrieve", "--class_noun", "cat", "--out", tmp_path / "set")
    assert "no clip-retrieval server is named; start one" in outcome.error and "data.reg.mode=generate" in outcome.error


# Entries that are only strange are left out one by one; all else is refused whole.
STRANGE = {"lone_surrogates", "control_characters", "huge_caption", "huge_url", "not_finite", "wrong_types",
           "strange_addresses", "no_image", "text_for_image", "same_entry_ten_thousand_times", "empty_tables"}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_server_does_ends_in_a_sentence(web: Web, name: str, tmp_path: Path) -> None:
    web.answer = HOSTILE[name]
    query = Query("cat", 2, web.url, timeout=5.0 if name in STRANGE else 0.4)     # only a slow server may run out of it
    message = "cannot be used" if name in STRANGE else f"the server '{web.url}/knn-service' "
    with pytest.raises(UserError, match=message):
        retrieve(tmp_path / "set", query, Downloader(retries=0, timeout=0.2, limit=0.4), say=lambda line: None)
    assert not files(tmp_path / "set")


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_server_does_in_place_of_its_indices_is_no_harm(web: Web, name: str) -> None:
    web.indices, web.answer = HOSTILE[name], [{"id": 1, "url": "http://a/", "caption": "cat"}]
    try:
        (found,) = clip_client.ask_server(Query("cat", url=web.url, timeout=0.4), 5).found
        assert found.url == "http://a/" and web.questions[0]["indice_name"] == ("photos" if name == "names" else None)
    except UserError as error:
        assert str(error).startswith(f"the server '{web.url}/knn-service' ")


def test_a_hostile_server_costs_little_memory(web: Web) -> None:
    """Measured in a process of its own, whose memory may only grow."""
    code = "import resource, sys\nfrom ldm.util import UserError\n" \
           "from retrieval.client import Query, ask_server\n" \
           "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000\n" \
           "before = peak()\nfor timeout in map(float, sys.argv[2:]):\n    try:\n" \
           "        ask_server(Query('cat', url=sys.argv[1], timeout=timeout), 10000)\n" \
           "    except UserError as error:\n        print(error)\nprint(peak() - before)"
    large = '[{"caption": "\U0001f408'.encode() + b"a" * 100_000_000 + b'"}]'       # as text four times as many bytes
    many = b'[{"id": [' + b"[]," * 3_900_000 + b"[]]}]"                             # as lists thirty times as many
    kinds = iter([HOSTILE["endless_entries"], HOSTILE["endless_string"], lambda handler: handler.send(large),
                  lambda handler: handler.send(many)])
    web.indices, web.answer = None, lambda handler: next(kinds)(handler)
    done = subprocess.run([sys.executable, "-c", code, web.url, "0.5", "0.5", "20", "20"], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": PATHS})
    assert done.stdout.count("did not answer within") == 2 and done.stdout.count("absurdly large") == 2
    assert done.returncode == 0 and float(done.stdout.splitlines()[-1]) < 200, done


def test_captions_and_addresses_are_cleaned(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    web.offer(3)
    captions = ["half \ud83d an\0 emoji\x1b[2J", "long " * 1000, "caf\u00e9 \U0001f408 \u732b\u2028next"]
    for entry, caption in zip(web.answer, captions, strict=True):
        entry["caption"] = caption
    collect(tmp_path / "set", web, fetcher, 3)
    assert read_regularization(tmp_path / "set", "cat").captions == \
        ["half an emoji [2J", ("long " * 200).strip(), "caf\u00e9 \U0001f408 \u732b next"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_an_answer_is_divided_as_json_divides_it(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python's own reader, with pieces that end anywhere."""
    monkeypatch.setattr(clip_answer, "CHUNK", size)
    entries = [{"id": number, "url": f"http://a/{number}", "caption": text, "more": {"a": [1, [2, {"b": []}]]}}
               for number, text in enumerate(['plain', '"quoted", [x]', 'back\\', '\\"}],', '\u732b{', ''])]
    for indent, ascii_only in ((None, True), (2, False)):
        text = json.dumps(entries, indent=indent, ensure_ascii=ascii_only).encode()
        answer = clip_answer.Answer(io.BytesIO(text), 100)
        assert [(found.identity, found.caption) for found in answer.found] == \
            [(entry["url"], entry["caption"]) for entry in entries]
        assert len(clip_answer.Answer(io.BytesIO(text), 2).found) == 2
        for cut in range(1, len(text)):
            with pytest.raises(ValueError):
                clip_answer.Answer(io.BytesIO(text[:cut]), 100)
    assert clip_answer.Answer(io.BytesIO(b"[ ]"), 100).found == []


def test_many_images_that_come_with_the_answer(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    """More than is kept in memory: what follows a JPEG's end is no part of it."""
    images = [base64.b64encode(image_bytes(number) + bytes(250_000)).decode() for number in range(60)]
    web.answer = [{"id": number, "caption": "", "image": image} for number, image in enumerate(images)]
    assert collect(tmp_path / "set", web, fetcher, 60, oversample=1).images == 60


def test_the_command_runs_where_clip_retrieval_is(tmp_path: Path) -> None:
    """Another Python takes the command over, with its arguments as they are and this checkout's ldm."""
    folder = tmp_path / "a checkout"
    (folder / "scripts").mkdir(parents=True)
    script = shutil.copy(ROOT / "scripts/retrieve.py", folder / "scripts")
    code = "import sys, importlib.util as util, runpy\nfind = util.find_spec\n" \
           "util.find_spec = lambda name: find(name) if name != 'clip_retrieval' else None\n" \
           "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, script, "--class_noun", "plush toy", "--clip", "ViT-B/32"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": PATHS}, capture_output=True, text=True)

    assert run().stderr == ("error: this Python has no package clip-retrieval; `python scripts/retrieve.py setup` "
                            "makes an environment that has it.\n")
    python = folder / ".venv-retrieval/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$PYTHONPATH\" \"$@\"\nexit 3\n")
    python.chmod(0o755)
    outcome = run()
    assert (outcome.returncode, outcome.stderr) == (3, "")
    assert outcome.stdout.splitlines() == [str(folder), str(script), *command[4:]]


def test_the_command_says_what_it_did(web: Web, call_script: Call, tmp_path: Path) -> None:
    web.offer(6)
    web.pages["/2.jpg"] = b"junk"
    outcome = call_script("retrieve", "--class-noun", "cat", "--num", 3, "--url", web.url, "--out", tmp_path / "set",
                          "--allow-private")
    assert outcome.status == 0, outcome.err
    assert f"regularization set: 3 of 3 images in {tmp_path / 'set'}" in outcome.out
    assert "left out: 1 (is not a readable image)" in outcome.out
    outcome = call_script("retrieve", "--class_noun", "cat", "--num", 3, "--url", web.url, "--out", tmp_path / "b")
    assert "(leads to the private)" not in outcome.error and "leads to the private" in outcome.error


# ---- downloads that must not happen


@pytest.mark.parametrize("url", ["ftp://example.com/a.jpg", "file:///etc/hosts", "data:image/png;base64,AAAA", "a.jpg",
                                 "http://", "//example.com/a.jpg", "http://[", "javascript:1"])
def test_other_addresses_than_http_are_refused(url: str) -> None:
    with pytest.raises(Refused, match="is no (web|http or https) address"):
        Downloader().fetch(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "192.168.0.1", "169.254.1.1",
                                  "[::1]", "[fd00::1]", "[fe80::1]", "2130706433", "0x7f.1", "[::ffff:10.0.0.1]",
                                  "100.64.0.1"])
def test_private_addresses_are_refused_before_connecting(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("it connected"))
    with pytest.raises(Refused, match="leads to the private address"):
        Downloader(retries=0).fetch(f"http://{host}/a.jpg")


@pytest.mark.parametrize(("address", "public"), [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("224.0.0.1", False), ("::ffff:8.8.8.8", True),
    ("2002:a00:1::", False), ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True), ("2001:0:1::1", False),
    ("fe80::1%eth0", False)])
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_redirect_to_a_private_address_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")   # stands for a public one
    web.offer(1)
    elsewhere = web.url.replace("127.0.0.1", "127.0.0.2")
    for path, target in (("/private", f"{elsewhere}/0.jpg"), ("/file", "file:///etc/hosts"), ("/fine", "/0.jpg"),
                         ("/loop", "/loop")):
        web.pages[path] = lambda handler, target=target: handler.send(b"", 302, Location=target)
    guarded = Downloader(retries=0)
    assert guarded.fetch(f"{web.url}/fine") == web.pages["/0.jpg"]
    with pytest.raises(Refused, match=r"leads to the private address 127\.0\.0\.2"):
        guarded.fetch(f"{web.url}/private")
    with pytest.raises(Refused, match="not http or https"):
        guarded.fetch(f"{web.url}/file")
    with pytest.raises(Refused, match="too many redirects"):
        guarded.fetch(f"{web.url}/loop")


def test_a_name_that_changes_its_mind_is_refused_once_connected(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.offer(1)
    answers = iter([[(2, 1, 6, "", ("93.184.216.34", 80))]])                 # first a public address, then the real
    real = socket.getaddrinfo
    monkeypatch.setattr(download.socket, "getaddrinfo",
                        lambda *arguments, **named: next(answers, None) or real(*arguments, **named))
    with pytest.raises(Refused, match=r"leads to the private address 127\.0\.0\.1"):
        Downloader(retries=0).fetch(f"{web.url}/0.jpg")
    assert not web.served


def test_files_over_the_limit_are_refused_announced_or_not(web: Web) -> None:
    def announced(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "999999")
        handler.end_headers()

    def unannounced(handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(bytes(1000))

    web.pages |= {"/a": announced, "/b": unannounced, "/c": bytes(1000)}
    fetcher = Downloader(max_bytes=1000, allow_private=True)
    assert fetcher.fetch(f"{web.url}/c") == bytes(1000)
    for path in ("/a", "/b"):
        with pytest.raises(Refused, match="is larger than 1,000 bytes"):
            fetcher.fetch(web.url + path)


def test_trickles_end_at_the_deadline_and_hiccups_are_tried_again(web: Web) -> None:
    def break_off(handler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nabc")

    visits: list[int] = []

    def busy(handler) -> None:
        visits.append(1)
        handler.send(b"ok", 503 if len(visits) < 3 else 200)

    web.pages |= {"/body": trickle, "/head": lambda handler: trickle(handler, b""), "/short": break_off, "/busy": busy}
    fetcher = Downloader(timeout=0.5, limit=0.6, retries=2, allow_private=True)
    for path in ("/body", "/head"):
        start = time.monotonic()
        with pytest.raises(Refused, match=r"took longer than 0\.6 s"):
            fetcher.fetch(web.url + path)
        assert time.monotonic() - start < 4
    with pytest.raises(Refused, match="broke off"):
        fetcher.fetch(f"{web.url}/short")
    assert Downloader(allow_private=True).fetch(f"{web.url}/busy") == b"ok" and len(visits) == 3
    with pytest.raises(Refused, match=r"failed \(no connection\)"):
        Downloader(retries=0, allow_private=True).fetch(f"http://127.0.0.1:{free_port()}/")


def test_a_bomb_from_the_web_is_left_out(web: Web, fetcher: Downloader, tmp_path: Path) -> None:
    import zlib
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    web.offer(2)
    web.pages["/0.jpg"] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    found = collect(tmp_path / "set", web, fetcher, 1)
    assert found.images == 1 and found.refused == {"claims more than 400,000,000 pixels": 1}
