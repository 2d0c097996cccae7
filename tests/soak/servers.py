"""Hostile clip-retrieval servers: a sentence or no images, soon and in little memory.

What they do is listed in tests/web.py.
"""
from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from pathlib import Path

import web
from retrieval.client import Query
from retrieval.download import Downloader
from retrieval.image_set import retrieve

from ldm.util import UserError
from soak.campaign import Campaign, brief

COUNT = 51
SECONDS = 3.0           # that a server may take to answer
MEMORY = 200_000        # kB that its answer may cost
FINE, BAD = 0, 1


def run(campaign: Campaign) -> None:
    hostile = getattr(web, "HOSTILE", {})
    for index, rng, folder in campaign.cases() if hostile else ():
        name, door = list(hostile)[index % len(hostile)], rng.choice(["answer", "answer", "indices"])
        with web.Web() as server:
            server.offer(3)
            setattr(server, door, hostile[name])
            problem = asked(server.url, folder, campaign.slack)
        campaign.fail(f"{name} as {door}: {problem}") if problem else campaign.count_as("borne")


def asked(url: str, folder: Path, slack: float) -> str | None:
    """Asks a server in a child; says what went wrong."""
    begun = time.monotonic()
    if not (process := os.fork()):
        child(url, folder)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seconds = time.monotonic() - begun
    if status:
        return (folder / "problem").read_text() if (folder / "problem").exists() else f"the process died ({status})"
    limit = 2 * SECONDS + slack         # it may be asked twice: for its indices, and for images
    return f"it held the retrieval up for {seconds:.0f} s" if seconds > limit else None


def child(url: str, folder: Path) -> None:
    before, problem = memory(), ""
    try:
        retrieve(folder / "set", Query("cat", 3, url, timeout=SECONDS), Downloader(allow_private=True), say=str)
    except UserError as error:
        problem = "" if str(error).isprintable() and len(str(error)) < 2000 else f"no sentence: {str(error)[:200]!r}"
    except BaseException:
        problem = brief(traceback.format_exc())
    if memory() - before > MEMORY:
        problem = f"it took {(memory() - before) / 1000:.0f} MB; {problem}"
    if problem:
        (folder / "problem").write_text(problem)
    sys.stdout.flush()
    os._exit(BAD if problem else FINE)


def memory() -> int:
    """Returns the most memory this process has had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
