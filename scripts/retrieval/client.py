"""Asks a clip-retrieval server for images, and says in one sentence what is wrong with it."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

from ldm.records import BadRecord, parse_json
from ldm.util import UserError
from retrieval.answer import CHUNK, Answer, NoList, printable
from retrieval.download import AGENT, Deadline, guarded_pool, why_failed

MISSING = "this Python has no package clip-retrieval"
SETUP = "`python scripts/retrieve.py setup` makes an environment that has it"
LARGEST_ANSWER = 1_000_000_000  # bytes of one answer, which waits on the disk: some thousand images
IN_MEMORY = 16_000_000      # bytes of an answer that need no disk
CONNECT = 10.0              # seconds
NAMES = 100_000             # bytes of a list of indices
ALTERNATIVES = ("start one (scripts/retrieve.py index, then serve), name another with --url, draw the images "
                "(data.reg.mode=generate), or put some in a folder (data.reg.mode=folder)")


def change_environment(script: Path, arguments: Sequence[str]) -> None:
    """Runs a script of this repository again with the Python of .venv-retrieval, where this one lacks clip-retrieval.

    Raises:
        UserError: there is no such Python, or clip-retrieval is not in it either.
    """
    if importlib.util.find_spec("clip_retrieval") is not None:
        return
    root = script.resolve().parents[1]
    folder = root / ".venv-retrieval"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists() or Path(sys.prefix).resolve() == folder.resolve():
        raise UserError(f"{MISSING}; {SETUP}.")
    os.environ["PYTHONPATH"] = str(root)    # and nothing of this Python's packages
    command = [str(python), str(script), *arguments]
    if os.name == "nt":                     # there execv would return to the shell at once
        sys.exit(subprocess.call(command))
    os.execv(python, command)


@dataclass(frozen=True)
class Query:
    """What to retrieve, and from where.

    Attributes:
        class_noun: names the folder, and is asked for unless `text` says otherwise.
        num: images wanted.
        url: the server, http://host:port or with its /knn-service path.
        index: the server's index; None takes its first.
        oversample: candidates asked for per image wanted.
        clip: a CLIP to compare captions with, as clip-retrieval names them ("ViT-B/32", "open_clip:NAME/FILE");
            None keeps every caption.
        threshold: cosine a caption must have with "a photo of a <noun>" (Custom Diffusion's value).
        deduplicate: lets the server leave out images its CLIP finds alike.
        timeout: seconds the server may take for one answer, with all that has to be asked for it.
    """

    class_noun: str
    num: int = 200
    url: str | None = None
    index: str | None = None
    text: str | None = None
    oversample: float = 2.0
    clip: str | None = None
    threshold: float = 0.85
    deduplicate: bool = True
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.class_noun.strip():
            raise UserError("the class noun is empty; say what to retrieve, as in --class_noun cat.")
        if self.num < 1 or self.oversample < 1:
            raise UserError(f"num {self.num} and oversample {self.oversample:g} must both be at least 1.")

    @property
    def sought(self) -> str:
        """The text the server is asked for."""
        return self.text or self.class_noun


def ask_server(query: Query, count: int) -> Answer:
    """Returns up to `count` images a clip-retrieval server names, best first.

    Nothing it sends is inflated, followed or kept in memory beyond one entry; `query.timeout` bounds all of it.

    Raises:
        UserError: no server is named, it does not answer, it lacks the index, or it answers something else.
    """
    if not query.url:
        raise UserError(f"no clip-retrieval server is named; {ALTERNATIVES}.")
    url = query.url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url '{query.url}' is no http or https address; {ALTERNATIVES}.")
    if url.count("/") == 2:                  # no path beside http://
        url += "/knn-service"
    with Deadline(query.timeout) as deadline:
        failure = None
        try:
            file = _Server(url, query.timeout).ask(query, count)
        except (HTTPError, OSError, ValueError) as error:
            failure = error
    if deadline.expired:             # what breaks off may look whole
        raise UserError(f"the server '{url}' did not answer within {query.timeout:g} s; {ALTERNATIVES}.") from failure
    if failure is not None:
        raise UserError(f"the server '{url}' does not answer ({why_failed(failure)}); {ALTERNATIVES}.") from failure
    return _read(file, count, url)


def _read(file: IO[bytes], count: int, url: str) -> Answer:
    """Makes an answer of what a server sent."""
    try:
        return Answer(file, count)
    except NoList as other:
        if isinstance(other.content, dict) and "message" in other.content:
            raise UserError(f"the server '{url}' answers '{printable(str(other.content['message']), 100)}'; check "
                            f"--index, or {ALTERNATIVES}.") from other
        raise UserError(f"the server '{url}' answers something that is no list of images; {ALTERNATIVES}."
                        ) from other
    except ValueError as error:
        raise UserError(f"the server '{url}' answers something that is no JSON, or absurdly large; {ALTERNATIVES}."
                        ) from error


class _Server:
    """A clip-retrieval server's two services."""

    def __init__(self, url: str, seconds: float):
        self.url = url
        self._pool = guarded_pool(False, Timeout(connect=min(seconds, CONNECT), read=seconds), allow_private=True)

    def ask(self, query: Query, count: int) -> IO[bytes]:
        """Sends a query; returns a file of what came back, at its beginning."""
        question = {"text": query.sought, "image": None, "image_url": None, "embedding_input": None,
                    "modality": "image", "num_images": count, "num_result_ids": count,
                    "indice_name": self._index(query.index), "deduplicate": query.deduplicate, "use_mclip": False,
                    "use_safety_model": True, "use_violence_detector": True, "aesthetic_score": 9,
                    "aesthetic_weight": 0.1}
        file = tempfile.SpooledTemporaryFile(IN_MEMORY)
        try:
            self._fetch("POST", self.url, LARGEST_ANSWER, file, json.dumps(question).encode())
        except BaseException:
            file.close()
            raise
        return file

    def _index(self, wanted: str | None) -> str | None:
        """Returns the index to ask: the named one if the server has it, else its first; None where it does not tell."""
        names = [name for name in self._indices() if isinstance(name, str) and name]
        if not names:
            return wanted
        if wanted is not None and wanted not in names:
            has = printable(", ".join(names[:10]), 300)
            raise UserError(f"the server '{self.url}' has no index '{wanted}'; it has {has}.")
        return names[0] if wanted is None else wanted

    def _indices(self) -> list[Any]:
        """Returns what the server lists as its indices; nothing where it lists none."""
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
            if self._fetch("GET", f"{self.url.rpartition('/')[0]}/indices-list", NAMES, file) != 200:
                return []
            file.seek(0)
            try:
                names = parse_json(file.read())
            except BadRecord:
                return []
        return names if isinstance(names, list) else []

    def _fetch(self, method: str, url: str, most: int, file: IO[bytes], body: bytes | None = None) -> int:
        """Writes an answer of `most` bytes at most to a file, as it is sent, and returns its status."""
        # Not inflated: a small answer could unfold to more than the disk holds.
        headers = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Connection": "close"}
        if body:
            headers["Content-Type"] = "application/json"
        response = self._pool.request(method, url, body=body, headers=headers, redirect=False, preload_content=False,
                                      decode_content=False)
        try:
            self._copy(response, file, most)
        finally:
            response.close()
        if 300 <= response.status < 400:
            raise UserError(f"the server '{self.url}' sends on to another, which is not followed; {ALTERNATIVES}.")
        return response.status

    def _copy(self, response: urllib3.BaseHTTPResponse, file: IO[bytes], most: int) -> None:
        """Copies an answer's bytes as they come."""
        left = most
        while chunk := response.read(CHUNK, decode_content=False):
            left -= len(chunk)
            if left < 0:
                raise UserError(f"the server '{self.url}' answers more than {most:,} bytes; {ALTERNATIVES}.")
            file.write(chunk)
