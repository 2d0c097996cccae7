"""What a sweep is made of: its typed configuration, its concepts, its jobs."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from os.path import exists
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config import SampleConfig, TrainConfig
from ldm.config_files import merge
from ldm.customization.tokens import auxiliary_noun, join_pieces, split_at_concept
from ldm.data.concept_lists import read_concepts
from ldm.evaluation.image_sets import read_prompts
from ldm.evaluation.scoring import plain_text
from ldm.text import literal
from ldm.util import UserError, shipped

BASE = "base model"                          # the method of jobs that draw with the untuned network
NOUN, AUXILIARY = "{noun}", "{auxiliary}"    # what may take the concept's place in prompts


@dataclass
class SweepConfig:
    """A sweep: configs/sweep/*.yaml."""

    model_files: list[str] = field(default_factory=list)
    training_files: list[str] = field(default_factory=list)
    training: list[str] = field(default_factory=list)         # key=value overrides of all methods
    sampling_files: list[str] = field(default_factory=list)
    sampling: list[str] = field(default_factory=list)         # key=value overrides of all images
    concept_files: list[str] = field(default_factory=list)
    dataset: str | None = None            # instead: CustomConcept101's dataset.json, or DreamBooth's folder
    dataset_concepts: list[str] = field(default_factory=list)  # which of its concepts; none named is all
    held_out: str | None = None           # a folder per concept: what fidelity is measured on; null: the references
    prompts: str | None = None            # file of prompts with {}; null: the data set's own
    max_concepts: int | None = None       # the first so many
    max_prompts: int | None = None        # so many, spread evenly
    seeds: int = 4                        # images per prompt
    first_seed: int = 1000
    runs: int = 1                         # fine-tuning runs per concept and method, pooled; seeds from trainer.seed on
    methods: dict[str, list[str]] = field(default_factory=dict)   # overrides of the training files, by name
    schemes: list[str] | None = None      # which methods make curves; null: all
    steps: list[int] = field(default_factory=lambda: [100, 200])  # fine-tuning steps: the points of a curve
    plain: bool = True                    # curves of the fine-tuned models
    strengths: list[float] = field(default_factory=list)          # curves with DCI at each lambda
    method: str = ""                      # claims about sampling: which method,
    step: int = 200                       # after how many steps,
    strength: float = 1.0                 # with which lambda where it is held fixed
    work_steps: int | None = None         # the raw model's sampling steps at equal work; null: the sampler's
    lambdas: list[float] = field(default_factory=list)            # of the sweep over lambda
    agg_times: list[float] = field(default_factory=list)          # of the sweep over T_a
    nouns: dict[str, str | None] = field(default_factory=dict)    # ways to choose auxiliary nouns: name, replace_noun
    gains: list[float] = field(default_factory=list)              # of the sweep over DBIM's spatial mask sum


@dataclass(frozen=True)
class Subject:
    """A concept as a sweep sees it: how it is trained, what is asked of it, what it is compared with."""

    name: str
    class_noun: str
    prompts: tuple[str, ...]
    references: Path
    files: tuple[str, ...] = ()
    entry: tuple[tuple[str, str], ...] = ()

    def training(self, config: SweepConfig, method: str, *overrides: str, run: int = 0) -> Any:
        """Merges the training configuration of a method's run number `run`."""
        extra = OmegaConf.create({"concepts": [literal(dict(self.entry))]}) if self.entry else None
        merged = merge(TrainConfig, [*config.model_files, *config.training_files, *self.files],
                       [*config.training, *config.methods[method], "preview.prompts=[]", *overrides], extra)
        return OmegaConf.merge(merged, {"trainer": {"seed": merged.trainer.seed + run}})


@dataclass(frozen=True)
class Job:
    """One point's images of one concept.

    Attributes:
        method, step: which fine-tuned model; BASE and 0 for none.
        strength: lambda, or None without DCI.
        settings: key=value overrides of the sampling configuration.
        words: text in the concept's place, drawn without any concept word; NOUN and AUXILIARY stand for the class noun
            and the preset auxiliary noun. None draws the concept.
        run: which of the concept's fine-tuning runs with this method.
    """

    concept: str
    method: str
    step: int
    strength: float | None = None
    settings: tuple[str, ...] = ()
    words: str | None = None
    run: int = 0

    @property
    def point(self) -> Job:
        """The same for all concepts and runs."""
        return replace(self, concept="", run=0)

    @property
    def run_key(self) -> tuple[str, str, int]:
        """What one fine-tuning run is for."""
        return self.concept, self.method, self.run

    def prompts(self, subject: Subject) -> list[str]:
        """Returns what is drawn for each of the subject's prompts."""
        if self.words is None:
            return list(subject.prompts)
        texts = []
        for prompt in subject.prompts:
            pieces = split_at_concept(prompt, "{}")
            if self.words == AUXILIARY:
                noun = auxiliary_noun(subject.class_noun, pieces, None)
            else:
                noun = self.words.replace(NOUN, subject.class_noun)
            texts.append("".join(join_pieces(pieces, noun)))
        return texts

    def said(self, subject: Subject) -> list[str]:
        """What each prompt's images should show: its text without concept words, or with what replaces these."""
        return [plain_text(prompt, subject.class_noun) for prompt in self.prompts(subject)]

    def sampling(self, config: SweepConfig) -> Any:
        """Merges the sampling configuration."""
        ways = ["dci.use=false"]
        if self.strength is not None:
            ways = ["dci.use=true", f"dci.agg_lambda=[{self.strength}]"]
        # A job's own overrides come last, and win.
        return merge(SampleConfig, [*config.model_files, *config.sampling_files],
                     [*config.sampling, *self.settings, *ways, "plain=false", f"n_samples={config.seeds}", "n_iter=1",
                      f"seed={config.first_seed}"])


def digest(content: Any) -> str:
    """Returns 10 hex digits that name JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]


def thin_out(items: Sequence[Any], count: int | None) -> tuple[Any, ...]:
    """Picks `count` items, evenly spread; all where there are no more."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[index * len(items) // count] for index in range(count))


def subjects(config: SweepConfig) -> list[Subject]:
    """Reads the concepts of a sweep.

    Raises:
        UserError: none is configured, or what a file says is missing.
    """
    shared = read_prompts(Path(config.prompts)) if config.prompts else None         # else the data set's own
    found = _from_dataset(config, shared) if config.dataset else _from_files(config, shared)
    if not found:
        raise UserError("the sweep has no concepts; list them under concept_files, or give a dataset.")
    return found[:config.max_concepts]


def _from_files(config: SweepConfig, prompts: tuple[str, ...] | None) -> list[Subject]:
    if prompts is None:
        raise UserError("the sweep has no prompts; give a file with prompts=FILE.")
    found = []
    for file in config.concept_files:
        concept = merge(TrainConfig, [file]).concepts[0]
        found.append(Subject(concept.name, concept.class_noun, thin_out(prompts, config.max_prompts),
                             _references(config, concept.name, Path(concept.images)), files=(str(file),)))
    return found


def _from_dataset(config: SweepConfig, prompts: tuple[str, ...] | None) -> list[Subject]:
    concepts = {concept.name: concept for concept in read_concepts(Path(config.dataset), prompts=prompts is None)}
    for name in config.dataset_concepts:
        if name not in concepts:
            raise UserError(f"data set '{config.dataset}' has no concept '{name}'; it has {', '.join(concepts)}.")
    found = []
    for name in config.dataset_concepts or concepts:
        concept = concepts[name]
        entry = {"name": name, "images": concept.images, "class_noun": concept.class_noun}
        if exists(concept.regularization):              # without, images of the class are made or fetched
            entry["regularization"] = concept.regularization
        found.append(Subject(name, concept.class_noun, thin_out(prompts or concept.prompts, config.max_prompts),
                             _references(config, name, Path(concept.images)), entry=tuple(entry.items())))
    return found


def _references(config: SweepConfig, name: str, images: Path) -> Path:
    """Returns the images fidelity is measured on: unseen ones where a folder of them is configured."""
    if not config.held_out:
        return images
    unseen = shipped(Path(config.held_out) / name)
    if not unseen.is_dir():
        raise UserError(f"held_out: there is no folder '{unseen}'; put unseen images of '{name}' there, or measure "
                        "fidelity on the references with held_out=null.")
    return unseen


def describe(job: Job) -> dict[str, Any]:
    """A job's fields for rows of results."""
    return {**asdict(job), "settings": list(job.settings)}


def training_of(config: SweepConfig, method: str) -> Any:
    """Merges what is the same for all concepts of a method's training configuration.

    Raises:
        UserError: the method is unknown or its overrides are wrong.
    """
    if method not in config.methods:
        raise UserError(f"method '{method}' is unknown; methods: {', '.join(config.methods)}.")
    files = [*config.model_files, *config.training_files]
    return merge(TrainConfig, files, [*config.training, *config.methods[method]])
