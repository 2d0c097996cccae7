"""What a sweep has on disk: names that follow from all that decides what is in a file, and what is still missing."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import Field

from experiments.jobs import BASE, Job, Subject, SweepConfig, digest
from ldm.data.captions import CAPTIONS, IMAGES
from ldm.data.images import size_of
from ldm.data.listing import list_images
from ldm.files import set_aside
from ldm.records import Record, load_record
from ldm.util import UserError, shipped

VOLATILE = ("device", "batch_size", "compile")      # sampling settings that do not change images


class Stored(Record):
    """What is on disk of a job: its rows, the seconds it took and those of them that fine-tuning took."""

    rows: list[dict[str, Any]]
    seconds: Annotated[float, Field(ge=0)]
    taught: Annotated[float, Field(ge=0)]


class Store:
    """A sweep's folder. Layout: runs/ (fine-tuning), pictures/ and points/ (one folder and one JSON file per job).

    Args:
        measured_by: the metrics, as the scorer records them.
        identity: returns the base model's, which takes a while: the model is loaded for it.
    """

    def __init__(self, config: SweepConfig, outdir: Path, subjects: Mapping[str, Subject],
                 measured_by: Mapping[str, Any], identity: Callable[[], Mapping[str, str]]):
        self.config, self.outdir, self.subjects = config, outdir, subjects
        self._measured_by, self._identity = measured_by, identity
        self._settings: dict[Job, Any] = {}     # merging takes a while, and every path asks
        self._keys: dict[Job, str] = {}
        self._fingerprint = cache(fingerprint)  # of this sweep alone: a later one may find other files

    def settings(self, job: Job) -> Any:
        """Returns a job's sampling configuration."""
        if job.point not in self._settings:
            self._settings[job.point] = job.sampling(self.config)
        return self._settings[job.point]

    def key(self, job: Job) -> str:
        """Names a job's images by everything that decides them; a setting that is the default's changes nothing."""
        if job not in self._keys:
            sampling = OmegaConf.to_container(self.settings(job))
            for name in VOLATILE:
                del sampling[name]
            prompts = job.prompts(self.subjects[job.concept])
            content = [prompts, job.words, sampling, job.step, self.training_key(job), self._identity()]
            strength = "" if job.strength is None else f"-lambda{job.strength:g}"
            name = f"{job.concept}-{job.method}-{job.step}{strength}"
            # The digest alone tells jobs apart; the rest is for whoever looks into the folder.
            name = name.replace(" ", "_").replace("/", ".").replace("=", "")
            self._keys[job] = f"{name}-{digest(content)}"
        return self._keys[job]

    def training_key(self, job: Job) -> str:
        """Names a fine-tuning run by everything that decides it; its length does not: step k is step k of any."""
        if job.method == BASE:
            return BASE
        content = OmegaConf.to_container(self.subjects[job.concept].training(self.config, job.method, run=job.run))
        del content["method"]["steps"], content["preview"]
        for name in ("logdir", "save_every", "logger"):
            del content["trainer"][name]
        for concept in content["concepts"]:
            # Files count by what is in them: a changed photo is another experiment, a moved folder is not.
            for name in ("images", "regularization"):
                concept[name] = concept[name] and self._fingerprint(shipped(concept[name]))
            caption = concept["regularization_caption"] or ""
            if os.path.isfile(caption):
                concept["regularization_caption"] = Path(caption).read_text("utf-8", errors="replace")
        return digest([content, self._identity()])

    def path(self, job: Job) -> Path:
        """Where a job's rows are; measured by other metrics, or on other references, they would lie elsewhere."""
        subject = self.subjects[job.concept]
        references = self._fingerprint(shipped(subject.references))
        measured = digest([self._measured_by, references, job.said(subject)])[:6]
        return self.outdir / "points" / f"{self.key(job)}-{measured}.json"

    def image(self, job: Job, prompt: int, sample: int) -> Path:
        """Where an image is."""
        return self.outdir / "pictures" / self.key(job) / f"{prompt:03d}-{sample:02d}.png"

    def images(self, job: Job) -> list[list[Path]]:
        """Where a job's images are, by prompt and seed."""
        found: list[list[Path]] = []
        for prompt in range(len(self.subjects[job.concept].prompts)):
            found.append([self.image(job, prompt, sample) for sample in range(self.config.seeds)])
        return found

    def read(self, job: Job) -> Stored:
        """Reads what is on disk of a job.

        Raises:
            UserError: that is damaged.
        """
        return load_record(Stored, self.path(job), "point", "remove it, and it is made again")

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Returns the jobs whose rows or images are not there; what is damaged is set aside, to be made again."""
        return [job for job in jobs if not self._is_finished(job)]

    def _is_finished(self, job: Job) -> bool:
        if not self.path(job).is_file():
            return False
        try:
            self.read(job)
        except UserError:
            set_aside(self.path(job), "is damaged")
            return False
        return all_drawn(chain.from_iterable(self.images(job)))

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Returns the time that these jobs took when they were carried out."""
        return sum(self.read(job).seconds for job in dict.fromkeys(jobs))


def all_drawn(paths: Iterable[Path]) -> bool:
    """Says whether all images are there; damaged ones are set aside."""
    complete = True
    for path in paths:                          # to the last one, or damage behind the first gap would stay
        if not path.is_file():
            complete = False
            continue
        try:
            size_of(path)
        except UserError:
            set_aside(path, "is damaged")
            complete = False
    return complete


def fingerprint(path: Path) -> str:
    """Names a folder or list of images by the names and bytes of all files that lie in it or are listed."""
    if path.is_dir():
        listing, own = path / IMAGES, sorted(path.rglob("*"))
    else:
        listing, own = path, [path, path.with_name(CAPTIONS)]
    listed = list_images(listing)[0] if listing.is_file() else []
    found = hashlib.sha256()
    for file in dict.fromkeys([*own, *listed]):
        if file.is_file():
            # With its size, or the end of one file could pass for the beginning of the next.
            found.update(f"{os.path.relpath(file, path)}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:16]
