"""A sweep's fine-tuning runs: where they are, and a job's concept file, trained where it is not there."""
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.jobs import Job
from experiments.store import Store
from ldm.customization.delta import load_concept
from ldm.files import DAMAGED, set_aside
from ldm.training.resume import resume_state
from ldm.training.run import fine_tune
from ldm.training.run_folder import concept_file
from ldm.util import UserError, folder_name


class Runs:
    """The fine-tuning runs in a sweep's folder.

    Attributes:
        seconds: how long this process has trained.
    """

    def __init__(self, store: Store):
        self.store = store
        self.seconds = 0.0

    def logdir(self, job: Job) -> Path:
        """Where a job's fine-tuning run is."""
        return self.store.outdir / "runs" / f"{folder_name(job.concept)}-{self.store.training_key(job)}"

    def started(self, job: Job) -> list[Path]:
        """Returns the folders of a job's fine-tuning run, of which a killed sweep may leave several."""
        states = sorted(self.logdir(job).glob("*/checkpoints/last.ckpt"))
        return [state.parents[1] for state in states if state.parents[1].suffix != DAMAGED]

    def find(self, job: Job, step: int) -> Path | None:
        """Returns the concept file of a step of a job's fine-tuning run, if it is there."""
        for run in self.started(job):
            path = concept_file(run / "checkpoints", step)
            if path.is_file() and path.with_name("last.ckpt").is_file():
                return path
        return None

    def concept_file(self, job: Job, jobs: Sequence[Job]) -> Path:
        """Returns the concept file of a job's step, training or going on with the run if need be."""
        for run in self.started(job):
            check_run(run, job.step)
        return self.find(job, job.step) or self._train(job, steps_of(job, jobs))

    def _train(self, job: Job, steps: Sequence[int]) -> Path:
        logdir, started = self.logdir(job), self.started(job)
        config = self.store.subjects[job.concept].training(
            self.store.config, job.method, f"method.steps={max(steps)}", f"trainer.save_every={math.gcd(*steps)}",
            f"trainer.logdir={logdir}", run=job.run)
        # A step that a longer run passed without saving is only reached from the start.
        earlier = started[-1] if started and _last_step(started[-1]) < job.step else None
        logdir.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with (logdir / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run = fine_tune(config, earlier)
        self.seconds += time.monotonic() - start
        return concept_file(run.folder / "checkpoints", job.step)


def steps_of(job: Job, jobs: Sequence[Job]) -> list[int]:
    """The steps at which jobs need the model that this job uses."""
    return sorted({other.step for other in jobs if other.run_key == job.run_key})


def check_run(run: Path, step: int) -> None:
    """Sets a fine-tuning run aside whose state, or whose concept file of a step, is damaged."""
    path = concept_file(run / "checkpoints", step)
    try:
        resume_state(run)
        if path.is_file():
            load_concept(path)
    except UserError:
        set_aside(run, "holds a damaged file")


def _last_step(run: Path) -> int:
    """The last step whose concept file a run saved."""
    return max((int(path.stem[5:]) for path in run.glob("checkpoints/step-*")), default=0)
