"""Carries out a sweep's jobs: trains, samples, measures. Whatever is on disk already is not done again."""
from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from experiments.jobs import BASE, Job, Subject, SweepConfig, describe, digest, subjects
from ldm.config import DCIConfig, typed
from ldm.customization.delta import load_concept
from ldm.customization.ico import PLACEHOLDER
from ldm.customization.tokens import AUTO, auxiliary_noun, rest_of_prompt, split_at_concept
from ldm.data.captions import CAPTIONS, IMAGES, captioned
from ldm.data.images import open_image, size_of
from ldm.data.listing import list_images
from ldm.evaluation.evaluate import open_references
from ldm.evaluation.report import write_json
from ldm.evaluation.scoring import Scorer, load_scorer, plain_text
from ldm.files import DAMAGED, set_aside
from ldm.pipeline import Generator
from ldm.progress import progress
from ldm.records import Record, load_record
from ldm.sampling import load_generator
from ldm.sheets import save_png
from ldm.training.resume import resume_state
from ldm.training.run import fine_tune
from ldm.training.run_folder import concept_file
from ldm.util import UserError, folder_name, shipped

Metrics = tuple[Sequence[str] | None, Mapping[str, Path], torch.device]

INTERRUPTED = "interrupted; the same command goes on where this one stopped."
VOLATILE = ("device", "batch_size", "compile")      # sampling settings that do not change images


class Stored(Record):
    """What is on disk of a job: its rows, the seconds it took and those of them that fine-tuning took."""

    rows: list[dict[str, Any]]
    seconds: Annotated[float, Field(ge=0)]
    taught: Annotated[float, Field(ge=0)]


class Sweep:
    """A folder of results and what is needed to complete it.

    Layout: runs/ (fine-tuning), images/ and points/ (one folder and one JSON file per job).
    """

    def __init__(self, config: SweepConfig, outdir: Path, scorer: Scorer):
        """Reads the concepts; refuses mistakes before any work."""
        self.config, self.outdir, self.scorer = config, outdir, scorer
        self.subjects = {subject.name: subject for subject in subjects(config)}
        self._references: dict[str, dict[str, Tensor]] = {}
        self._settings: dict[Job, Any] = {}     # merging takes a while, and every path asks
        self._keys: dict[Job, str] = {}
        self._contents: dict[Path, str] = {}
        self._seen: set[Path] = set()           # folders whose images were found usable: that decodes them all
        self._taught = 0.0                      # seconds that fine-tuning took

    @cached_property
    def generator(self) -> Generator:
        """The base model, built when the first image is due."""
        return load_generator(Job("", BASE, 0).sampling(self.config), None)

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses jobs that cannot be carried out, before any work.

        Raises:
            UserError: a method is unknown, a configuration is wrong, images are missing, or a prompt cannot be drawn.
        """
        for method in dict.fromkeys(job.method for job in jobs):
            if method != BASE and method not in self.config.methods:
                raise UserError(f"method '{method}' is unknown; methods: {', '.join(self.config.methods)}.")
        for point in dict.fromkeys(job.point for job in jobs):
            typed(self.settings(point))
            if point.method != BASE:
                next(iter(self.subjects.values())).training(self.config, point.method)
            if point.strength is not None:
                for subject in self.subjects.values():
                    check_prompts(subject, self.settings(point).dci)
        taught = next((job.method for job in jobs if job.method != BASE), None)
        for subject in (self.subjects[name] for name in dict.fromkeys(job.concept for job in jobs)):
            photos = [subject.training(self.config, taught).concepts[0].images] if taught else []
            for folder in {subject.references, *map(Path, photos)} - self._seen:
                try:
                    captioned(folder, captions=False)
                except UserError as error:
                    raise UserError(f"'{subject.name}': {error}") from error
                self._seen.add(folder)

    def run(self, jobs: Sequence[Job], quiet: bool = False) -> dict[Job, list[dict[str, Any]]]:
        """Carries out what is not on disk and returns every job's rows."""
        self.check(jobs)
        order = in_order(jobs)
        missing = [job for job in order if not self.finished(job)]
        pace = Pace(self.shares(missing))
        with progress_bar(len(order), len(order) - len(missing), quiet) as bar:
            try:
                for done, job in enumerate(missing, len(order) - len(missing)):
                    bar.update(done - bar.n)
                    bar.set_postfix_str(f"{pace}{job.concept}, {job.method} {job.step or ''}".strip())
                    pace.finish(job, self._make(job, order, bar))
                bar.update(len(order) - bar.n)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(INTERRUPTED) from interrupt
        return {job: [{**row, **describe(job)} for row in self.stored(job).rows] for job in order}

    def _make(self, job: Job, jobs: Sequence[Job], bar: tqdm) -> Stored:
        """Makes a job's rows and returns what is on disk then."""
        start, taught = time.monotonic(), self._taught
        rows = self.measure(job, self.draw(job, jobs, bar))
        write_json(self.path(job), {"job": describe(job), "seconds": time.monotonic() - start,
                                    "taught": self._taught - taught, "rows": rows})
        return self.stored(job)

    def stored(self, job: Job) -> Stored:
        """Reads what is on disk of a job.

        Raises:
            UserError: that is damaged.
        """
        return load_record(Stored, self.path(job), "point", "remove it, and it is made again")

    def finished(self, job: Job) -> bool:
        """Says whether a job's rows and images are there; what is damaged is set aside, to be made again."""
        if not self.path(job).is_file():
            return False
        try:
            self.stored(job)
        except UserError:
            set_aside(self.path(job), "is damaged")
            return False
        prompts = range(len(self.subjects[job.concept].prompts))
        drawn = [self.is_drawn(self.image(job, prompt, sample))
                 for prompt in prompts for sample in range(self.config.seeds)]
        return all(drawn)

    @staticmethod
    def is_drawn(path: Path) -> bool:
        """Says whether an image is there; a damaged one is set aside."""
        if not path.is_file():
            return False
        try:
            size_of(path)
        except UserError:
            set_aside(path, "is damaged")
            return False
        return True

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Returns the time that these jobs took when they were carried out."""
        return sum(self.stored(job).seconds for job in dict.fromkeys(jobs))

    def settings(self, job: Job) -> Any:
        """Returns a job's sampling configuration."""
        if job.point not in self._settings:
            self._settings[job.point] = job.sampling(self.config)
        return self._settings[job.point]

    def key(self, job: Job) -> str:
        """Names a job's images by everything that decides them; a setting that is the default's changes nothing."""
        if job not in self._keys:
            self._keys[job] = self._make_key(job)
        return self._keys[job]

    def _make_key(self, job: Job) -> str:
        subject = self.subjects[job.concept]
        sampling = OmegaConf.to_container(self.settings(job))
        sampling = {name: value for name, value in sampling.items() if name not in VOLATILE}
        content = [job.prompts(subject), job.words, sampling, job.step, self.training_key(job), self.generator.identity]
        strength = "" if job.strength is None else f"-lambda{job.strength:g}"
        name = f"{job.concept}-{job.method}-{job.step}{strength}".replace(" ", "_").replace("/", ".").replace("=", "")
        return f"{name}-{digest(content)}"

    def training_key(self, job: Job) -> str:
        """Names a fine-tuning run by everything that decides it; its length does not: step k is step k of any."""
        if job.method == BASE:
            return BASE
        content = OmegaConf.to_container(self.subjects[job.concept].training(self.config, job.method, run=job.run))
        del content["method"]["steps"], content["preview"]
        for name in ("logdir", "save_every", "logger"):
            del content["trainer"][name]
        for concept in content["concepts"]:
            concept |= {name: concept[name] and self.contents(Path(concept[name]))
                        for name in ("images", "regularization")}
            if os.path.isfile(caption := concept["regularization_caption"] or ""):
                concept["regularization_caption"] = Path(caption).read_text("utf-8", errors="replace")
        return digest([content, self.generator.identity])

    def contents(self, path: Path) -> str:
        """Names a folder or list of images by the names and bytes of all files that lie in it or are listed."""
        path = shipped(path)
        if path not in self._contents:
            found, listing = hashlib.sha256(), path / IMAGES if path.is_dir() else path
            own = sorted(path.rglob("*")) if path.is_dir() else [path, path.with_name(CAPTIONS)]
            listed = list_images(listing)[0] if listing.is_file() else []
            for file in dict.fromkeys([*own, *listed]):
                if file.is_file():
                    found.update(f"{os.path.relpath(file, path)}\0{file.stat().st_size}\0".encode())
                    found.update(file.read_bytes())
            self._contents[path] = found.hexdigest()[:16]
        return self._contents[path]

    def path(self, job: Job) -> Path:
        """Where a job's rows are; measured by other metrics, or on other references, they would lie elsewhere."""
        subject = self.subjects[job.concept]
        measured = digest([self.scorer.record, self.contents(subject.references), self.said(job)])[:6]
        return self.outdir / "points" / f"{self.key(job)}-{measured}.json"

    def said(self, job: Job) -> list[str]:
        """What each prompt's images should show: its text without concept words, or with what replaces these."""
        subject = self.subjects[job.concept]
        return [plain_text(prompt, subject.class_noun) for prompt in job.prompts(subject)]

    def image(self, job: Job, prompt: int, sample: int) -> Path:
        """Where an image is."""
        return self.outdir / "pictures" / self.key(job) / f"{prompt:03d}-{sample:02d}.png"

    def work(self, job: Job) -> int:
        """U-Net rows of a job's images: guided ones have two a step, joint steps four (three where shared)."""
        settings = self.settings(job)
        joint = 0.0 if job.strength is None or settings.dci.match_cost else settings.dci.agg_time
        rows = settings.steps * (2 + joint * (2 if settings.dci.guidance == "separate" else 1))
        return round(rows * self.config.seeds * len(self.subjects[job.concept].prompts))

    def shares(self, jobs: Sequence[Job]) -> dict[Job, tuple[int, int]]:
        """U-Net rows of each job: of the fine-tuning that it is the first to need, and of its images."""
        first = {job.run_key: job for job in reversed(jobs)}
        return {job: (self.run_work(job, jobs) if first[job.run_key] == job else 0, self.work(job)) for job in jobs}

    def run_work(self, job: Job, jobs: Sequence[Job]) -> int:
        """U-Net rows of a fine-tuning run that is to come; a row of training costs three, backwards included."""
        if job.method == BASE or all(self.learned(job, step) for step in self.steps(job, jobs)):
            return 0
        batch = self.subjects[job.concept].training(self.config, job.method).method.batch_size
        return 3 * 2 * batch * max(self.steps(job, jobs))

    @staticmethod
    def steps(job: Job, jobs: Sequence[Job]) -> list[int]:
        """The steps at which jobs need the model that this job uses."""
        return sorted({other.step for other in jobs if other.run_key == job.run_key})

    def logdir(self, job: Job) -> Path:
        """Where a job's fine-tuning run is."""
        return self.outdir / "runs" / f"{folder_name(job.concept)}-{self.training_key(job)}"

    def learned(self, job: Job, step: int) -> Path | None:
        """Returns the concept file of a step of a job's fine-tuning run, if it is there."""
        files = [concept_file(run / "checkpoints", step) for run in self.runs(job)]
        return next((path for path in files if path.is_file() and path.with_name("last.ckpt").is_file()), None)

    def runs(self, job: Job) -> list[Path]:
        """Returns the folders of a job's fine-tuning run, of which a killed sweep may leave several."""
        states = self.logdir(job).glob("*/checkpoints/last.ckpt")
        return [folder for folder in sorted(state.parent.parent for state in states) if folder.suffix != DAMAGED]

    def concept_file(self, job: Job, jobs: Sequence[Job]) -> Path:
        """Returns the concept file of a job's step, teaching or going on with the run if need be."""
        subject, steps = self.subjects[job.concept], self.steps(job, jobs)
        for run in self.runs(job):
            self.check_run(run, job.step)
        found = self.learned(job, job.step)
        if found is None:
            logdir, runs = self.logdir(job), self.runs(job)
            every = math.gcd(*steps)
            config = subject.training(self.config, job.method, f"method.steps={max(steps)}",
                                      f"trainer.save_every={every}", f"trainer.logdir={logdir}", run=job.run)
            done = max((int(path.stem[5:]) for run in runs[-1:] for path in run.glob("checkpoints/step-*")), default=0)
            logdir.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            with (logdir / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
                # A step that a longer run passed without saving is only reached from the start.
                run = fine_tune(config, runs[-1] if runs and done < job.step else None)
            self._taught += time.monotonic() - start
            found = concept_file(run.folder / "checkpoints", job.step)
        return found

    @staticmethod
    def check_run(run: Path, step: int) -> None:
        """Sets a fine-tuning run aside whose state, or whose concept file of a step, is damaged."""
        try:
            resume_state(run)
            if concept_file(run / "checkpoints", step).is_file():
                load_concept(concept_file(run / "checkpoints", step))
        except UserError:
            set_aside(run, "holds a damaged file")

    def draw(self, job: Job, jobs: Sequence[Job], bar: tqdm | None = None) -> list[Image.Image]:
        """Draws the images that are missing; returns all, by prompt and seed."""
        subject, config = self.subjects[job.concept], self.config
        paths = [[self.image(job, prompt, sample) for sample in range(config.seeds)]
                 for prompt in range(len(subject.prompts))]
        missing = [index for index, row in enumerate(paths) if not all([self.is_drawn(path) for path in row])]
        one = 1 / (len(paths) * config.seeds)
        if bar is not None:
            bar.update(one * config.seeds * (len(paths) - len(missing)))
        if missing:
            generator = self.ready(job, jobs)
            texts = job.prompts(subject)
            places = iter([(index, sample) for index in missing for sample in range(config.seeds)])
            for drawn in generator.generate([texts[index] for index in missing], self.settings(job)):
                index, sample = next(places)
                save_png(drawn.image, paths[index][sample], drawn.settings)
                if bar is not None:
                    bar.update(one)
        return [open_image(path) for row in paths for path in row]

    def ready(self, job: Job, jobs: Sequence[Job]) -> Generator:
        """Returns a generator that draws as the job says."""
        if job.method == BASE:
            self.generator.load(None)
            return self.generator
        self.generator.load(load_concept(self.concept_file(job, jobs)))
        # Over the same tuned network, but told of no concept: its prompts are plain texts.
        return self.generator if job.words is None else Generator(self.generator.model, self.generator.identity,
                                                                  self.generator.model.device)

    def measure(self, job: Job, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Measures a job's images; a row per image, with what it is and its seed."""
        subject = self.subjects[job.concept]
        if job.concept not in self._references:
            self._references[job.concept] = self.scorer.features(open_references(subject.references))
        prompts = [prompt for prompt in subject.prompts for _ in range(self.config.seeds)]
        seeds = [self.config.first_seed + index for index in range(self.config.seeds)] * len(subject.prompts)
        said = [text for text in self.said(job) for _ in range(self.config.seeds)]
        values = self.scorer.rows(images, said, subject.class_noun, self._references[job.concept])
        return [{**describe(job), "class_noun": subject.class_noun, "prompt": prompt, "seed": seed,
                 "picture": str(self.image(job, index // self.config.seeds, index % self.config.seeds)
                                .relative_to(self.outdir)), **row}
                for index, (prompt, seed, row) in enumerate(zip(prompts, seeds, values, strict=True))]


def check_prompts(subject: Subject, dci: DCIConfig) -> None:
    """Refuses prompts that DCI cannot draw.

    Raises:
        UserError: an auxiliary noun is the class noun, a word touches the concept, or nothing is said beside it.
    """
    for prompt in subject.prompts:
        pieces = split_at_concept(prompt, PLACEHOLDER)
        before, after = pieces[:-1], pieces[1:]
        if any(re.search(r"\w$", piece) for piece in before) or any(re.match(r"\w", piece) for piece in after):
            raise UserError(f"the words of '{prompt}' run into the concept; put spaces around it.")
        if dci.ablation == "no_full_prompt":
            rest_of_prompt(prompt, PLACEHOLDER)
        elif dci.replace_noun != AUTO:
            auxiliary_noun(subject.class_noun, pieces, dci.replace_noun)


def share_out(sweep: Sweep, metrics: Metrics, jobs: Sequence[Job], workers: int) -> None:
    """Carries jobs out in several processes, a fine-tuning run's at a time; their rows are on disk afterwards.

    On a CPU two processes of one thread do more than one process of two: small networks keep few threads busy.

    Args:
        metrics: what `load_scorer` takes: names, files of weights, and where to compute.
    """
    runs: dict[tuple[str, str, int], list[Job]] = {}
    jobs = in_order(jobs)
    for job in jobs:
        runs.setdefault(job.run_key, []).append(job)
    # The longest first, so that none of them is left for one process at the end.
    shares = sorted(runs.values(), key=lambda share: sum(map(sum, sweep.shares(share).values())), reverse=True)
    missing = [job for job in jobs if not sweep.finished(job)]
    workers = min(workers, len(shares))
    pace = Pace(sweep.shares(missing), workers)
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool, \
            progress_bar(len(jobs), len(jobs) - len(missing)) as bar:
        pending = {pool.submit(_carry_out, sweep.config, sweep.outdir, metrics, share, threads) for share in shares}
        try:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                for job in [job for job in missing if sweep.path(job).is_file()]:
                    missing.remove(job)
                    pace.finish(job, sweep.stored(job))
                    bar.set_postfix_str(f"{pace}{workers} processes", refresh=False)
                    bar.update()
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(INTERRUPTED) from interrupt
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _carry_out(config: SweepConfig, outdir: Path, metrics: Metrics, jobs: Sequence[Job], threads: int) -> None:
    """Carries jobs out in a process of `share_out`, which shows the progress of all."""
    sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(threads)
    Sweep(config, outdir, load_scorer(*metrics)).run(jobs, quiet=True)


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Returns jobs once each, as they are carried out: all of a fine-tuning run together, by step."""
    return sorted(dict.fromkeys(jobs), key=lambda job: (*job.run_key, job.step))


class Pace:
    """How long what is left will take: fine-tuning and sampling each at the rate it had so far.

    Args:
        shares: U-Net rows of the jobs that are left, of fine-tuning and of sampling, as `Sweep.shares` gives them.
        workers: processes that work at once.
    """

    def __init__(self, shares: Mapping[Job, tuple[int, int]], workers: int = 1):
        self._left, self._workers = dict(shares), workers
        self._done, self._seconds = [0, 0], [0.0, 0.0]

    def finish(self, job: Job, stored: Stored) -> None:
        """Counts a job with the seconds that its file tells."""
        spent = (stored.taught, stored.seconds - stored.taught)
        for kind, (rows, seconds) in enumerate(zip(self._left.pop(job), spent, strict=True)):
            if rows:
                self._done[kind] += rows
                self._seconds[kind] += seconds

    def seconds(self) -> float | None:
        """Returns the seconds that are left, or None where something is left that was not done yet."""
        total = 0.0
        for kind, (done, seconds) in enumerate(zip(self._done, self._seconds, strict=True)):
            left = sum(share[kind] for share in self._left.values())
            if left and not done:
                return None
            total += seconds * left / max(done, 1)
        return total / self._workers

    def __str__(self) -> str:
        left = self.seconds()
        return "" if left is None else f"about {tqdm.format_interval(left)} left; "


def progress_bar(jobs: int, done: int, quiet: bool = False) -> tqdm:
    """Makes a sweep's bar, which counts points of a concept; what is left is told by `Pace`, in its postfix."""
    return progress(total=jobs, initial=done, desc="sweep", unit="job", quiet=quiet,
                    form="{l_bar}{bar}| {n:.1f}/{total_fmt} jobs [{elapsed}{postfix}]")


def points(rows: dict[Job, list[dict[str, Any]]]) -> dict[Job, list[dict[str, Any]]]:
    """Joins the rows of each point's concepts and runs."""
    joined: dict[Job, list[dict[str, Any]]] = {}
    for job, found in rows.items():
        joined.setdefault(job.point, []).extend(found)
    return joined
