"""How much work jobs are, in rows of the U-Net, and how long what is left of it will take."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from experiments.jobs import BASE, Job
from experiments.store import Store, Stored
from experiments.training import Runs, steps_of
from ldm.progress import progress


def sampling_rows(store: Store, job: Job) -> int:
    """U-Net rows of a job's images: guided ones have two a step, joint steps four (three where shared)."""
    settings = store.settings(job)
    joint = 0.0 if job.strength is None or settings.dci.match_cost else settings.dci.agg_time
    extra = 2 if settings.dci.guidance == "separate" else 1
    return round(settings.steps * (2 + joint * extra) * store.config.seeds * len(store.subjects[job.concept].prompts))


def training_rows(runs: Runs, job: Job, jobs: Sequence[Job]) -> int:
    """U-Net rows of a fine-tuning run that is to come; a row of training costs three, backwards included."""
    steps = steps_of(job, jobs)
    if job.method == BASE or all(runs.find(job, step) for step in steps):
        return 0
    batch = runs.store.subjects[job.concept].training(runs.store.config, job.method).method.batch_size
    return 3 * 2 * batch * max(steps)           # an image of the concept comes with one of its class


def shares(runs: Runs, jobs: Sequence[Job]) -> dict[Job, tuple[int, int]]:
    """U-Net rows of each job: of the fine-tuning that it is the first to need, and of its images."""
    first = {job.run_key: job for job in reversed(jobs)}
    found = {}
    for job in jobs:
        training = training_rows(runs, job, jobs) if first[job.run_key] == job else 0
        found[job] = (training, sampling_rows(runs.store, job))
    return found


def total_rows(runs: Runs, jobs: Sequence[Job]) -> int:
    """U-Net rows of jobs, fine-tuning included."""
    return sum(training + sampling for training, sampling in shares(runs, jobs).values())


class Pace:
    """How long what is left will take: fine-tuning and sampling each at the rate it had so far.

    Args:
        work: U-Net rows of the jobs that are left, of fine-tuning and of sampling, as `shares` gives them.
        workers: processes that work at once.
    """

    def __init__(self, work: Mapping[Job, tuple[int, int]], workers: int = 1):
        self._left, self._workers = dict(work), workers
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
