"""Going on with a run: its state, read and checked, and whether it is still the same run."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from ldm.checkpoint import load_file, refuse_non_finite
from ldm.customization.delta import load_concept
from ldm.customization.ico import PromptScheme
from ldm.data.batches import CaptionedImages
from ldm.records import BadRecord, Record, read_record
from ldm.util import UserError

IDENTITY = "ConceptData"      # Lightning's place for what the data module of this name tells it to save


@dataclass(frozen=True)
class Named:
    """Something that is the same where its `key` is, and is called `text` in messages."""

    key: str
    text: str = field(compare=False)


@dataclass(frozen=True)
class RunIdentity:
    """What a run is about: its base, its concepts' words and nouns, its images. None: not known (yet)."""

    base: Named | None = None
    concepts: Named | None = None
    photos: Named | None = None
    class_pictures: Named | None = field(default=None, metadata={"title": "class images"})     # as states call it


def identify(base: Mapping[str, str], schemes: Sequence[PromptScheme]) -> RunIdentity:
    """Names a run by its base and concepts."""
    concepts = ", ".join(f"'{scheme.concept}'" for scheme in schemes)
    return RunIdentity(Named(base["hash"], f"'{base['name']}' ({base['hash']})"), Named(concepts, concepts))


def name_images(images: CaptionedImages | None) -> Named:
    """Names images by what the network sees of them."""
    if images is None:
        return Named("", "none")
    # What the network sees, whatever the files are called.
    digest = hashlib.sha256(images.images.contiguous().numpy())
    if images.masks is not None:
        digest.update(images.masks.contiguous().numpy())
    key = digest.hexdigest()[:16]
    return Named(key, f"{len(images)} ({key})")


@dataclass(frozen=True)
class Resumed:
    """A run that continues: its folder, the file and the step it resumes from, what it is about."""

    folder: Path
    state: Path
    step: int
    identity: RunIdentity

    def check(self, now: RunIdentity, insist: bool) -> None:
        """Refuses to continue as another run, or only warns of it.

        Raises:
            UserError: something is not what it was, and nobody insists.
        """
        for part in fields(RunIdentity):
            before, after = getattr(self.identity, part.name), getattr(now, part.name)
            if before is None or after is None or before == after:     # what is not known yet cannot differ
                continue
            title = part.metadata.get("title", part.name)
            changed = f"the run in '{self.folder}' was trained with the {title} {before.text}, and this is {after.text}"
            if not insist:
                raise UserError(f"{changed}; give what it was trained with, or go on all the same with --insist.")
            print(f"warning: {changed}.")


class _Name(Record):
    key: str
    text: str


class _Identity(Record):
    base: _Name | None = None
    concepts: _Name | None = None
    photos: _Name | None = None
    class_pictures: _Name | None = None


class _Optimizer(Record):
    state: dict[int, dict[str, Tensor]]


class _Loops(Record):
    fit_loop: dict[str, Any]


class _State(Record):
    """What we use of a resume state, which Lightning lays out."""

    global_step: Annotated[int, Field(gt=0, lt=2 ** 53)]
    state_dict: dict[str, Tensor]
    optimizer_states: Annotated[list[_Optimizer], Field(min_length=1, max_length=1)]
    loops: _Loops
    identity: Annotated[_Identity | None, Field(alias=IDENTITY)] = None     # earlier versions' states have none


def _identity(state: _State) -> RunIdentity | None:
    """Says what the run of a state is about, where the state does."""
    if state.identity is None:
        return None
    known = {name: Named(part.key, part.text) for name, part in state.identity if part is not None}
    return RunIdentity(**known)


def state_tensors(trained: Mapping[str, Tensor], moments: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns every tensor a run resumes from, by name: what is trained, and what an optimizer's state keeps of it."""
    tensors = dict(trained)
    for index, values in moments.items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = value
    return tensors


def resume_state(folder: Path) -> Resumed:
    """Finds what a run in `folder` resumes from, refusing what is damaged before any work.

    Raises:
        UserError: the file is missing, damaged, not a run's, or has values that are not finite.
    """
    path = folder / "checkpoints" / "last.ckpt"
    content = load_file(path, "resume state")
    try:
        state = read_record(_State, content)
    except BadRecord as error:
        raise UserError(f"resume state '{path}' was not written by a run ({error}); give a folder under logs/.") \
            from error
    refuse_non_finite(state_tensors(state.state_dict, state.optimizer_states[0].state), f"resume state '{path}'")
    return Resumed(folder, path, state.global_step, _identity(state) or earlier_identity(folder))


def earlier_identity(folder: Path) -> RunIdentity:
    """Names a run whose state does not (an earlier version's) by its newest concept file; photos stay unknown."""
    files = sorted((folder / "checkpoints").glob("step-*.safetensors"))     # numbered with leading zeros
    if not files:
        return RunIdentity()
    concept = load_concept(files[-1])
    return identify(concept.base, concept.schemes)
