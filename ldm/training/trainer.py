"""Lightning's trainer and loggers, as the configuration names them."""
from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.checkpoint import load_file
from ldm.config import MethodConfig, TrainerConfig
from ldm.files import write_atomically
from ldm.util import UserError

DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}     # by trainer.accelerator
PACKAGES = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}     # any of them will do


class StateFiles(CheckpointIO):
    """How Lightning writes and reads resume states: like all our files, and not through a folder for temporary ones."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str],
                        storage_options: Any = None) -> None:
        def write(part: Path) -> None:
            with part.open("wb") as file:     # given a path, torch would write its name into the file
                torch.save(checkpoint, file)

        write_atomically(path, write)

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = None,
                        weights_only: bool | None = None) -> dict[str, Any]:
        return load_file(path, "resume state")     # a state is a file like others': nothing in it may run

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError("a run's states are replaced, never removed")


def global_rank(devices: int) -> int:
    """Returns this process's number among all of a run's, on all machines, as Lightning will count them.

    Args:
        devices: of one machine; where nobody else started its processes, Lightning does.
    """
    # Whoever started this process says which it is.
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment):
        if kind.detect():
            return kind().global_rank()
    alone = LightningEnvironment()
    return alone.node_rank() * devices + alone.local_rank()


def make_trainer(settings: TrainerConfig, method: MethodConfig, folder: Path, device: torch.device,
                 callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Builds the Lightning trainer.

    Raises:
        UserError: this machine does not have what the configuration names.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)    # its hints about other products, mostly
    strategy = "auto"
    if settings.devices * settings.num_nodes > 1:
        strategy = "ddp"
    logger = make_logger(settings.logger, folder)
    try:
        return pl.Trainer(accelerator=device.type, devices=settings.devices, num_nodes=settings.num_nodes,
                          strategy=strategy, precision=settings.precision,
                          max_steps=method.steps, accumulate_grad_batches=method.accumulate,
                          logger=logger, callbacks=list(callbacks), plugins=[StateFiles()],
                          log_every_n_steps=min(10, method.steps),
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                          use_distributed_sampler=False, default_root_dir=folder)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"the trainer cannot be set up ({' '.join(str(error).split())}); check trainer.accelerator, "
                        "devices and precision.") from error


def check_logger(kind: str) -> None:
    """Refuses a logger that could not log; W&B would ask for its key in the middle of the work.

    Raises:
        UserError: the logger is not installed, or nobody has logged in to W&B.
    """
    specs = [importlib.util.find_spec(package) for package in PACKAGES[kind]]
    if specs and not any(spec and spec.origin for spec in specs):       # a folder of that name has no origin
        raise UserError(f"trainer.logger '{kind}' needs the package '{kind}'; install it, or use trainer.logger=csv.")
    if kind == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb
        if not wandb.api.api_key:
            raise UserError("trainer.logger 'wandb' needs a login; run 'wandb login', or set WANDB_MODE=offline, or "
                            "use trainer.logger=csv.")


def make_logger(kind: str, folder: Path) -> Logger:
    """Builds the logger; TensorBoard and W&B are imported only when asked for.

    A resumed run logs beside what there is: Lightning empties a folder it is given.
    """
    if kind == "tensorboard":
        return TensorBoardLogger(folder, name="", version="tensorboard")
    if kind == "wandb":
        return WandbLogger(name=folder.name, save_dir=folder)
    return CSVLogger(folder, name="", version=metrics_name(folder))


def metrics_name(folder: Path) -> str:
    """Returns the name of a run's next folder of metrics: metrics, metrics-1, metrics-2, ..."""
    name, numbers = "metrics", itertools.count(1)
    while (folder / name).exists():
        name = f"metrics-{next(numbers)}"
    return name
