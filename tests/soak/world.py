"""What hostile things are made from and given to: the small world of the tests, a run in it, files of metrics."""
from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from conftest import SmallWorld, make_metric_files, make_small_world

from soak.campaign import Ended, call

STEPS = 2


@dataclass(frozen=True)
class World:
    """The small world, made below a folder; each part when it is first wanted."""

    folder: Path

    @cached_property
    def small(self) -> SmallWorld:
        folder = self.folder / "small"
        return SmallWorld(folder) if folder.exists() else make_small_world(folder)

    @cached_property
    def metrics(self) -> dict[str, Path]:
        folder = self.folder / "metrics"
        if folder.exists():
            return {path.stem: path for path in folder.iterdir()}
        folder.mkdir()
        return {name: path.rename(folder / f"{name}.safetensors") for name, path in make_metric_files(folder).items()}

    @cached_property
    def run(self) -> Path:
        """The folder of a finished run of two steps."""
        if not (self.folder / "logs").exists():
            self.train(self.folder / "logs")
        return next((self.folder / "logs").iterdir())

    @property
    def concept(self) -> Path:
        return self.run / "checkpoints" / f"step-{STEPS:06d}.safetensors"

    def train(self, logdir: Path, *arguments: object) -> Ended:
        return call("train", "-b", *self.small.training_files, "-l", logdir, "preview.prompts=[]", *arguments)

    @cached_property
    def valid(self) -> dict[str, Path]:
        """A good file for each door that reads tensors, which bad ones are made from."""
        vision = self.folder / "vision.pth"
        torch.save({"cls_token": torch.zeros(1, 1, 384), "norm.weight": torch.ones(384)}, vision)
        return {"concept": self.concept, "base": self.small.checkpoint, "convert": self.small.checkpoint,
                "resume": self.run / "checkpoints" / "last.ckpt", **self.metrics, "dino": vision}

    def give(self, door: str, path: Path, place: Path) -> Ended:
        """Gives a file of tensors to the script that reads such ones; whatever is written goes to `place`."""
        sample = ["sample", "-b", *self.small.sampling_files, "--outdir", place / "out", "--prompt"]
        if door == "concept":
            return call(*sample, "a {}", "--delta_ckpt", path, "--ddim_steps", 2, "--use_dci", "false", "--skip_grid")
        if door == "base":
            return call(*sample, "a cat", "--ckpt", path, "--ddim_steps", 1)
        if door == "convert":
            return call("convert", path, "-o", place / "converted.safetensors")
        if door == "resume":
            return self.resume(path, place)
        return call("evaluate", "--images", self.small.photos, "--metrics", door, "--metric_weights",
                    f"{door}={path}", "--outdir", place / "out")

    def resume(self, state: Path, place: Path) -> Ended:
        """Goes on, one step further, with a run whose state is another file's."""
        run = place / "run"
        shutil.copytree(self.run, run, ignore=shutil.ignore_patterns("images", "metrics*"))
        shutil.copyfile(state, run / "checkpoints" / "last.ckpt")
        return call("train", "-r", run, f"method.steps={STEPS + 1}", "preview.prompts=[]")

