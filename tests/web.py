"""An image host and a stand-in for a clip-retrieval server on loopback, which misbehave as they are told.

`HOSTILE` holds, by name, what a clip-retrieval server may do instead of answering; a campaign sets `Web.answer` or
`Web.indices` to one of them and runs a retrieval against it.
"""
from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def image_bytes(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """Returns a file of a colorful image, no two alike."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def trickle(handler: BaseHTTPRequestHandler, head: bytes = b"HTTP/1.0 200 OK\r\n\r\n") -> None:
    """Answers with a byte every tenth of a second, for six seconds."""
    handler.wfile.write(head)
    for _ in range(60):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


Answering = Callable[[BaseHTTPRequestHandler], None]
HOSTILE: dict[str, Answering] = {}


def hostile(function: Answering) -> Answering:
    """Puts an answer into `HOSTILE`; it ends when the caller goes away."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        try:
            function(handler)
        except OSError:
            pass
    HOSTILE[function.__name__] = answer
    return answer


def as_sent(name: str, content: bytes, status: int = 200, **headers: str) -> None:
    """Puts an answer of these bytes into `HOSTILE`."""
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send(content, status, **headers)
    answer.__name__ = name
    hostile(answer)


def entries(**values: Any) -> bytes:
    """Returns the JSON of one entry whose values are these."""
    return json.dumps([{"id": 1, "url": "http://127.0.0.1:9/a.jpg", "caption": "a cat", **values}]).encode()


def pour(handler: BaseHTTPRequestHandler, start: bytes, more: bytes, pause: float = 0.0) -> None:
    """Answers without end."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + start)
    while True:
        handler.wfile.write(more)
        time.sleep(pause)


@hostile
def endless_blanks(handler: BaseHTTPRequestHandler) -> None:
    pour(handler, b"[", b" " * 65536)


@hostile
def endless_entries(handler: BaseHTTPRequestHandler) -> None:
    pour(handler, b"[", b'{"id": 1, "url": "http://127.0.0.1:9/", "caption": "cat"},' * 1000)


@hostile
def endless_string(handler: BaseHTTPRequestHandler) -> None:
    pour(handler, b'[{"caption": "', b"a" * 65536)


@hostile
def endless_lists(handler: BaseHTTPRequestHandler) -> None:
    pour(handler, b'[{"id": [', b"[]," * 20000)


@hostile
def slow_bytes(handler: BaseHTTPRequestHandler) -> None:
    pour(handler, b"[", b" ", 0.1)


@hostile
def slow_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"X")
        time.sleep(0.1)


@hostile
def endless_continues(handler: BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


@hostile
def header_flood(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-A: " + b"a" * 1000 + b"\r\n")


@hostile
def endless_header(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-A: ")
    while True:
        handler.wfile.write(b"a" * 65536)


@hostile
def silence(handler: BaseHTTPRequestHandler) -> None:
    while True:
        time.sleep(0.1)
        handler.connection.getpeername()


@hostile
def never_closing(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[")
    silence(handler)


@hostile
def endless_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


@hostile
def wrong_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n")


@hostile
def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n" * 3)


@hostile
def reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@hostile
def truncated(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + entries()[:-1])


@hostile
def redirect_to_itself(handler: BaseHTTPRequestHandler) -> None:
    handler.send(b"", 307, Location=handler.path)


as_sent("redirect_to_private", b"", 302, Location="http://169.254.169.254/latest/meta-data/")
as_sent("redirect_to_file", b"", 302, Location="file:///etc/hosts")
as_sent("gzip_bomb", gzip.compress(b"[" + b" " * 50_000_000), Content_Encoding="gzip")
as_sent("deep_lists", b"[" * 100_000)
as_sent("deep_tables", b'{"a":' * 100_000)
as_sent("deep_entry", b'[{"id":' + b"[" * 100_000 + b"]" * 100_000 + b"}]")
as_sent("cut_off", entries()[:-1])
as_sent("two_lists", entries() * 2)
as_sent("no_content", b"", 204)
as_sent("empty", b"")
as_sent("not_found", b"", 404)
as_sent("html", b"<html><h1>It works!</h1></html>")
as_sent("error_page", b"<html>502 Bad Gateway</html>", 502)
as_sent("a_number", b"7")
as_sent("not_a_number", b"NaN")
as_sent("a_table", b'{"a": 1}')
as_sent("numbers", b"[1, 2, 3]")
as_sent("names", b'["photos", 7, null, "other"]')
as_sent("nulls", b"[null, null]")
as_sent("terminal_codes_in_message", json.dumps({"message": "\x1b]0;title\x07\x1b[2J" * 1000}).encode())
as_sent("message_of_another_type", b'{"message": {"a": [1]}}')
as_sent("other_encoding", json.dumps([{"caption": "\u732b"}], ensure_ascii=False).encode("utf-16"))
as_sent("no_utf8", b'[{"id": 1, "caption": "\xff\xfe\x80"}]')
as_sent("lone_surrogates", entries(caption="half \ud83d an emoji", url="http://127.0.0.1:9/\ud83d.jpg"))
as_sent("control_characters", entries(caption="a\0cat\x1b[2J\u2028\r\n\x85on a mat"))
as_sent("huge_caption", entries(caption="cat " * 2_000_000))
as_sent("huge_url", entries(url="http://127.0.0.1:9/" + "a" * 2_000_000))
as_sent("huge_number", b'[{"id": ' + b"9" * 1_000_000 + b', "url": "http://127.0.0.1:9/"}]')
as_sent("not_finite", b'[{"id": NaN, "similarity": -Infinity, "url": "http://127.0.0.1:9/", "caption": NaN}]')
as_sent("wrong_types", entries(id={"a": [None]}, url=["x"], caption={"b": 1}, image=7, similarity="high"))
as_sent("strange_addresses", json.dumps([{"id": number, "url": url, "caption": "cat"} for number, url in enumerate(
    ("file:///etc/hosts", "http://", "http://[", "//a", "javascript:1", "http://127.0.0.1:99999/", "x" * 70_000,
     "http://" + "a" * 300 + "/", "http://a..b/", "http://127.0.0.1:9/\r\nX: y", "gopher://127.0.0.1:9/"))]).encode())
as_sent("no_image", entries(url="", image="!!!"))
as_sent("text_for_image", entries(url="", image=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()))
as_sent("same_entry_ten_thousand_times", b"[" + b",".join([entries()[1:-1]] * 10_000) + b"]")
as_sent("empty_tables", b"[" + b",".join([b"{}"] * 100_000) + b"]")


class _Quiet(ThreadingHTTPServer):
    """A server that says nothing of callers that went away."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Web:
    """An HTTP server on loopback; use it as a context.

    Attributes:
        pages: by path: bytes to answer with, or a function of the handler that answers.
        served: how often each path was answered in full.
        answer: what the knn service returns: JSON, bytes sent as they are, or a function of the handler that answers.
        indices: what /indices-list returns: as `answer`, and None is a 404.
    """

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]] = {}
        self.served: Counter[str] = Counter()
        self.questions: list[dict[str, Any]] = []
        self.answer: Any = []
        self.indices: Any = ["photos"]
        self.pause = 0.0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                time.sleep(web.pause)
                if self.path == "/indices-list" and web.indices is not None:
                    return self.tell(web.indices)
                page = web.pages.get(self.path)
                if callable(page):
                    page(self)
                elif page is None:
                    self.send(b"", 404)
                else:
                    self.send(page)
                    web.served[self.path] += 1

            def do_POST(self) -> None:
                web.questions.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = web.answer
                if isinstance(answer, list):
                    answer = answer[:web.questions[-1]["num_images"]]
                self.tell(answer)

            def tell(self, answer: Any) -> None:
                if callable(answer):
                    return answer(self)
                self.send(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def send(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content_Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

        self._server = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def offer(self, count: int, start: int = 0) -> None:
        """Puts `count` images on the host and into the knn service's answer."""
        for number in range(start, start + count):
            self.pages[f"/{number}.jpg"] = image_bytes(number)
            self.answer.append({"id": number, "url": f"{self.url}/{number}.jpg", "caption": f"a cat, number {number}",
                                "similarity": 0.3})

    def __enter__(self) -> Web:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
