"""Carries out one fine-tuning run: prepared, then fitted by Lightning, into a folder of its own."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from ldm.config import TrainConfig, typed
from ldm.data.batches import CaptionedImages, TrainingPlan
from ldm.device import out_of_memory
from ldm.signals import Interrupt, Signals, heeded
from ldm.training.callbacks import KeepConstants, Lighten, Preview, Progress, SaveConcept
from ldm.training.memory import MIXED, advice
from ldm.training.references import save_references
from ldm.training.regularization import load_class_images, make_class_images
from ldm.training.resume import Named, RunIdentity, name_images, resume_state
from ldm.training.run_folder import claim_run_folder, concept_file, describe_run, remove_if_empty, resume_hint
from ldm.training.setup import Setup, prepare
from ldm.training.slurm import earlier_run
from ldm.training.trainer import global_rank, make_trainer
from ldm.util import UserError


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its last concept file, its last preview."""

    folder: Path
    concept: Path
    preview: Path | None


class ConceptData(pl.LightningDataModule):
    """Gets the class images, and hands each device its share of the training plan.

    Lightning lets the first process of all `prepare_data` while the others wait, then has everyone `setup`. A plan
    starts at the step a resumed run stands at.

    Args:
        ready: called with name and class images once these are known.
    """

    def __init__(self, setup: Setup, ready: Callable[[Named, CaptionedImages | None], None]):
        super().__init__()
        self.run, self.ready = setup, ready
        self.identity = setup.identity
        self.regularization: CaptionedImages | None = None
        self.prepare_data_per_node = False      # the disk is shared: one process makes the images for all

    def prepare_data(self) -> None:
        """Draws class images where that is configured; Lightning's first process alone comes here."""
        config, module = self.run.config, self.run.module
        make_class_images(config.data.reg, config.concepts, module.model, module.base, self.run.framing.size,
                          self.run.device)

    def setup(self, stage: str) -> None:
        """Reads the class images, in every process."""
        config = self.run.config
        self.regularization = load_class_images(config.data.reg, config.concepts, self.run.module.base,
                                                self.run.framing)
        named = name_images(self.regularization)
        self.identity = replace(self.identity, class_pictures=named)     # goes into the resume state
        self.ready(named, self.regularization)

    def state_dict(self) -> dict[str, Any]:
        """Returns what Lightning saves beside the tensors: what the run is about."""
        return asdict(self.identity)

    def train_dataloader(self) -> DataLoader:
        """Returns this device's share of the training plan."""
        method, trainer = self.run.config.method, self.trainer
        # Where a resumed run stood.
        plan = TrainingPlan(self.run.references, self.regularization, batch_size=method.batch_size,
                            prior_weight=method.prior_weight, flip=method.flip, seed=self.run.config.trainer.seed,
                            first=trainer.global_step * method.accumulate, rank=trainer.global_rank,
                            world_size=trainer.world_size)
        return DataLoader(plan, batch_size=None)     # the plan makes whole batches


def fine_tune(config: TrainConfig | DictConfig, resume: Path | None = None, insist: bool = False) -> Run:
    """Carries out a run, or continues the one in folder `resume`; in a job that Slurm started again, its own.

    Args:
        insist: continues although base, concepts or images are not what they were.

    Raises:
        UserError: anything the user can fix, before training where possible.
        Interrupt: a signal ended the run; it says where the run's state is, if a step was made.
    """
    config = typed(config)
    if global_rank(config.trainer.devices):
        sys.stdout = open(os.devnull, "w")         # the first process speaks for all
    begun = None if resume else earlier_run(Path(config.trainer.logdir))     # Slurm starts the same command again
    if begun and resume_state(begun).step >= config.method.steps:
        print(f"the run in '{begun}', which this job began, is finished")
        return Run(begun, concept_file(begun / "checkpoints", config.method.steps), None)
    try:
        with heeded() as signals:
            return fit(prepare(config, resume or begun, insist), signals)
    except (RuntimeError, MemoryError, OSError) as error:
        if out_of_memory(error):
            raise UserError(f"memory ran out; {advice(config.method, config.trainer)}.") from error
        raise


def fit(setup: Setup, signals: Signals) -> Run:
    """Trains what `prepare` made ready, and returns where it is.

    Raises:
        UserError: what only shows while it runs: class images, a loss that is not finite, a full disk.
        Interrupt: a signal ended the run.
    """
    config, module = setup.config, setup.module
    first = global_rank(config.trainer.devices) == 0     # the process that speaks and writes
    folder = Path(config.trainer.logdir)         # of helpers, who write nothing
    if setup.resumed:
        folder = setup.resumed.folder
    elif first:
        folder = claim_run_folder(config)

    def ready(named: Named, regularization: CaptionedImages | None) -> None:
        setup.check(RunIdentity(class_pictures=named))
        report(setup, regularization, folder)
        if first and not setup.resumed:
            describe_run(config, folder)
        if first:
            # After the report: a resumed run has them already, and they are the same.
            save_references(setup.references, config.concepts, setup.counts, folder / "images")

    trainer_config = config.trainer
    save = SaveConcept(folder / "checkpoints", trainer_config.save_every, trainer_config.save_dtype, signals)
    precision = "autocast" if trainer_config.precision in MIXED else "full"
    preview = Preview(folder / "images", config.preview, precision)
    # In this order: memory first, then the loss is looked at before it is saved.
    callbacks = [Lighten(MIXED.get(trainer_config.precision), trainer_config.checkpointing), Progress(save), save,
                 preview]
    if trainer_config.cache:
        callbacks.append(KeepConstants(decoder=bool(config.preview.prompts)))
    trainer = make_trainer(trainer_config, config.method, folder, setup.device, callbacks)
    try:
        state = setup.resumed.state if setup.resumed else None
        trainer.fit(module, datamodule=ConceptData(setup, ready), weights_only=True, ckpt_path=state)
    except (SystemExit, KeyboardInterrupt, UserError) as error:
        _end(error, trainer, signals, resume_hint(folder, save.done))
    finally:
        if first and not setup.resumed:
            remove_if_empty(folder)
    if first:
        print(f"moved, as shares of their norm: {_shares(setup)}")
    return Run(folder, save.path(config.method.steps), next(reversed(preview.drawn.values()), None))


def _end(error: BaseException, trainer: pl.Trainer, signals: Signals, hint: str) -> None:
    """Ends a run that a signal or an error stopped; all processes end for the same reason, the first one says it."""
    if isinstance(error, UserError):
        if not trainer.is_global_zero:
            sys.exit(1)
        if signals.number is not None:
            raise Interrupt(signals.number, f"interrupted, and {error}") from error
        raise error
    number = signals.number or signal.SIGINT               # Lightning leaves by SystemExit after Ctrl-C
    if not trainer.is_global_zero:
        sys.exit(Interrupt(number).status)
    raise Interrupt(number, f"interrupted {hint}") from error


def report(setup: Setup, regularization: CaptionedImages | None, folder: Path) -> None:
    """Says what is about to be trained."""
    config, module = setup.config, setup.module
    method, scheme = config.method, module.schemes[0]
    print(f"base: {module.base['name']} ({module.base['hash']})")
    print(f"references: {len(setup.references)}, regularization images: {len(regularization or ())}")
    step = "1 reference" if method.batch_size == 1 else f"{method.batch_size} references"
    if regularization:
        step += f" and as many regularization images of weight {method.prior_weight:g}"
    print(f"method: {method.name}; each step: {step}")
    print(f"concept: {scheme.concept} (words to learn: n = {len(scheme.words)}; then the class noun)")
    if scheme.prefix + scheme.suffix:
        print(f"contexts: p = {scheme.prefix} before and s = {scheme.suffix} after the concept, written <ctx-...>; "
              "they take up what is one image's own, and are left out when drawing")
    print(f"first training prompt: {module.captions[0]}")
    for concept, further in zip(config.concepts[1:], module.schemes[1:], strict=True):
        print(f"{concept.name}: write {further.concept} in prompts")
    print(f"trained values: {_counts(setup)}")
    rate = module.effective_learning_rate
    print(f"effective learning rate: {rate * method.kv_lr_factor:g} for {_name_of_weights(setup)}, {rate:g} for words, "
          f"{rate * method.context_lr_factor:g} for contexts; {method.steps} steps")
    print(f"run folder: {folder}", flush=True)


def _shares(setup: Setup) -> str:
    """Says how far each kind of what was trained has moved."""
    names = {"weights": _name_of_weights(setup)}
    parts = []
    for kind, share in setup.module.moved().items():
        parts.append(f"{names.get(kind, kind)} {100 * share:.1f} %")
    return ", ".join(parts)


def _name_of_weights(setup: Setup) -> str:
    """Returns how the trained weights of the network are called."""
    return "K/V" if setup.config.method.train == "crossattn-kv" else "network"


def _counts(setup: Setup) -> str:
    """Counts the trained values by what they are."""
    module, weights = setup.module, "of the network"
    if setup.config.method.train == "crossattn-kv":
        weights = "of K/V (keys and values, by which the network reads the prompt)"
    blocks = {weights: module.trained.values(), "of the concept's words": module.word_blocks,
              "of the images' contexts": module.context_blocks}
    parts = []
    for name, values in blocks.items():
        parts.append(f"{sum(value.numel() for value in values):,} {name}")
    return ", ".join(parts)
