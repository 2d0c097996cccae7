"""Asks a clip-retrieval server for pictures, and says in one sentence what is wrong with it."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm.util import UserError

MISSING = "this Python has no package clip-retrieval"
SETUP = "`python scripts/retrieve.py setup` makes an environment that has it"
ALTERNATIVES = ("start one (scripts/retrieve.py index, then serve), name another with --url, draw the pictures "
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
        num: pictures wanted.
        url: the server, http://host:port or with its /knn-service path.
        index: the server's index; None takes its first.
        oversample: candidates asked for per picture wanted.
        clip: a CLIP to compare captions with, as clip-retrieval names them ("ViT-B/32", "open_clip:NAME/FILE");
            None keeps every caption.
        threshold: cosine a caption must have with "a photo of a <noun>" (Custom Diffusion's value).
        deduplicate: lets the server leave out pictures its CLIP finds alike.
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


def ask_server(query: Query, count: int) -> list[dict[str, Any]]:
    """Returns up to `count` entries {url, caption, similarity, ...} of a clip-retrieval server, best first.

    Raises:
        UserError: no server is named, it does not answer, it lacks the index, or it answers something else.
    """
    if not query.url:
        raise UserError(f"no clip-retrieval server is named; {ALTERNATIVES}.")
    url = query.url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url '{query.url}' is no http or https address; {ALTERNATIVES}.")
    url = url if url.count("/") > 2 else f"{url}/knn-service"
    answer = _within(query.timeout, lambda: _answer(url, query, count), url)
    if isinstance(answer, dict) and "message" in answer:
        raise UserError(f"the server '{url}' answers '{str(answer['message'])[:100]}'; check --index, or "
                        f"{ALTERNATIVES}.")
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        raise UserError(f"the server '{url}' answers something that is no list of pictures; {ALTERNATIVES}.")
    return answer


def _answer(url: str, query: Query, count: int) -> Any:
    """Returns what the server says, whatever it is."""
    client = _library().ClipClient(url=url, indice_name=_choose_index(url, query.index), num_images=count,
                                   aesthetic_weight=0.1, deduplicate=query.deduplicate)
    return client.query(text=query.sought)


@cache
def _library() -> ModuleType:
    """Imports clip-retrieval's client alone: the package's own import loads every model library it can use."""
    package = importlib.util.find_spec("clip_retrieval")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"{MISSING}; {SETUP}.")
    path = Path(package.submodule_search_locations[0]) / "clip_client.py"
    spec = importlib.util.spec_from_file_location("clip_retrieval_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _choose_index(url: str, index: str | None) -> str | None:
    """Returns the index to ask: the named one if the server has it, else its first; None where it does not tell."""
    import requests
    try:
        answer = requests.get(f"{url.rpartition('/')[0]}/indices-list", timeout=10)
        names = answer.json() if answer.ok else []
    except ValueError:
        return index
    if not isinstance(names, list) or not names:
        return index
    if index is not None and index not in names:
        raise UserError(f"the server '{url}' has no index '{index}'; it has {', '.join(map(str, names[:10]))}.")
    return index if index is not None else str(names[0])


def _within(seconds: float, ask: Callable[[], Any], url: str) -> Any:
    """Returns what `ask` returns, or refuses in words once `seconds` are over, however the server spends them."""
    import requests
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(ask())
        except Exception as error:      # told by the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UserError(f"the server '{url}' did not answer within {seconds:g} s; {ALTERNATIVES}.")
    if isinstance(outcome[0], ValueError):
        raise UserError(f"the server '{url}' answers something that is no JSON; {ALTERNATIVES}.") from outcome[0]
    if isinstance(outcome[0], requests.RequestException):
        raise UserError(f"the server '{url}' does not answer ({type(outcome[0]).__name__}); {ALTERNATIVES}."
                        ) from outcome[0]
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
