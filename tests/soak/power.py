"""Power cuts: after the worst that a disk may lawfully do, all that a script announced is there, whole.

What was not synced is zeros of the right size, and names whose folder was not synced are as they were before.
"""
from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

from soak.campaign import Campaign
from soak.child import Child, made_elsewhere, start
from soak.kills import STEPS, compared, started
from soak.world import World

COUNT = 5
ANNOUNCED = re.compile(r"^(?:concept file|images|sheet|table|rows, .*):\s+(?:\d+ in )?(.+)$", re.MULTILINE)
UNSYNCED = ("metrics.csv", "hparams.yaml", "stdout", "stderr")        # Lightning's log, which nothing is read from


class Disk:
    """What is on a disk for sure: contents of files as they were last synced, names as their folder was."""

    def __init__(self, root: Path, place: Path):
        self.root, self.place = root, place
        self.contents: dict[int, bytes] = {}
        self.folders: dict[Path, dict[str, int]] = {}
        self.calls = 0                  # from the first state of a run on
        self._sync = os.fsync

    def watch(self, cut: int | None) -> None:
        """Watches from here on; at the sync of number `cut` from a run's first state on the power goes."""
        self.cut = cut
        os.fsync = self.fsync

    def fsync(self, descriptor: int) -> None:
        self._sync(descriptor)
        path, info = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor)
        if self.calls or path.name.startswith(".last.ckpt"):
            self.calls += 1
        if self.calls and self.calls == self.cut:
            self.write()
            os.kill(os.getpid(), signal.SIGKILL)
        if stat.S_ISDIR(info.st_mode):
            self.folders[path] = {name.name: name.stat().st_ino for name in path.iterdir() if name.exists()}
        else:
            self.contents[info.st_ino] = path.read_bytes()

    def write(self) -> None:
        """Writes what is on the disk for sure to `place`."""
        self._write(self.root, self.place)

    def _write(self, folder: Path, place: Path) -> None:
        place.mkdir()
        for name, number in self.folders.get(folder, {}).items():
            path = folder / name
            if path in self.folders or path.is_dir():
                self._write(path, place / name)
            else:
                length = path.stat().st_size if path.exists() else 0
                (place / name).write_bytes(self.contents.get(number, bytes(length)))


def run(campaign: Campaign) -> None:
    world = made_elsewhere(campaign.folder)
    whole = campaign.folder / "whole"
    start(whole, "train", *training(world), "-l", whole / "logs").wait()
    commands = [("train", *training(world), "-l"), ("sample", *sampling(world), "--outdir"),
                ("evaluate", *measuring(world), "--outdir"), ("train", *training(world), "--inspect")]
    for index, rng, folder in campaign.cases():
        if kind := index % (len(commands) + 1):
            problem = announced(start_on(folder, None, *commands[kind - 1], folder / "live"), folder)
        else:
            problem = goes_on(world, folder, rng.randint(3, 20), started(whole))
        campaign.fail(problem) if problem else campaign.count_as("whole")


def training(world: World) -> list[object]:
    return ["-b", *world.small.training_files, f"method.steps={STEPS}", "trainer.save_every=1", "preview.prompts=[]"]


def sampling(world: World) -> list[object]:
    return ["-b", *world.small.sampling_files, "--delta_ckpt", world.concept, "--prompt", "a {}", "--save_masks"]


def measuring(world: World) -> list[object]:
    return ["--images", world.small.photos, "--metrics", "judge", "--metric_weights",
            f"judge={world.metrics['judge']}"]


def start_on(folder: Path, cut: int | None, *command: Any) -> Child:
    """Runs a script on a disk that is watched, and cuts the power at its sync of number `cut`, or at its end."""
    def prepare() -> None:
        disk = Disk(folder, folder.with_name(f"{folder.name}-cut"))
        disk.watch(cut)
        leave = sys.exit

        def end(status: int) -> None:
            disk.write()
            leave(status)

        sys.exit = end

    child = start(folder, *command, prepare=prepare)
    child.wait()
    return child


def announced(child: Child, folder: Path) -> str | None:
    """Says which file that was announced the cut has spoiled."""
    found = [Path(text) for text in ANNOUNCED.findall(child.out)]
    if child.status != 0 or not found:
        return f"it announces nothing (status {child.status}): {child.err[-300:]}"
    files = [file for path in found for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return spoiled(files, folder)


def spoiled(files: list[Path], folder: Path) -> str | None:
    """Says which of these files of `folder` is not whole after the cut."""
    after = folder.with_name(f"{folder.name}-cut")
    for file in files:
        left = after / file.relative_to(folder)
        if not left.is_file() or left.read_bytes() != file.read_bytes():
            return f"'{file.relative_to(folder)}' is {'not whole' if left.is_file() else 'gone'}"
    return None


def goes_on(world: World, folder: Path, cut: int, whole: Path) -> str | None:
    """Cuts in the middle; whatever has its name is whole, and the run goes on from there."""
    child = start_on(folder, cut, "train", *training(world), "-l", folder / "live")
    after = folder.with_name(f"{folder.name}-cut")
    if child.status != -signal.SIGKILL:
        return f"the power was never cut (status {child.status})"
    for path in after.rglob("*"):
        if path.is_file() and path.stat().st_size and path.name not in UNSYNCED and not any(path.read_bytes()):
            return f"'{path.relative_to(after)}' is zeros"
    shutil.rmtree(folder)
    after.rename(folder)        # the disk as it comes back
    run_folder = next((path.parent.parent for path in folder.rglob("last.ckpt")), None)
    if run_folder is None:
        return "no state is left, though several were saved"
    resumed = start(folder / "resumed", "train", "-r", run_folder)
    resumed.wait()
    if resumed.status != 0 and f"is at step {STEPS} already" not in resumed.err:
        return f"it does not go on: {resumed.err[-300:]}"
    return compared(run_folder, whole)
