"""Lightning callbacks: concept files and resume state, preview grids, the progress bar."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.checkpoint import write_atomically
from ldm.config import DCIConfig, PreviewConfig, SampleConfig
from ldm.pictures import save_png
from ldm.pipeline import Generator
from ldm.progress import progress
from ldm.sampling import comparison_sheet

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class SaveConcept(Callback):
    """Writes checkpoints/step-000123.safetensors every k steps and at the end, and last.ckpt for resuming.

    Both are written under a temporary name and renamed, so that a crash leaves the earlier ones.
    """

    def __init__(self, folder: Path, every: int, dtype: str):
        self.folder, self.every, self.dtype = folder, every, DTYPES[dtype]
        self.done = 0     # the last step that was saved

    def path(self, step: int) -> Path:
        """Where the concept file of a step goes."""
        return self.folder / f"step-{step:06d}.safetensors"

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.done = trainer.global_step     # a resumed run has saved this step already

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.done or (step % self.every and step != trainer.max_steps):
            return
        self.done = step
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.folder / "last.ckpt")     # every process takes part; the first alone writes
            return
        module.concept().save(self.path(step), self.dtype)
        write_atomically(self.folder / "last.ckpt", lambda part: trainer.save_checkpoint(part))


class KeepConstants(Callback):
    """Computes what a run would compute in every step once, before its first, on the device it runs on."""

    def __init__(self, decoder: bool):
        self.decoder = decoder

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.keep_constants(trainer.train_dataloader.dataset, self.decoder, quiet=not trainer.is_global_zero)


class Progress(Callback):
    """One bar with loss and remaining time."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar = progress(total=trainer.max_steps, initial=trainer.global_step, desc="fine-tuning", unit="step",
                        quiet=not trainer.is_global_zero)
        self.mean: float | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches     # Lightning hands on its share of a step
        self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
        if trainer.global_step > self.bar.n:
            self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Preview(Callback):
    """Draws fixed prompts with fixed seeds, plain and with DCI, every k steps and at the end."""

    def __init__(self, folder: Path, settings: PreviewConfig, precision: str = "full"):
        self.folder, self.settings, self.precision = folder, settings, precision
        self.drawn: dict[int, Path] = {}
        self.start = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.start = trainer.global_step
        if self.settings.prompts:    # a mistake in them should come to light before the work
            self.generator(module).plan(self.settings.prompts, self.sampling())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, self.settings.every
        due = step > self.start and (step == trainer.max_steps or (every > 0 and step % every == 0))
        if due and self.settings.prompts and step not in self.drawn and trainer.is_global_zero:
            self.drawn[step] = self.draw(module, step)

    def sampling(self) -> SampleConfig:
        """Returns how the grid is sampled."""
        chosen = self.settings
        return SampleConfig(model=None, steps=chosen.steps, scale=chosen.scale, eta=0.0, n_samples=1, seed=chosen.seed,
                            precision=self.precision,
                            dci=DCIConfig(agg_lambda=list(chosen.agg_lambda), agg_time=chosen.agg_time))

    def generator(self, module: Any) -> Generator:
        """Returns a door to the model as far as it has learned."""
        generator = Generator(module.model, module.base, module.device)
        generator.applied = _Learning(module.concept())
        return generator

    def draw(self, module: Any, step: int) -> Path:
        """Writes images/preview-000123.png and returns its path; the model trains on unchanged."""
        training, home = module.model.training, module.model.first_stage_model.device
        generator = self.generator(module)
        drawn = {sample.row: sample.image for sample in generator.generate(self.settings.prompts, self.sampling())}
        page = comparison_sheet(generator, self.sampling(), self.settings.prompts, drawn, [], f"step {step}")
        module.model.train(training)
        module.model.first_stage_model.to(home)     # where it waits while the rest trains
        return save_png(page, self.folder / f"preview-{step:06d}.png")


class _Learning:
    """Stands for a concept that is being learned: its words and tensors are in the model already."""

    def __init__(self, concept: Any):
        self.concept = concept
