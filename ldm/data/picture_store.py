"""A folder of numbered pictures that fills from the web: parallel, each kept or refused once, whatever kills it."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ldm.data.download import Downloader, Refused
from ldm.data.images import Unusable, decode
from ldm.data.regularization import save_jpeg
from ldm.util import UserError

LARGEST = 1024        # shorter side in px of what is kept: twice what SD v1 sees


def shrunk(image: Image.Image, largest: int = LARGEST) -> Image.Image:
    """Returns a picture whose shorter side is at most `largest` px."""
    if min(image.size) <= largest:
        return image
    scale = largest / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)


class PictureStore:
    """Pictures 00000.jpg, 00001.jpg, ... and a journal of the numbers there will be none of.

    Args:
        folder: where the pictures go.
        journal: one line "number<tab>reason" per refused picture; what a killed run was writing beside it or in
            `folder` is cleared away.
        workers: downloads at a time.
        say: is told about progress, in lines.
    """

    def __init__(self, folder: Path, journal: Path, downloader: Downloader, workers: int = 8,
                 say: Callable[[str], None] = print):
        self.folder, self.journal, self.downloader = folder, journal, downloader
        self.workers, self.say = workers, say
        self.reasons: dict[int, str] = {}
        self._lock, self._decoding = threading.Lock(), threading.Semaphore(2)
        for part in (*folder.glob(".*.part"), *journal.parent.glob(".*.part")):
            part.unlink(missing_ok=True)
        self._read_journal()

    def _read_journal(self) -> None:
        with suppress(FileNotFoundError):
            text = self.journal.read_text(encoding="utf-8", errors="replace")
            if not text.endswith("\n"):                    # the last line was cut short
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write("\n")
            for number, tab, reason in (line.partition("\t") for line in text.split("\n")):
                if tab and number.isdecimal():
                    self.reasons[int(number)] = reason

    def path(self, number: int) -> Path:
        """Where a picture is, or goes."""
        return self.folder / f"{number:05d}.jpg"

    def keep(self, number: int, content: bytes) -> None:
        """Stores the bytes of a picture as an upright RGB JPEG.

        Raises:
            Unusable: they give no picture.
            UserError: the disk refuses.
        """
        with self._decoding:                               # big pictures take memory: a few at a time
            save_jpeg(shrunk(decode(content).image), self.path(number))

    def refuse(self, number: int, reason: str) -> None:
        """Notes at once, for this run and the next, why there is no picture of a number.

        Raises:
            UserError: the disk refuses.
        """
        with self._lock:
            self.reasons[number] = " ".join(reason.split())
            try:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write(f"{number}\t{self.reasons[number]}\n")
            except OSError as error:
                raise UserError(f"'{self.journal}' could not be written ({error}); free some space and start again: "
                                "what was fetched is kept.") from error

    def fetch(self, addresses: Mapping[int, str] | Sequence[tuple[int, str]]) -> None:
        """Fetches the pictures of (number, url) pairs of which nothing is known yet.

        Raises:
            UserError: the disk refuses.
        """
        unknown = [(number, url) for number, url in dict(addresses).items()
                   if number not in self.reasons and not self.path(number).exists()]
        if not unknown:
            return
        pool = ThreadPoolExecutor(self.workers)
        try:
            for done, _ in enumerate(pool.map(lambda pair: self._fetch_one(*pair), unknown), 1):
                if done % 50 == 0 or done == len(unknown):
                    self.say(f"fetched {done} of {len(unknown)}")
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch_one(self, number: int, url: str) -> None:
        try:
            self.keep(number, self.downloader.fetch(url))
        except (Refused, Unusable) as problem:
            self.refuse(number, str(problem))
