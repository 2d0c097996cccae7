"""Serves an index of your own images in clip-retrieval's protocol: on loopback, to this machine, and nothing else."""
from __future__ import annotations

import base64
import dataclasses
import json
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from ldm.checkpoint import existing_file
from ldm.data.images import Unusable, decode
from ldm.records import BadRecord, Line, Record, load_record, read_record
from ldm.util import UserError
from retrieval.clip import Clip, check_clip, first_line, load_clip
from retrieval.download import Deadline
from retrieval.index import DESCRIPTION, library

KNN, INDICES = "/knn-service", "/indices-list"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MOST_BYTES = 16_000_000      # of a request: a large photo as text
SECONDS = 10.0               # in which a request must have arrived, and in which a part of the answer must be taken
MOST_ANSWERED = 10_000       # images in one answer
MOST_TEXT = 10_000           # characters of a question
ANEW = "build the index again with scripts/retrieve.py index"
_FLAT = struct.Struct("<4siqqq?iQ")      # how faiss begins an exact index: kind, width, vectors, -, -, -, -, numbers


class _Refused(Exception):
    """Why a request is not answered."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Question(Record):
    """What a request asks for, in the names of clip-retrieval's protocol; one of text, image and vector is there."""

    model_config = ConfigDict(val_json_bytes="base64")

    text: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    image: bytes | None = None
    embedding_input: list[Annotated[float, Field(gt=-1e30, lt=1e30)]] | None = None
    num_images: Annotated[int, Field(ge=1, le=MOST_ANSWERED)] = 100
    deduplicate: bool | None = None
    modality: Literal["image"] = "image"
    indice_name: Line | None = None
    image_url: Line | None = None


class _Description(Record):
    """What an index's folder says of it."""

    name: Annotated[Line, Field(min_length=1, max_length=200)]
    clip: Line


class Index:
    """An index in a folder, with its CLIP, ready to be asked.

    Raises:
        UserError: there is none, a part of it is damaged, or its CLIP is gone.
    """

    def __init__(self, folder: Path, clip: str | None = None):
        self.folder = folder
        self.name, recorded = _read_description(folder)
        self.clip: Clip = load_clip(check_clip(clip or recorded))
        self.rows = _read_rows(folder / "metadata" / "metadata_0.parquet")
        self.vectors = _read_vectors(folder / "image.index")
        if self.vectors.ntotal != len(self.rows):
            raise UserError(f"'{folder}' has {self.vectors.ntotal} vectors and {len(self.rows)} images; {ANEW}.")
        width = self.clip.texts(["a"]).shape[1]
        if self.vectors.d != width:
            raise UserError(f"'{folder}' has vectors of {self.vectors.d} numbers and its CLIP makes {width}; give the "
                            "CLIP it was built with, or build it again.")
        self._search, self._turn = _search_service(self.vectors), threading.Lock()

    def answer(self, question: _Question) -> Iterator[dict[str, Any]]:
        """Returns the images a question finds, best first, each read when it is its turn."""
        with self._turn:
            similarities, numbers = self._search(self._vector(question), min(question.num_images, len(self.rows)),
                                                 bool(question.deduplicate))
        return (self._entry(int(number), float(similarity))
                for similarity, number in zip(similarities, numbers, strict=True))

    def _entry(self, number: int, similarity: float) -> dict[str, Any]:
        path, caption, url = self.rows[number]
        entry = {"id": number, "similarity": similarity, "caption": caption, "url": url}
        image = self._image(path)
        if image:
            entry["image"] = base64.b64encode(image).decode()
        return entry

    def _vector(self, question: _Question) -> np.ndarray:
        """Returns what to look for, (1, D) float32."""
        if question.text:
            return self.clip.texts([question.text]).numpy()
        if question.image is not None:
            try:
                return self.clip.images([decode(question.image).image]).numpy()
            except Unusable as problem:
                raise _Refused(400, f"the image {problem}") from problem
        vector = np.array([question.embedding_input], dtype=np.float32)
        if vector.shape[1] != self.vectors.d:
            raise _Refused(400, f"embedding_input has {vector.shape[1]} numbers instead of {self.vectors.d}")
        return vector

    def _image(self, name: str) -> bytes | None:
        """Returns an image of the index as a JPEG; None where none is in the folder under that name."""
        try:
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                return None
            image = decode(path).image
        except (Unusable, OSError, ValueError, RuntimeError):       # names with zeros, links in circles
            return None
        file = BytesIO()
        image.save(file, format="JPEG", quality=90)
        return file.getvalue()


def _read_description(folder: Path) -> tuple[str, str]:
    """Returns an index's name and its CLIP's."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"'{folder}' holds no finished index; build one with scripts/retrieve.py index.")
    description = load_record(_Description, path, "index", ANEW)
    return description.name, description.clip


def _read_rows(path: Path) -> list[tuple[str, str, str]]:
    """Reads image_path, caption and url of every image."""
    parquet = library("pyarrow.parquet")
    names = ("image_path", "caption", "url")
    try:
        table = parquet.read_table(existing_file(path, "index"), columns=list(names)).to_pydict()
        rows = list(zip(*(table[name] for name in names), strict=True))
    except UserError:
        raise
    except Exception as error:      # pyarrow raises many kinds for a bad file
        raise UserError(f"'{path}' is damaged ({first_line(error)}); {ANEW}.") from error
    if not all(isinstance(value, str) for value in chain.from_iterable(rows)):
        raise UserError(f"'{path}' is damaged: an image's path, caption or url is no text; {ANEW}.")
    return rows


def _read_vectors(path: Path) -> Any:
    """Reads an exact index of finite vectors; what faiss would read of other kinds is not looked into."""
    faiss = library("faiss")
    size = existing_file(path, "index").stat().st_size
    with path.open("rb") as file:
        start = file.read(_FLAT.size)
    if len(start) < _FLAT.size:
        start = bytes(_FLAT.size)               # of no kind, which is refused next
    kind, width, count, *_, numbers = _FLAT.unpack(start)
    if kind != b"IxFI" or width < 1 or count < 1 or numbers != width * count or size != _FLAT.size + 4 * numbers:
        raise UserError(f"'{path}' is damaged or of another kind; {ANEW}.")
    try:
        vectors = faiss.read_index(str(path))
    except Exception as error:      # faiss raises RuntimeError with a stack of its own
        raise UserError(f"'{path}' is damaged; {ANEW}.") from error
    if not np.isfinite(vectors.reconstruct_n(0, count)).all():
        raise UserError(f"'{path}' is damaged: it holds values that are not finite; {ANEW}.")
    return vectors


def _search_service(vectors: Any) -> Any:
    """Returns clip-retrieval's search over vectors: f(query (1, D), count, deduplicate) to similarities and numbers."""
    back = library("clip_retrieval.clip_back")
    fields = dict.fromkeys(field.name for field in dataclasses.fields(back.ClipResource))
    resource = back.ClipResource(**fields | {"image_index": vectors, "metadata_is_ordered_by_ivf": False})
    service = back.KnnService(clip_resources={})
    return lambda query, count, deduplicate: service.knn_search(query, "image", count, resource, deduplicate,
                                                                False, False)


class IndexServer:
    """Serves an index to callers on this machine; use it as a context, or `run` it.

    Requests that a web page in a browser could send are refused, addresses are not fetched, and of the files only
    images in the index's own folder are given out.

    Args:
        folder: what `build_index` made.
        port: 0 takes a free one.
        clip: the CLIP it was built with, if its file has moved.

    Raises:
        UserError: as `Index` does, or the port cannot be had.
    """

    def __init__(self, folder: Path, port: int = 1234, clip: str | None = None):
        if not 0 <= port <= 65535:
            raise UserError(f"--port {port} is none; choose one of 0 to 65535.")
        index = Index(Path(folder), clip)
        try:
            self._server = _Server(("127.0.0.1", port), index)
        except OSError as error:
            raise UserError(f"port {port} is taken or not allowed ({error.strerror}); choose another with --port."
                            ) from error
        self.folder, self.name = index.folder, index.name
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def run(self) -> None:
        """Serves until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def __enter__(self) -> IndexServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """A server whose handlers know the index, and whose log holds sentences only."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], index: Index):
        super().__init__(address, _Handler)
        self.index = index
        self.hosts = [f"{host}:{self.server_port}" for host in LOOPBACK]

    def handle_error(self, request: object, client_address: object) -> None:
        """Says in a line what went wrong; a caller that went away is no error of ours."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"a request failed ({first_line(error)})", flush=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    timeout = SECONDS            # for one read or write
    server_version, sys_version = "dci-ico", ""

    def handle(self) -> None:
        with Deadline(SECONDS) as self._deadline:        # for all that is read
            self._deadline.hold(self.connection)
            super().handle()

    def log_message(self, *arguments: object) -> None:
        """A line per request helps nobody here."""

    def do_GET(self) -> None:
        self._reply(INDICES, lambda: iter([self.server.index.name]))

    def do_POST(self) -> None:
        self._reply(KNN, self._find)

    def _reply(self, service: str, answer: Callable[[], Iterator[Any]]) -> None:
        """Sends the list of what `answer` returns, or in a sentence why there is nothing."""
        try:
            self._check(service)
            found = answer()
        except _Refused as why:
            return self._refuse(why.status, str(why))
        except Exception as error:      # whatever a library raises for a strange question
            print(f"a request failed ({first_line(error)})", flush=True)
            return self._refuse(500, f"the request failed ({first_line(error)})")
        self._send(found)

    def _check(self, service: str) -> None:
        """Refuses a request for something else, or of a caller that is not on this machine."""
        hosts = self.server.hosts
        # A browser says whose page it asks for; a foreign name that leads here stands in Host.
        origin = self.headers.get("Origin")
        foreign = origin is not None and origin.lower() not in [f"http://{host}" for host in hosts]
        if foreign or self.headers.get("Host", "").lower() not in hosts:
            raise _Refused(403, "only programs on this machine are answered")
        if self.path.partition("?")[0] != service:
            raise _Refused(404, f"there are GET {INDICES} and POST {KNN} alone")

    def _find(self) -> Iterator[dict[str, Any]]:
        """Reads a question and returns what it finds."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 20:
            raise _Refused(411, "the request must give its Content-Length")
        if int(length) > MOST_BYTES:
            raise _Refused(413, f"a request may have {MOST_BYTES:,} bytes")
        body = self.rfile.read(int(length))
        self._deadline.cancel()                          # the rest is our own work
        if len(body) < int(length):
            raise _Refused(408, "the request was cut short or took too long")
        return self.server.index.answer(read_question(body, self.server.index.name))

    def _refuse(self, status: int, message: str) -> None:
        self._begin(status)
        self.wfile.write(json.dumps({"message": message}).encode())

    def _send(self, found: Iterator[Any]) -> None:
        """Sends a list piece by piece; one that breaks off is no JSON."""
        self._begin(200)
        sign = b"["
        for entry in found:
            self.wfile.write(sign + json.dumps(entry).encode())
            sign = b","
        self.wfile.write(b"[]" if sign == b"[" else b"]")

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()


def read_question(body: bytes, name: str) -> _Question:
    """Reads the JSON of a question to the index of a name.

    Raises:
        _Refused: it is none, or asks for what is not done here.
    """
    try:
        question = read_record(_Question, body)
    except BadRecord as error:
        raise _Refused(400, f"the request is not understood: {error}") from error
    if question.image_url is not None:
        raise _Refused(400, "image_url is not fetched; send the image itself as image")
    if question.indice_name not in (None, name):
        raise _Refused(400, f"there is no such index; it is called '{name}'")
    if [question.text or None, question.image, question.embedding_input].count(None) != 2:
        raise _Refused(400, "the request must have one of text, image and embedding_input")
    return question
