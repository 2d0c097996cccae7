"""Signals that end a script at any stage: the status shells expect, one message, soon."""
from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path
from random import Random

from conftest import ROOT

from soak.campaign import Campaign
from soak.child import Child, made_elsewhere, start
from soak.world import World

COUNT = 120
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
SECONDS = 2.0                   # from signal to end, on a machine that has nothing else to do
AT_ITS_END = 0.5                # seconds within which a script that a signal reaches may end as if it had come too late
IMPORTED_TOO = 12               # every so many-th case is a process that has to import everything first


def run(campaign: Campaign) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)    # shells let what runs in the background ignore it
    world = made_elsewhere(campaign.folder)
    usual = cache(partial(measured, world, campaign.folder))
    for index, rng, folder in campaign.cases():
        name, number = rng.choice(("train", "sample", "evaluate")), rng.choice(list(STATUS))
        if index % IMPORTED_TOO == IMPORTED_TOO - 1:
            problem = while_importing(world, folder, name, number, rng, campaign.slack)
        else:
            problem = while_working(world, folder, name, number, rng.uniform(0.01, 0.7 * usual(name)), campaign.slack)
        if problem == "finished":
            campaign.count_as("finished before")
        elif problem:
            campaign.fail(f"{name}, {number.name}: {problem}")
        else:
            campaign.count_as("ended")


def command(world: World, folder: Path, name: str) -> list[object]:
    if name == "train":
        return ["-b", *world.small.training_files, "method.steps=4", "-l", folder / "logs"]
    sampling = ["-b", *world.small.sampling_files, "--delta_ckpt", world.concept, "--outdir", folder / "out"]
    if name == "sample":
        return [*sampling, "--prompt", "a {}", "--prompt", "a {} in the snow", "--n_samples", 2]
    weights = [f"{key}={path}" for key, path in world.metrics.items()]
    return [*sampling, "--n_samples", 1, "steps=2", "--metrics", *world.metrics, "--metric_weights", *weights]


def measured(world: World, folder: Path, name: str) -> float:
    """Returns the seconds a script takes when nobody interrupts it."""
    begun, folder = time.monotonic(), folder / name
    child = start(folder, name, *command(world, folder, name))
    child.wait()
    if child.status != 0:
        raise RuntimeError(f"{name} fails by itself: {child.err[-500:]}")
    return time.monotonic() - begun


def while_working(world: World, folder: Path, name: str, number: signal.Signals, delay: float,
                  slack: float) -> str | None:
    ready = folder / "ready"
    child = start(folder, name, *command(world, folder, name), prepare=ready.touch)
    while not ready.exists():
        time.sleep(0.001)
    time.sleep(0.01)            # until the script answers signals, which is its first act
    if child.ended(delay):
        return "finished"
    return judged(child, number, slack)


def judged(child: Child, number: signal.Signals, slack: float) -> str | None:
    """Sends a signal and says what is wrong with how the script ends."""
    child.send(number)
    sent = time.monotonic()
    if not child.ended(SECONDS + slack):
        child.send(signal.SIGKILL)
        child.wait()
        return f"still there after {SECONDS + slack:g} s: {child.err[-300:]}"
    if child.status == 0 and time.monotonic() - sent < AT_ITS_END:
        return "finished"
    return wrong(child.status, child.err, number)


def wrong(status: int, err: str, number: signal.Signals) -> str | None:
    said = [line.rpartition("\r")[2] for line in err.splitlines()]
    said = [line for line in said if line.startswith(("interrupted", "error:", "Traceback"))]
    if status != STATUS[number] or len(said) != 1 or not said[0].startswith("interrupted"):
        return f"status {status}, {said or err[-300:]}"
    return None


def while_importing(world: World, folder: Path, name: str, number: signal.Signals, rng: Random,
                    slack: float) -> str | None:
    """Sends a signal to a process that may not have come to the script's first act; then it may die of it."""
    arguments = [sys.executable, ROOT / "scripts" / f"{name}.py", *command(world, folder, name)]
    process = subprocess.Popen(list(map(str, arguments)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    time.sleep(rng.uniform(0.5, 6))
    process.send_signal(number)
    try:
        err = process.communicate(timeout=SECONDS + slack)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"still there after {SECONDS + slack:g} s: {process.communicate()[1][-300:]}"
    if process.returncode in (0, -number):
        return "finished"
    return wrong(process.returncode, err, number)
