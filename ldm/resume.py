"""Going on with a run: its state, read and checked, and whether it is still the same run."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from ldm.checkpoint import load_file, refuse_non_finite
from ldm.customization.contexts import PromptScheme
from ldm.customization.delta import load_concept
from ldm.data.concept import CaptionedImages
from ldm.files import write_atomically
from ldm.util import UserError

IDENTITY = "ConceptData"      # Lightning's place for what the data module of this name tells it to save


@dataclass(frozen=True)
class Named:
    """Something that is the same where its `key` is, and is called `text` in messages."""

    key: str
    text: str = field(compare=False)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is about: its base, its concepts' words and nouns, its pictures. None: not known (yet)."""

    base: Named | None = None
    concepts: Named | None = None
    photos: Named | None = None
    class_pictures: Named | None = None


def identify(base: Mapping[str, str], schemes: Sequence[PromptScheme]) -> RunIdentity:
    """Names a run by its base and concepts."""
    concepts = ", ".join(f"'{scheme.concept}'" for scheme in schemes)
    return RunIdentity(Named(base["hash"], f"'{base['name']}' ({base['hash']})"), Named(concepts, concepts))


def name_pictures(pictures: CaptionedImages | None) -> Named:
    """Names pictures by what the network sees of them."""
    if pictures is None:
        return Named("", "none")
    digest = hashlib.sha256(pictures.images.contiguous().numpy())
    if pictures.masks is not None:
        digest.update(pictures.masks.contiguous().numpy())
    key = digest.hexdigest()[:16]
    return Named(key, f"{len(pictures)} ({key})")


@dataclass(frozen=True)
class Resumed:
    """A run that goes on: its folder, the file and the step it goes on from, what it is about."""

    folder: Path
    state: Path
    step: int
    identity: RunIdentity

    def check(self, now: RunIdentity, insist: bool) -> None:
        """Refuses to go on as another run, or only warns of it.

        Raises:
            UserError: something is not what it was, and nobody insists.
        """
        for part in fields(RunIdentity):
            before, after = getattr(self.identity, part.name), getattr(now, part.name)
            if before is None or after is None or before == after:
                continue
            changed = (f"the run in '{self.folder}' was trained with the {part.name.replace('_', ' ')} {before.text}, "
                       f"and this is {after.text}")
            if not insist:
                raise UserError(f"{changed}; give what it was trained with, or go on all the same with --insist.")
            print(f"warning: {changed}.")


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
        return load_file(path, "resume state")

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        raise NotImplementedError("a run's states are replaced, never removed")


def state_tensors(trained: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns every tensor a run goes on from, by name: what is trained, and what an optimizer's state keeps of it."""
    return {**trained, **{f"optimizer.{index}.{name}": value for index, moments in optimizer["state"].items()
                          for name, value in moments.items()}}


def resume_state(folder: Path) -> Resumed:
    """Finds what a run in `folder` goes on from, refusing what is damaged before any work.

    Raises:
        UserError: the file is missing, damaged, not a run's, or has values that are not finite.
    """
    path = folder / "checkpoints" / "last.ckpt"
    content = load_file(path, "resume state")
    try:
        (optimizer,) = content["optimizer_states"]
        step, tensors = content["global_step"], state_tensors(content["state_dict"], optimizer)
        known = content.get(IDENTITY)
        identity = earlier_identity(folder) if known is None else \
            RunIdentity(**{name: part and Named(**part) for name, part in known.items()})
        own = {"fit_loop"} <= content["loops"].keys() and step > 0 and \
            all(isinstance(value, Tensor) for value in tensors.values())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        own = False
    if not own:
        raise UserError(f"resume state '{path}' was not written by a run; give a folder under logs/.")
    refuse_non_finite(tensors, f"resume state '{path}'")
    return Resumed(folder, path, step, identity)


def earlier_identity(folder: Path) -> RunIdentity:
    """Names a run whose state does not (an earlier version's) by its newest concept file; photos stay unknown."""
    files = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    if not files:
        return RunIdentity()
    concept = load_concept(files[-1])
    return identify(concept.base, concept.schemes)
