"""Lightning callbacks: concept files and resume state, preview grids, the progress bar."""
from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from ldm.checkpoint import refuse_non_finite
from ldm.comparison import comparison_sheet
from ldm.config import DCIConfig, PreviewConfig, SampleConfig
from ldm.pipeline import Generator
from ldm.progress import progress
from ldm.sheets import save_png
from ldm.signals import Interrupt, Signals
from ldm.training.resume import state_tensors
from ldm.training.run_folder import concept_file
from ldm.util import UserError

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


class SaveConcept(Callback):
    """Writes checkpoints/step-000123.safetensors and last.ckpt, from which a run resumes, every k steps and at the end.

    Both are written under a temporary name and renamed, so that a crash leaves the earlier ones; neither is written
    with a value that is not finite. A signal that ends the run has both written for the last whole step. It is heard
    at once but while parameters change or files are written; several processes hear it together, between two steps.
    """

    def __init__(self, folder: Path, every: int, dtype: str, signals: Signals):
        self.folder, self.every, self.dtype, self.signals = folder, every, DTYPES[dtype], signals
        self.step = self.done = 0     # the last whole step, and the last that was saved
        self.started = False

    def path(self, step: int) -> Path:
        """Where the concept file of a step goes."""
        return concept_file(self.folder, step)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.step = self.done = trainer.global_step     # a resumed run has saved this step already
        self.started = True
        self.signals.install()    # Lightning put its own in their place: they wait for a batch, or requeue a Slurm job

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.signals.held = trainer.world_size > 1

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.signals.held = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step % self.every == 0 or self.step == trainer.max_steps:
            self.write(trainer, module)
            module.log_dict({f"moved_{kind}": share for kind, share in module.moved().items()})
        if trainer.strategy.reduce_boolean_decision(self.signals.number is not None, all=False):
            raise Interrupt(self.signals.number or signal.SIGTERM)
        self.signals.held = trainer.world_size > 1

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and self.started and trainer.global_step > self.done:
            self.signals.held = True
            self.write(trainer, module)

    def write(self, trainer: pl.Trainer, module: Any) -> None:
        """Writes the present step's concept file and state; every process takes part, the first alone writes.

        Raises:
            UserError: a value is not finite, or the disk refuses.
        """
        tensors = state_tensors(module.state_dict(), trainer.optimizers[0].state_dict()["state"])
        # Before the concept file, so that neither is written.
        refuse_non_finite(tensors, f"the state of {self.place(trainer)}")
        if trainer.is_global_zero:
            module.concept().save(self.path(trainer.global_step), self.dtype)
        trainer.save_checkpoint(self.folder / "last.ckpt")      # as `StateFiles` writes it
        self.done = trainer.global_step

    def place(self, trainer: pl.Trainer) -> str:
        """Says where a run stands that cannot continue: its step, its learning rates, and what of it is kept."""
        rates = sorted({group["lr"] for group in trainer.optimizers[0].param_groups})
        earlier = self.path(self.done)
        kept = f"'{earlier}' and last.ckpt are kept" if earlier.exists() else "nothing was saved before"
        return f"step {trainer.global_step} at learning rate {' and '.join(f'{rate:g}' for rate in rates)} ({kept})"


class Lighten(Callback):
    """Saves memory, as `ConceptFinetune.lighten` does, once the untouched base has drawn what it is asked for."""

    def __init__(self, dtype: torch.dtype | None, checkpointing: bool | None):
        self.dtype, self.checkpointing = dtype, checkpointing

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        module.lighten(self.dtype, self.checkpointing)


class KeepConstants(Callback):
    """Computes once, on the device the run is on, what all its steps from here to the last would compute again."""

    def __init__(self, decoder: bool):
        self.decoder = decoder

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.keep_constants(trainer.train_dataloader.dataset, self.decoder, quiet=not trainer.is_global_zero,
                              last=trainer.max_steps * trainer.accumulate_grad_batches)


class Progress(Callback):
    """One bar with loss and remaining time; stops a run whose loss is not finite, in all processes alike.

    `save` comes after it: what such a step has made is not saved.
    """

    def __init__(self, save: SaveConcept):
        self.save = save
        self.bar: tqdm | None = None
        self.mean: float | None = None
        self.lost: float | None = None      # the first loss that was not finite

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None:                # what comes before the first step is not part of its time
            self.bar = progress(total=trainer.max_steps, initial=trainer.global_step, desc="fine-tuning", unit="step",
                                quiet=not trainer.is_global_zero)
            self.step, self.time = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches     # Lightning hands on its share of a step
        self.mean = loss if self.mean is None else 0.98 * self.mean + 0.02 * loss
        if self.lost is None and not math.isfinite(loss):
            self.lost = loss
        if trainer.global_step == self.step:
            return
        if trainer.strategy.reduce_boolean_decision(self.lost is not None, all=False):
            loss = "not finite in another process" if self.lost is None else self.lost
            raise UserError(f"the loss is {loss} in {self.save.place(trainer)}; lower method.learning_rate.")
        self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
        self.bar.update(trainer.global_step - self.step)
        now = time.monotonic()
        module.log_dict({"learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                         "seconds_per_step": now - self.time})
        self.step, self.time = trainer.global_step, now

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if self.bar is not None:
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
            self.generator(module).requests(self.settings.prompts, self.sampling())

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
                            dci=DCIConfig(agg_lambda=list(chosen.agg_lambda), agg_time=chosen.agg_time,
                                          mask_sum=chosen.mask_sum))

    def generator(self, module: Any) -> Generator:
        """Returns a door to the model as far as it has learned."""
        generator = Generator(module.model, module.base, module.device)
        generator.adopt(module.concept())
        return generator

    def draw(self, module: Any, step: int) -> Path:
        """Writes images/preview-000123.png and returns its path; the model trains on unchanged."""
        # Sampling turns dropout off and may move the VAE.
        training, home = module.model.training, module.model.first_stage_model.device
        generator = self.generator(module)
        drawn = {sample.request: sample.image for sample in generator.generate(self.settings.prompts, self.sampling())}
        captions = generator.prompts.captions(self.settings.prompts, self.sampling().dci)
        page = comparison_sheet(captions, "fine-tuned", drawn, [], f"step {step}")
        module.model.train(training)
        module.model.first_stage_model.to(home)     # where it waits while the rest trains
        return save_png(page, self.folder / f"preview-{step:06d}.png")
