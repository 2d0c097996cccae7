"""Fills a real_reg folder from a clip-retrieval server: ask, keep what fits, fetch in parallel, resume after a kill."""
from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from ldm.data.folder_lock import turn_in
from ldm.data.images import Unusable, decode
from ldm.data.regularization import CAPTIONS, IMAGES, URLS, class_caption, write_lists
from ldm.files import set_aside, write_text
from ldm.records import BadRecord, Record, read_record
from ldm.text import read_lines
from ldm.util import UserError, folder_name
from retrieval.answer import Answer, Found
from retrieval.client import Query, ask_server
from retrieval.clip import check_clip, text_similarities
from retrieval.download import Downloader
from retrieval.image_store import ImageStore

STATE, JOURNAL = ".retrieval.json", ".retrieval.log"
MOST_ASKED = 10_000   # images asked for in one query at most, as Custom Diffusion does
NEAR = 3.0            # mean difference of 8-bit levels below which two small versions count as the same image


@dataclass(frozen=True)
class Candidate:
    """An image the server named; `url` is empty where only its server has it, and then it came with the answer."""

    identity: str
    url: str
    caption: str


class State(Record):
    """What a set's folder says of its retrieval.

    Attributes:
        sought: what decided which images were found.
        asked: images the last query asked for.
        reasons: by number, why a candidate is left out.
        journaled: the journal says which images are the set's own; earlier versions noted only refusals there.
    """

    sought: dict[str, Any]
    asked: Annotated[int, Field(ge=0, le=MOST_ASKED)]
    candidates: list[Candidate]
    reasons: dict[int, str]
    journaled: bool = False


@dataclass(frozen=True)
class Retrieved:
    """What a retrieval ended with: the set's folder, how many images, how many were left out for which reason."""

    folder: Path
    images: int
    refused: dict[str, int]


class Retrieval:
    """One retrieval into one folder, which holds all there is to know: the candidates and what became of each.

    The folder is this process's own meanwhile (`turn_in`).

    Args:
        folder: where the set goes, real_reg/samples_<class>.
        downloader: fetches images.
        workers: downloads at a time.
        say: is told about progress, in lines.

    Raises:
        UserError: the folder holds a set of other origin, or one retrieved with other settings.
    """

    def __init__(self, folder: Path, query: Query, downloader: Downloader, workers: int = 8,
                 say: Callable[[str], None] = print):
        self.folder, self.query, self.say = folder, query, say
        self.store = ImageStore(folder / folder_name(query.class_noun), folder / JOURNAL, downloader, workers, say)
        self.candidates: list[Candidate] = []
        self.asked = 0                                     # images the last query asked for
        self._resume()

    def run(self) -> Retrieved:
        """Retrieves until there are enough images or no more candidates; the lists are whole after every round.

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
            self._ask_again(round_)
            self.store.fetch([(number, self.candidates[number].url) for number in round_])
            for number in round_:                          # in order, whatever came first, so that a rerun agrees
                if number not in self.store.reasons and self._is_new(number, accepted, shown):
                    accepted.append(number)
            place = round_.stop
            self._write(accepted)
        refused = tally(self.store.reasons.values())
        if not accepted:
            commonest = [f"{count} {reason}" for reason, count in refused.items()][:3]
            why = "; ".join(commonest) or "it named none"
            raise UserError(f"the server's {len(self.candidates)} images for '{self.query.sought}' cannot be used "
                            f"({why}); try another --text, --threshold or server.")
        return Retrieved(self.folder, len(accepted), refused)

    def _more_candidates(self, accepted: Sequence[int]) -> bool:
        """Asks for more; a server that is gone by now is no reason to give up what was found."""
        try:
            return self._ask_for_more()
        except UserError as error:
            if not accepted:
                raise
            self.say(f"{len(accepted)} of {self.query.num} images: {error}")
            return False

    def _resume(self) -> None:
        """Takes up what an earlier run in the same folder left."""
        state = self._read_state()
        if state is not None:
            self._refuse_other(state.sought)
            self.candidates, self.asked = state.candidates, state.asked
            if not state.journaled:
                self.store.adopt([number for number in range(len(self.candidates)) if number not in state.reasons])
                self._write_state()
            noted = {number: reason for number, reason in state.reasons.items() if number not in self.store.kept}
            self.store.reasons = noted | self.store.reasons                # the journal is the newer of the two
        # What lies beyond the candidates is of an answer that was not noted any more.
        for number in list(self.store.kept):
            if number >= len(self.candidates):
                self.store.remove(number)
        for number in list(self.store.reasons):
            if number >= len(self.candidates):
                del self.store.reasons[number]

    def _refuse_other(self, sought: Mapping[str, Any]) -> None:
        """Refuses what other settings found: a set must be all of one kind."""
        if sought == self._key():
            return
        changed = []
        for key, value in self._key().items():
            if sought.get(key) != value:
                changed.append(f"{key} was {sought.get(key)!r}, is {value!r}")
        raise UserError(f"'{self.folder}' was retrieved with other settings ({', '.join(changed)}); choose another "
                        "--out, or delete it.")

    def _read_state(self) -> State | None:
        """Reads what was noted; what is damaged is set aside, and what the lists tell of it is taken from them."""
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            return read_record(State, path.read_bytes())
        except BadRecord as error:
            set_aside(path, f"is damaged ({error})")
        state = State(sought=self._key(), asked=0, candidates=self._listed_candidates(), reasons={}, journaled=True)
        self.candidates = state.candidates
        self._write_state()
        return state

    def _listed_candidates(self) -> list[Candidate]:
        """Makes the candidates again from the set's lists; those between them are not known any more."""
        try:
            columns = [read_lines(self.folder / name, "list") for name in (IMAGES, CAPTIONS, URLS)]
        except UserError:
            return []
        listed = {}
        for name, caption, url in zip(*columns, strict=False):      # as far as all three go: one may be cut short
            stem = Path(name).stem
            if stem.isdecimal():
                listed[int(stem)] = Candidate(url or f"listed {name}", url, caption)
        candidates, unknown = [], {}
        for number in range(max(self.store.kept & set(listed), default=-1) + 1):
            candidates.append(listed.get(number, Candidate(f"lost {number}", "", "")))
            if number not in listed:
                unknown[number] = "is not known any more"
        self.store.reasons = unknown | self.store.reasons
        return candidates

    def _key(self) -> dict[str, Any]:
        """What decides which images are found; the server's address may change between two starts of it."""
        query = self.query
        return {"class_noun": query.class_noun, "text": query.sought, "deduplicate": query.deduplicate,
                "threshold": query.threshold if query.clip else None}

    def _ask_for_more(self) -> bool:
        """Asks the server for more candidates than so far; says whether there were any."""
        ask = min(MOST_ASKED, max(round(self.query.num * self.query.oversample), 2 * self.asked))
        if ask <= self.asked:
            return False
        known = {candidate.identity for candidate in self.candidates}
        start = len(self.candidates)
        with ask_server(self.query, ask) as answer:
            named = len(answer.found)
            for found in answer.found:
                if found.identity not in known and (found.url or found.place):
                    known.add(found.identity)
                    self.candidates.append(Candidate(found.identity, found.url, found.caption))
                    self._keep_given(len(self.candidates) - 1, answer, found)
        self._drop_unlike(range(start, len(self.candidates)))
        self.asked = ask
        self._write_state()
        new = len(self.candidates) - start
        self.say(f"'{self.query.sought}': the server names {named} images, {new} of them new")
        return new > 0

    def _write_state(self) -> None:
        state = State(sought=self._key(), asked=self.asked, candidates=self.candidates, reasons=self.store.reasons,
                      journaled=True)
        write_text(self.folder / STATE, state.model_dump_json())

    def _ask_again(self, numbers: Sequence[int]) -> None:
        """Asks once more for those images that only the server has, and that were lost here."""
        lost = {}
        for number in numbers:
            candidate = self.candidates[number]
            if not candidate.url and number not in self.store.reasons and not self.store.has(number):
                lost[candidate.identity] = number
        if not lost:
            return
        try:
            with ask_server(self.query, self.asked or MOST_ASKED) as answer:
                for found in answer.found:
                    if found.identity in lost:
                        self._keep_given(lost.pop(found.identity), answer, found)
        except UserError as error:
            self.say(str(error))
        self.store.reasons |= dict.fromkeys(lost.values(), "was lost, and its server does not give it again")

    def _keep_given(self, number: int, answer: Answer, found: Found) -> None:
        """Stores an image that came with the answer, if one did."""
        content = answer.image(found)
        if content is None:
            return
        try:
            self.store.keep(number, content)
        except Unusable as problem:
            if found.url:
                return                                     # it is fetched from there instead
            self.store.reasons[number] = "came without a readable image"
            if os.path.lexists(self.store.path(number)):   # another file has its name
                self.store.reasons[number] = str(problem)

    def _drop_unlike(self, numbers: Sequence[int]) -> None:
        """Leaves out candidates whose captions are not about the class, where a text encoder is at hand."""
        if self.query.clip is None or not numbers:
            return
        target = self.query.text or class_caption(self.query.class_noun)
        captions = [self.candidates[number].caption for number in numbers]
        cosines = text_similarities(self.query.clip, target, captions)
        for number, cosine in zip(numbers, cosines, strict=True):
            if cosine < self.query.threshold:
                self.store.remove(number)
                self.store.reasons[number] = f"has a caption unlike '{target}'"

    def _is_new(self, number: int, accepted: Sequence[int], shown: list[np.ndarray]) -> bool:
        """Says whether a fetched image shows something else than those accepted so far."""
        own = small_version(decode(self.store.path(number)).image)
        if shown:
            distances = np.abs(np.stack(shown) - own).mean(axis=(1, 2, 3))
            nearest = self.store.path(accepted[int(distances.argmin())])
            if distances.min() < NEAR:
                self.store.remove(number, f"shows the same as {nearest.name}")
                return False
        shown.append(own)
        return True

    def _write(self, accepted: Sequence[int]) -> None:
        """Writes the set's lists."""
        rows = []
        for number in accepted:
            candidate = self.candidates[number]
            caption = candidate.caption or class_caption(self.query.class_noun)
            rows.append((f"{self.store.folder.name}/{self.store.path(number).name}", caption, candidate.url))
        if rows:
            write_lists(self.folder, rows)


def retrieve(folder: Path, query: Query, downloader: Downloader, workers: int = 8,
             say: Callable[[str], None] = print) -> Retrieved:
    """Fills `folder` with images of a class in the real_reg format; see `Query` and `Retrieval`.

    Killed at any moment and started again it ends with the same files, and fetches nothing it has a second time.

    Raises:
        UserError: as `Retrieval` does.
    """
    folder = Path(folder)
    if query.clip is not None:
        check_clip(query.clip)
    refuse_foreign(folder, query.class_noun)
    with turn_in(folder, say):
        return Retrieval(folder, query, downloader, workers, say).run()


def is_retrieved(folder: Path) -> bool:
    """Says whether a set's folder is of a retrieval, finished or not."""
    return (folder / STATE).exists() or (folder / JOURNAL).exists()


def refuse_foreign(folder: Path, class_noun: str) -> None:
    """Refuses a folder with images or lists that no retrieval put there.

    Raises:
        UserError: it is one.
    """
    images = folder / folder_name(class_noun)
    try:
        if is_retrieved(folder):
            return
        there = [folder / name for name in (IMAGES, CAPTIONS, URLS) if os.path.lexists(folder / name)]
        if images.exists():
            there += [path for path in images.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"'{images}' cannot be used as a folder ({error.strerror}); choose another --out.") from error
    if there:
        raise UserError(f"'{folder}' holds a set that was not retrieved, '{there[0].name}' for one; choose another "
                        "--out, or use it as it is (data.reg.mode=folder).")


def small_version(image: Image.Image) -> np.ndarray:
    """Returns (8, 8, 3) mean colors, float32 in [0, 255]: nearly equal for copies of any size and compression."""
    return np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=np.float32)


def tally(reasons: Iterable[str]) -> dict[str, int]:
    """Counts reasons of one kind, the commonest first; details in brackets and names of files make no other kind."""
    kinds = Counter()
    for reason in reasons:
        kind = re.sub(r" \([^()]*\)$", "", reason)
        kinds[re.sub(r"\S+\.jpg$", "another image", kind)] += 1
    return dict(kinds.most_common())
