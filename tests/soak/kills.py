"""Training killed at any time, also inside saves: it goes on to the very files of a run that nobody killed."""
from __future__ import annotations

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ldm.training.callbacks import SaveConcept
from soak.campaign import Campaign
from soak.child import Child, made_elsewhere, start
from soak.world import World

COUNT, STEPS = 200, 6
CALLS = {"fsync": 24, "replace": 12, "chmod": 12, "open": 12}        # that the saves are made of, of a whole run


def run(campaign: Campaign) -> None:
    world = made_elsewhere(campaign.folder)
    begun = time.monotonic()
    whole = finished(begin(world, campaign.folder / "whole"), campaign.folder / "whole")
    seconds = time.monotonic() - begun
    if whole is None:
        return campaign.fail("the run that nobody kills fails")
    for index, rng, folder in campaign.cases():
        kill = (killed, killed_at_a_call, killed_while_writing)[index % 3]
        child = kill(world, folder, rng, seconds)
        state = "finished before" if child.status == 0 else "killed while starting" if not started(folder) else "killed"
        problem = after(world, folder, whole)
        campaign.fail(f"{state}: {problem}") if problem else campaign.count_as(state)
        shutil.rmtree(folder)


def begin(world: World, folder: Path, **how: Any) -> Child:
    return start(folder, "train", "-b", *world.small.training_files, f"method.steps={STEPS}", "trainer.save_every=1",
                 "preview.prompts=[]", "-l", folder / "logs", **how)


def killed(world: World, folder: Path, rng: Random, seconds: float) -> Child:
    """Kills a run at any time."""
    child = begin(world, folder)
    if not child.ended(rng.uniform(0.4, 1) * seconds):
        child.send(signal.SIGKILL)
        child.wait()
    return child


def killed_while_writing(world: World, folder: Path, rng: Random, seconds: float) -> Child:
    """Kills a run in the milliseconds of a save, wherever it is, also outside of Python."""
    left, delay = [rng.randint(1, STEPS)], rng.uniform(1e-4, 0.03)

    def write(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)       # which ends the process on the spot
            signal.setitimer(signal.ITIMER_REAL, delay)
        save(*arguments)

    save = SaveConcept.write
    child = begin(world, folder, prepare=partial(setattr, SaveConcept, "write", write))
    child.wait()
    return child


def killed_at_a_call(world: World, folder: Path, rng: Random, seconds: float) -> Child:
    """Kills a run just before or just after one of the calls that saves are made of."""
    name, before = rng.choice(list(CALLS)), rng.random() < 0.5
    left = [rng.randint(1, CALLS[name])]

    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*arguments, **named)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def write(*arguments: Any) -> None:
        setattr(os, name, call)
        save(*arguments)

    plain, save = getattr(os, name), SaveConcept.write
    prepare = partial(setattr, SaveConcept, "write", write)     # from the first save on
    child = begin(world, folder, prepare=prepare)
    child.wait()
    return child


def started(folder: Path) -> Path | None:
    """Returns the folder of a run that can go on."""
    return next((path.parent.parent for path in folder.glob("logs/*/checkpoints/last.ckpt")), None)


def finished(child: Child, folder: Path) -> Path | None:
    """Waits for a run; returns its folder, if it went well."""
    child.wait()
    return started(folder) if child.status == 0 else None


def after(world: World, folder: Path, whole: Path) -> str | None:
    """Goes on to the end, and says what differs from the run that nobody killed."""
    place = started(folder)
    damaged = [path.name for path in place.glob("checkpoints/step-*") if differs(path, whole)] if place else []
    if damaged:
        return f"{damaged[0]} is damaged right after the kill"
    if place is None:
        child = begin(world, folder / "again")
        done = finished(child, folder / "again")
    else:
        child = start(folder / "resumed", "train", "-r", place)
        child.wait()
        over = f"is at step {STEPS} already" in child.err
        done = place if child.status == 0 or over else None
        if over and not parts(place):
            return compared(place, whole)
    if done is None:
        return f"it does not go on (status {child.status}): {child.err[-400:]}"
    return f"a part is left: {parts(done)[0]}" if parts(done) else compared(done, whole)


def parts(place: Path) -> list[Path]:
    return list(place.rglob("*.part"))


def compared(place: Path, whole: Path) -> str | None:
    names = sorted(path.name for path in whole.glob("checkpoints/*"))
    missing = [name for name in names if not (place / "checkpoints" / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    other = [name for name in names if differs(place / "checkpoints" / name, whole)]
    return f"{other[0]} is another" if other else None


def differs(path: Path, whole: Path) -> bool:
    """Says whether a file is not what it is in the run that nobody killed: by bytes, or by the tensors of a state."""
    other = whole / "checkpoints" / path.name
    if path.suffix != ".ckpt":
        return not other.is_file() or path.read_bytes() != other.read_bytes()
    return not same(*(torch.load(file, weights_only=True) for file in (path, other)))


def same(first: Any, second: Any) -> bool:
    """Says whether nested tables hold the same tensors."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return True
