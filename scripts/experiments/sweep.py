"""Carries out a sweep's jobs: trains, draws, measures; whatever is on disk already is not done again."""
from __future__ import annotations

import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from experiments.jobs import BASE, Job, Subject, SweepConfig, describe, subjects
from experiments.pace import Pace, progress_bar, shares, total_rows
from experiments.store import Store, Stored, all_drawn
from experiments.training import Runs
from ldm.config import DCIConfig, typed
from ldm.customization.delta import load_concept
from ldm.customization.ico import PLACEHOLDER
from ldm.customization.tokens import AUTO, auxiliary_noun, rest_of_prompt, split_at_concept
from ldm.data.captions import captioned
from ldm.data.images import open_image
from ldm.evaluation.evaluate import open_references
from ldm.evaluation.report import write_json
from ldm.evaluation.scoring import Scorer, load_scorer
from ldm.pipeline import Generator
from ldm.sampling import load_generator
from ldm.sheets import save_png
from ldm.util import UserError

Metrics = tuple[Sequence[str] | None, Mapping[str, Path], torch.device]

INTERRUPTED = "interrupted; the same command goes on where this one stopped."


class Sweep:
    """What completes a folder of results: `store` says what is there, `runs` train, the rest is done here."""

    def __init__(self, config: SweepConfig, outdir: Path, scorer: Scorer):
        """Reads the concepts; refuses mistakes before any work."""
        self.config, self.outdir, self.scorer = config, outdir, scorer
        self.subjects = {subject.name: subject for subject in subjects(config)}
        self.store = Store(config, outdir, self.subjects, scorer.record, lambda: self.generator.identity)
        self.runs = Runs(self.store)
        self._references: dict[str, dict[str, Tensor]] = {}
        self._seen: set[Path] = set()           # folders whose images were found usable: that decodes them all

    @cached_property
    def generator(self) -> Generator:
        """The base model, built when it is first needed."""
        return load_generator(Job("", BASE, 0).sampling(self.config))

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuses jobs that cannot be carried out, before any work.

        Raises:
            UserError: a method is unknown, a configuration is wrong, images are missing, or a prompt cannot be drawn.
        """
        points, concepts, methods = {}, {}, {}          # once each, in order
        for job in jobs:
            points[job.point] = concepts[job.concept] = True
            if job.method != BASE:
                methods[job.method] = True
        for method in methods:
            if method not in self.config.methods:
                raise UserError(f"method '{method}' is unknown; methods: {', '.join(self.config.methods)}.")
        for point in points:
            settings = self.store.settings(point)
            typed(settings)
            if point.method != BASE:
                next(iter(self.subjects.values())).training(self.config, point.method)
            if point.strength is not None:
                for subject in self.subjects.values():
                    check_prompts(subject, settings.dci)
        for name in concepts:
            self._check_images(self.subjects[name], list(methods))

    def _check_images(self, subject: Subject, methods: Sequence[str]) -> None:
        """Refuses a concept whose images cannot be read; which method trains on them makes no difference."""
        folders = [subject.references]
        if methods:
            folders.append(Path(subject.training(self.config, methods[0]).concepts[0].images))
        for folder in folders:
            if folder in self._seen:
                continue
            try:
                captioned(folder, captions=False)
            except UserError as error:
                raise UserError(f"'{subject.name}': {error}") from error
            self._seen.add(folder)

    def run(self, jobs: Sequence[Job], quiet: bool = False) -> dict[Job, list[dict[str, Any]]]:
        """Carries out what is not on disk and returns every job's rows."""
        self.check(jobs)
        order = in_order(jobs)
        missing = self.store.missing(order)
        pace = Pace(shares(self.runs, missing))
        finished = len(order) - len(missing)
        with progress_bar(len(order), finished, quiet) as bar:
            try:
                for done, job in enumerate(missing, finished):
                    bar.update(done - bar.n)        # fractions of a job do not add up to a whole one exactly
                    bar.set_postfix_str(f"{pace}{job.concept}, {job.method} {job.step or ''}".strip())
                    pace.finish(job, self._make(job, order, bar))
                bar.update(len(order) - bar.n)
            except KeyboardInterrupt as interrupt:
                raise KeyboardInterrupt(INTERRUPTED) from interrupt
        rows = {}
        for job in order:
            # The description of now: of jobs that differ in nothing that decides images, another may have been stored.
            rows[job] = [{**row, **describe(job)} for row in self.store.read(job).rows]
        return rows

    def _make(self, job: Job, jobs: Sequence[Job], bar: tqdm) -> Stored:
        """Makes a job's rows and returns what is on disk then."""
        start, trained = time.monotonic(), self.runs.seconds
        rows = self.measure(job, self.draw(job, jobs, bar))
        write_json(self.store.path(job), {"job": describe(job), "seconds": time.monotonic() - start,
                                          "taught": self.runs.seconds - trained, "rows": rows})
        return self.store.read(job)

    def draw(self, job: Job, jobs: Sequence[Job], bar: tqdm) -> list[Image.Image]:
        """Draws the images that are missing; returns all, by prompt and seed."""
        paths = self.store.images(job)
        prompts, wanted = [], []
        for prompt, row in zip(job.prompts(self.subjects[job.concept]), paths, strict=True):
            if not all_drawn(row):          # the generator draws every seed of a prompt
                prompts.append(prompt)
                wanted += row
        bar.update(1 - len(prompts) / len(paths))
        if prompts:
            drawn = self.ready(job, jobs).generate(prompts, self.store.settings(job))
            for sample, path in zip(drawn, wanted, strict=True):
                save_png(sample.image, path, sample.settings)
                bar.update(1 / (len(paths) * self.config.seeds))
        return list(map(open_image, chain.from_iterable(paths)))

    def ready(self, job: Job, jobs: Sequence[Job]) -> Generator:
        """Returns a generator that draws as the job says."""
        base = self.generator
        if job.method == BASE:
            base.load(None)
            return base
        base.load(load_concept(self.runs.concept_file(job, jobs)))
        if job.words is None:
            return base
        # Over the same tuned network, but told of no concept: its prompts are plain texts.
        return Generator(base.model, base.identity, base.model.device)

    def measure(self, job: Job, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Measures a job's images; a row per image, with what it is and its seed."""
        subject = self.subjects[job.concept]
        if job.concept not in self._references:
            self._references[job.concept] = self.scorer.features(open_references(subject.references))
        said, rows = [], []
        for prompt, text, paths in zip(subject.prompts, job.said(subject), self.store.images(job), strict=True):
            for seed, path in enumerate(paths, self.config.first_seed):
                said.append(text)
                rows.append({**describe(job), "class_noun": subject.class_noun, "prompt": prompt, "seed": seed,
                             "picture": str(path.relative_to(self.outdir))})
        values = self.scorer.rows(images, said, subject.class_noun, self._references[job.concept])
        return [row | measured for row, measured in zip(rows, values, strict=True)]


def check_prompts(subject: Subject, dci: DCIConfig) -> None:
    """Refuses prompts that DCI cannot draw.

    Raises:
        UserError: an auxiliary noun is the class noun, a word touches the concept, or nothing is said beside it.
    """
    for prompt in subject.prompts:
        pieces = split_at_concept(prompt, PLACEHOLDER)
        for before, after in pairwise(pieces):
            if re.search(r"\w$", before) or re.match(r"\w", after):
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
    jobs = in_order(jobs)
    groups: dict[tuple[str, str, int], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.run_key, []).append(job)
    # The longest first, so that none of them is left for one process at the end.
    order = sorted(groups.values(), key=lambda group: total_rows(sweep.runs, group), reverse=True)
    missing = sweep.store.missing(jobs)
    workers = min(workers, len(groups))
    pace = Pace(shares(sweep.runs, missing), workers)
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool, \
            progress_bar(len(jobs), len(jobs) - len(missing)) as bar:
        pending = {pool.submit(_carry_out, sweep.config, sweep.outdir, metrics, group, threads) for group in order}
        try:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                finished = [job for job in missing if sweep.store.path(job).is_file()]
                for job in finished:
                    missing.remove(job)
                    pace.finish(job, sweep.store.read(job))
                    bar.set_postfix_str(f"{pace}{workers} processes", refresh=False)
                    bar.update()
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(INTERRUPTED) from interrupt
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _carry_out(config: SweepConfig, outdir: Path, metrics: Metrics, jobs: Sequence[Job], threads: int) -> None:
    """Carries jobs out in a process of `share_out`, which shows the progress of all."""
    sys.stderr = open(os.devnull, "w")          # several bars on one terminal would overwrite each other
    torch.set_num_threads(threads)
    Sweep(config, outdir, load_scorer(*metrics)).run(jobs, quiet=True)


def end_with_parent() -> None:
    """Has this process end when the one that started it is gone: a killed one cannot say so."""
    def wait_for_it() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Returns jobs once each, as they are carried out: all of a fine-tuning run together, by step."""
    return sorted(dict.fromkeys(jobs), key=lambda job: (*job.run_key, job.step))


def rows_by_point(rows: dict[Job, list[dict[str, Any]]]) -> dict[Job, list[dict[str, Any]]]:
    """Joins the rows of each point's concepts and runs."""
    joined: dict[Job, list[dict[str, Any]]] = {}
    for job, found in rows.items():
        joined.setdefault(job.point, []).extend(found)
    return joined
