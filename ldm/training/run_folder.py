"""A run's folder: its name, what describes the run in it, how an interrupted one is resumed."""
from __future__ import annotations

import importlib.metadata
import itertools
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.config import TrainConfig
from ldm.config_files import save_config, to_dict
from ldm.files import NameTaken, take_folder, write_text
from ldm.training.slurm import COMMAND, command_text, job
from ldm.util import UserError, folder_name, from_here

DECISIVE = ("torch", "pytorch-lightning", "numpy", "pillow", "transformers")     # packages that decide numbers


def concept_file(checkpoints: Path, step: int) -> Path:
    """Returns where the concept file of a step is in a folder of checkpoints."""
    return checkpoints / f"step-{step:06d}.safetensors"


def claim_run_folder(config: TrainConfig) -> Path:
    """Makes logs/<time>_<name>/ for this run alone.

    Raises:
        UserError: it cannot be made.
    """
    name = folder_name(config.name or config.concepts[0].name, "run")
    stem = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{name}"
    logdir = Path(config.trainer.logdir)
    try:
        for attempt in itertools.count():     # runs of the same second
            with suppress(NameTaken):
                return take_folder(logdir / (f"{stem}-{attempt}" if attempt else stem))
    except OSError as error:
        raise UserError(f"the run folder '{logdir / stem}' cannot be made ({error.strerror}); "
                        "choose another --logdir.") from error
    raise AssertionError("there is always a free name")


def describe_run(config: TrainConfig, folder: Path) -> None:
    """Writes the resolved configuration and the command into a new run's folder."""
    save_config(config, folder / "configs" / "project.yaml")
    write_text(folder / COMMAND, command_text())


def remove_if_empty(folder: Path) -> None:
    """Takes a run's folder away where nothing came of it, and the logger's in it."""
    for empty in (folder / "metrics", folder):
        with suppress(OSError):
            empty.rmdir()


def shareable(config: TrainConfig) -> dict[str, Any]:
    """Returns the configuration for a file others may get: without the paths of this machine."""
    content = to_dict(config)
    content["base"] |= {"ckpt": None, "vae": None}
    content["trainer"]["logdir"] = ""     # a folder's name may be a person's
    content["data"]["reg"]["root"] = ""
    for concept in content["concepts"]:
        concept["images"] = concept["regularization"] = ""
        concept["regularization_caption"] = None
    return content


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide numbers."""
    return {name: importlib.metadata.version(name) for name in DECISIVE}


def resume_hint(folder: Path, step: int) -> str:
    """Says where an interrupted run stands and how it is resumed."""
    if not (folder / "checkpoints" / "last.ckpt").exists():
        return f"before the first step; '{folder}' holds nothing to go on from."
    run = shlex.quote(str(folder))     # to be pasted into a shell
    hint = (f"and saved at step {step}; go on with: bash {from_here('train.sh')} -r {run}   "
            f"(or: python {from_here('scripts/train.py')} -r {run})")
    return f"{hint}   (or: scontrol requeue {job()})" if job() else hint
