"""A folder of numbered images that fills from the web: parallel, each kept or refused once, whatever kills it."""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ldm.data.images import Unusable, decode, why_unusable
from ldm.data.regularization import save_jpeg
from ldm.files import NameTaken, append_durably, set_aside
from ldm.util import UserError
from retrieval.download import Downloader, Refused

LARGEST_SIDE = 1024        # shorter side in px of what is kept: twice what SD v1 sees
KEPT, REMOVING, GONE = "kept", "removing", "gone"       # in the journal, where else a reason stands
TAKEN = "would take the name of a file that is not of this set"


def shrunk(image: Image.Image, largest: int = LARGEST_SIDE) -> Image.Image:
    """Returns an image whose shorter side is at most `largest` px."""
    if min(image.size) <= largest:
        return image
    scale = largest / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)


class ImageStore:
    """Images 00000.jpg, 00001.jpg, ... and a journal of which of them are its own and which there will be none of.

    Only what the journal says is its own is taken for one of its images, replaced or removed. The journal is on the
    disk before an image gets its name.

    Args:
        folder: where the images go.
        journal: lines "number<tab>kept", "number<tab>removing<tab>reason", "number<tab>gone" or "number<tab>reason",
            of which the last of a number counts.
        workers: downloads at a time.
        say: is told about progress, in lines.

    Attributes:
        kept: numbers whose files are its own.
        reasons: of the numbers there will be no image of.
    """

    def __init__(self, folder: Path, journal: Path, downloader: Downloader, workers: int = 8,
                 say: Callable[[str], None] = print):
        self.folder, self.journal, self.downloader = folder, journal, downloader
        self.workers, self.say = workers, say
        self.reasons: dict[int, str] = {}
        self.kept: set[int] = set()
        self._sound: set[int] = set()                      # those known to decode
        self._lock, self._decoding = threading.Lock(), threading.Semaphore(2)
        self._read_journal()

    def _read_journal(self) -> None:
        with suppress(FileNotFoundError):
            text = self.journal.read_text(encoding="utf-8", errors="replace")
            if not text.endswith("\n"):                    # the last line was cut short
                self._append("\n")
            half_done = {}
            for line in text.split("\n"):
                digits, tab, record = line.partition("\t")
                if not tab or not digits.isdecimal():
                    continue
                number = int(digits)
                half_done.pop(number, None)                # a later line says how the removal ended
                if record.startswith(f"{REMOVING}\t"):
                    half_done[number] = record.partition("\t")[2]
                self._follow(number, record)
            for number, reason in half_done.items():
                self.remove(number, reason)

    def _follow(self, number: int, record: str) -> None:
        """Takes what the journal says of a number, or is told now."""
        if record == KEPT or record.startswith(f"{REMOVING}\t"):
            self.kept.add(number)
            self.reasons.pop(number, None)
            return
        self.kept.discard(number)
        self.reasons.pop(number, None)
        if record != GONE:
            self.reasons[number] = record

    def _note(self, numbers: Sequence[int], record: str) -> None:
        """Notes the same of several numbers, for this run and the next."""
        with self._lock:
            self._append("".join(f"{number}\t{record}\n" for number in numbers))
            for number in numbers:
                self._follow(number, record)

    def _append(self, text: str) -> None:
        try:
            append_durably(self.journal, text)
        except OSError as error:
            raise UserError(f"'{self.journal}' could not be written ({error}); free some space and start again: "
                            "what was fetched is kept.") from error

    def path(self, number: int) -> Path:
        """Where an image is, or goes."""
        return self.folder / f"{number:05d}.jpg"

    def has(self, number: int) -> bool:
        """Says whether an image is there; one that no longer decodes is set aside."""
        if number not in self.kept or not self.path(number).is_file():
            return False
        if number not in self._sound:
            problem = why_unusable(self.path(number))
            if problem:
                set_aside(self.path(number), problem)
                return False
            self._sound.add(number)
        return True

    def adopt(self, numbers: Sequence[int]) -> None:
        """Takes the files of these numbers for its own: an earlier version kept them, which noted only refusals.

        Raises:
            UserError: the disk refuses.
        """
        self._note([number for number in numbers if self.path(number).is_file()], KEPT)

    def keep(self, number: int, source: Path | bytes) -> None:
        """Stores an image, a file or the bytes of one, as an upright RGB JPEG.

        Raises:
            Unusable: it gives no image, or another file has the name.
            UserError: the disk refuses.
        """
        with self._decoding:                               # big images take memory: a few at a time
            image = shrunk(decode(source).image)
        if os.path.lexists(self.path(number)):
            raise Unusable(TAKEN)
        self._note([number], KEPT)                         # before the file: one without a note would be a stranger's
        try:
            save_jpeg(image, self.path(number), new=True)
        except NameTaken as error:
            self._note([number], GONE)
            raise Unusable(TAKEN) from error
        self._sound.add(number)

    def remove(self, number: int, reason: str = GONE) -> None:
        """Removes an image of its own, and notes why there will be none; without a reason there may be one again.

        Raises:
            UserError: the disk refuses.
        """
        if number not in self.kept:
            return
        reason = " ".join(reason.split())
        self._note([number], f"{REMOVING}\t{reason}")
        try:
            self.path(number).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"'{self.path(number)}' could not be removed ({error}); check its folder.") from error
        self._note([number], reason)

    def fetch(self, addresses: Mapping[int, str] | Sequence[tuple[int, str]]) -> None:
        """Fetches the images of (number, url) pairs of which nothing is known yet.

        Raises:
            UserError: the disk refuses.
        """
        unknown = []
        for number, url in dict(addresses).items():
            if number not in self.reasons and not self.has(number):
                unknown.append((number, url))
        if not unknown:
            return
        pool = ThreadPoolExecutor(self.workers)
        try:
            for done, _ in enumerate(pool.map(lambda pair: self._fetch_one(*pair), unknown), 1):
                if done % 50 == 0 or done == len(unknown):
                    self.say(f"fetched {done} of {len(unknown)}")
        finally:                                           # what is not begun would go on after an interrupt
            pool.shutdown(cancel_futures=True)

    def _fetch_one(self, number: int, url: str) -> None:
        try:
            self.keep(number, self.downloader.fetch(url))
        except (Refused, Unusable) as problem:
            self._note([number], " ".join(str(problem).split()))          # a journal's record is one line
