"""A picture host and a stand-in for a clip-retrieval server on loopback, which misbehave as they are told."""
from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def picture_bytes(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """Returns a file of a colourful picture, no two alike."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(file, kind)
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


class Web:
    """An HTTP server on loopback; use it as a context.

    Attributes:
        pages: by path: bytes to answer with, or a function of the handler that answers.
        served: how often each path was answered in full.
        answer: what the knn service returns: JSON, or bytes sent as they are.
        indices: what /indices-list returns; None is a 404.
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
                    return self.send(json.dumps(web.indices).encode())
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
                self.send(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def send(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content_Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def offer(self, count: int, start: int = 0) -> None:
        """Puts `count` pictures on the host and into the knn service's answer."""
        for number in range(start, start + count):
            self.pages[f"/{number}.jpg"] = picture_bytes(number)
            self.answer.append({"id": number, "url": f"{self.url}/{number}.jpg", "caption": f"a cat, number {number}",
                                "similarity": 0.3})

    def __enter__(self) -> Web:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
