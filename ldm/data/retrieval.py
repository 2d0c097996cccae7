"""Fills a real_reg folder from a clip-retrieval server: ask, keep what fits, fetch in parallel, resume after a kill."""
from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.clip_client import Query, ask_server
from ldm.data.download import Downloader
from ldm.data.images import Unusable
from ldm.data.picture_store import PictureStore
from ldm.data.regularization import IMAGES, class_caption, write_lists
from ldm.files import write_atomically
from ldm.util import UserError, folder_name

STATE, JOURNAL = ".retrieval.json", ".retrieval.log"
MOST_ASKED = 10_000   # pictures asked for in one query at most, as Custom Diffusion does
NEAR = 3.0            # mean difference of 8-bit levels below which two small versions count as the same picture


@dataclass(frozen=True)
class Candidate:
    """A picture the server named; `url` is empty where only its server has it, and then it came with the answer."""

    identity: str
    url: str
    caption: str


@dataclass(frozen=True)
class Retrieved:
    """What a retrieval ended with: the set's folder, how many pictures, how many were left out for which reason."""

    folder: Path
    pictures: int
    refused: dict[str, int]


class Retrieval:
    """One retrieval into one folder, which holds all there is to know: the candidates and what became of each.

    Args:
        folder: where the set goes, real_reg/samples_<class>.
        downloader: fetches pictures.
        workers: downloads at a time.
        say: is told about progress, in lines.

    Raises:
        UserError: the folder holds a set of other origin, or one retrieved with other settings.
    """

    def __init__(self, folder: Path, query: Query, downloader: Downloader, workers: int = 8,
                 say: Callable[[str], None] = print):
        self.folder, self.query, self.say = folder, query, say
        self.store = PictureStore(folder / folder_name(query.class_noun), folder / JOURNAL, downloader, workers, say)
        self.candidates: list[Candidate] = []
        self.asked = 0                                     # pictures the last query asked for
        self._resume()

    def run(self) -> Retrieved:
        """Retrieves until there are enough pictures or no more candidates; the lists are whole after every round.

        Raises:
            UserError: the server is needed and does not answer, nothing found is usable, or the disk refuses.
        """
        accepted: list[int] = []
        shown: list[np.ndarray] = []
        place = 0
        while len(accepted) < self.query.num:
            round_ = range(place, min(place + self.query.num - len(accepted), len(self.candidates)))
            if not round_:
                if not self._more_candidates(accepted):
                    break
                continue
            self.store.fetch([(number, self.candidates[number].url) for number in round_])
            for number in round_:                          # in order, whatever came first, so that a rerun agrees
                if number not in self.store.reasons and self._is_new(number, accepted, shown):
                    accepted.append(number)
            place = round_.stop
            self._write(accepted)
        refused = tally(self.store.reasons.values())
        if not accepted:
            why = "; ".join(f"{count} {reason}" for reason, count in list(refused.items())[:3]) or "it named none"
            raise UserError(f"the server's {len(self.candidates)} pictures for '{self.query.sought}' cannot be used "
                            f"({why}); try another --text, --threshold or server.")
        return Retrieved(self.folder, len(accepted), refused)

    def _more_candidates(self, accepted: Sequence[int]) -> bool:
        """Asks for more; a server that is gone by now is no reason to give up what was found."""
        try:
            return self._ask_for_more()
        except UserError as error:
            if not accepted:
                raise
            self.say(f"{len(accepted)} of {self.query.num} pictures: {error}")
            return False

    def _resume(self) -> None:
        """Takes up what an earlier run in the same folder left."""
        state = self.folder / STATE
        if not state.exists():
            if (self.folder / IMAGES).exists():
                raise UserError(f"'{self.folder}' holds a set that was not retrieved; choose another --out, or use it "
                                "as it is.")
        else:
            try:
                content = json.loads(state.read_text(encoding="utf-8"))
                self.candidates = [Candidate(**entry) for entry in content["candidates"]]
                self.store.reasons |= {int(number): reason for number, reason in content["reasons"].items()}
                earlier, self.asked = dict(content["sought"]), int(content["asked"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"'{state}' is damaged; delete '{self.folder}' to start over.") from error
            if earlier != self._key():
                changed = ", ".join(f"{key} was {earlier.get(key)!r}, is {value!r}"
                                    for key, value in self._key().items() if earlier.get(key) != value)
                raise UserError(f"'{self.folder}' was retrieved with other settings ({changed}); choose another --out, "
                                "or delete it.")
        for path in self.store.folder.glob("*.jpg"):       # of an answer that was not noted any more
            if path.stem.isdecimal() and int(path.stem) >= len(self.candidates):
                path.unlink()

    def _key(self) -> dict[str, Any]:
        """What decides which pictures are found; the server's address may change between two starts of it."""
        query = self.query
        return {"class_noun": query.class_noun, "text": query.sought, "deduplicate": query.deduplicate,
                "threshold": query.threshold if query.clip else None}

    def _ask_for_more(self) -> bool:
        """Asks the server for more candidates than so far; says whether there were any."""
        ask = min(MOST_ASKED, max(round(self.query.num * self.query.oversample), 2 * self.asked))
        if ask <= self.asked:
            return False
        answer = ask_server(self.query, ask)
        known, start = {candidate.identity for candidate in self.candidates}, len(self.candidates)
        for entry in answer:
            url, image = _text(entry.get("url")), _text(entry.get("image"))
            identity = url or f"id {entry.get('id')}"
            if identity not in known and (url or image):
                known.add(identity)
                self.candidates.append(Candidate(identity, url, " ".join(_text(entry.get("caption")).split())))
                self._keep_given(len(self.candidates) - 1, image)
        self._drop_unlike(range(start, len(self.candidates)))
        self.asked = ask
        content = {"sought": self._key(), "asked": ask, "reasons": self.store.reasons,
                   "candidates": [asdict(candidate) for candidate in self.candidates]}
        write_atomically(self.folder / STATE, lambda part: part.write_text(json.dumps(content), encoding="utf-8"))
        new = len(self.candidates) - start
        self.say(f"'{self.query.sought}': the server names {len(answer)} pictures, {new} of them new")
        return new > 0

    def _keep_given(self, number: int, image: str) -> None:
        """Stores a picture that came with the answer, if one did."""
        if not image:
            return
        try:
            self.store.keep(number, base64.b64decode(image, validate=True))
        except (binascii.Error, Unusable):
            if not self.candidates[number].url:
                self.store.reasons[number] = "came without a readable picture"

    def _drop_unlike(self, numbers: Sequence[int]) -> None:
        """Leaves out candidates whose captions are not about the class, where a text encoder is at hand."""
        if self.query.clip is None or not numbers:
            return
        from ldm.data.clip_index import text_similarities
        target = self.query.text or class_caption(self.query.class_noun)
        cosines = text_similarities(self.query.clip, target, [self.candidates[number].caption for number in numbers])
        for number, cosine in zip(numbers, cosines, strict=True):
            if cosine < self.query.threshold:
                self.store.reasons[number] = f"has a caption unlike '{target}'"
                self.store.path(number).unlink(missing_ok=True)

    def _is_new(self, number: int, accepted: Sequence[int], shown: list[np.ndarray]) -> bool:
        """Says whether a fetched picture shows something else than those accepted so far."""
        path = self.store.path(number)
        with Image.open(path) as image:
            own = small_version(image)
        distances = np.abs(np.stack(shown) - own).mean(axis=(1, 2, 3)) if shown else np.array([np.inf])
        if distances.min() < NEAR:
            self.store.refuse(number, f"shows the same as {self.store.path(accepted[int(distances.argmin())]).name}")
            path.unlink()
            return False
        shown.append(own)
        return True

    def _write(self, accepted: Sequence[int]) -> None:
        """Writes the set's lists."""
        rows = [(f"{self.store.folder.name}/{self.store.path(number).name}",
                 self.candidates[number].caption or class_caption(self.query.class_noun), self.candidates[number].url)
                for number in accepted]
        if rows:
            write_lists(self.folder, rows)


def retrieve(folder: Path, query: Query, downloader: Downloader, workers: int = 8,
             say: Callable[[str], None] = print) -> Retrieved:
    """Fills `folder` with pictures of a class in the real_reg format; see `Query` and `Retrieval`.

    Killed at any moment and started again it ends with the same files, and fetches nothing it has a second time.

    Raises:
        UserError: as `Retrieval` does.
    """
    return Retrieval(Path(folder), query, downloader, workers, say).run()


def small_version(image: Image.Image) -> np.ndarray:
    """Returns (8, 8, 3) mean colours, float32 in [0, 255]: nearly equal for copies of any size and compression."""
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=np.float32)


def tally(reasons: Iterable[str]) -> dict[str, int]:
    """Counts reasons of one kind, the commonest first; details in brackets and names of files make no other kind."""
    kinds = (re.sub(r"\S+\.jpg$", "another picture", re.sub(r" \([^()]*\)$", "", reason)) for reason in reasons)
    return dict(Counter(kinds).most_common())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
