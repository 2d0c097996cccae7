"""Prepares a fine-tuning run: reads its images, builds its model and refuses what cannot work, writing nothing."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from ldm.base import build_model, image_side
from ldm.config import TrainConfig, typed
from ldm.customization.finetune import ConceptFinetune
from ldm.customization.ico import make_scheme
from ldm.data.batches import CaptionedImages
from ldm.data.framing import Framing
from ldm.data.images import check_color
from ldm.device import choose_device
from ldm.embedded import warn_of_photos
from ldm.training.memory import check_memory
from ldm.training.references import caption_templates, framing_of, load_references, read_references
from ldm.training.resume import Resumed, RunIdentity, identify, name_images, resume_state
from ldm.training.run_folder import shareable, versions
from ldm.training.trainer import DEVICES, check_logger
from ldm.util import UserError


@dataclass(frozen=True, eq=False)
class Setup:
    """A run that is ready to begin.

    Attributes:
        config: all its settings.
        device: where it computes.
        module: what is trained, around its base.
        references: the reference images of all concepts, `counts` of each.
        framing: how images become squares.
        identity: what the run is about; class images are not known yet.
        resumed: the run it continues; None is a new one.
        insist: continues although something is not what it was.
    """

    config: TrainConfig
    device: torch.device
    module: ConceptFinetune
    references: CaptionedImages
    counts: list[int]
    framing: Framing
    identity: RunIdentity
    resumed: Resumed | None
    insist: bool

    def check(self, now: RunIdentity) -> None:
        """Refuses to continue a run that was about something else."""
        if self.resumed:
            self.resumed.check(now, self.insist)


def prepare(config: TrainConfig | DictConfig, resume: Path | None = None, insist: bool = False) -> Setup:
    """Makes a run ready, writing nothing.

    Args:
        resume: the folder of the run to continue.
        insist: continue it although base, concepts or images are not what they were.

    Raises:
        UserError: images, checkpoint, settings or machine do not allow the run.
    """
    config = typed(config)
    device = choose_device(DEVICES[config.trainer.accelerator])
    check_logger(config.trainer.logger)
    check_color(config.data.background)
    resumed = resume_state(resume) if resume else None
    if resumed and resumed.step >= config.method.steps:
        raise UserError(f"the run in '{resume}' is at step {resumed.step} already; method.steps is "
                        f"{config.method.steps}.")
    # Before the model: a wrong folder should cost no time.
    found = read_references(config.concepts, config.data.captions)
    pl.seed_everything(config.trainer.seed, verbose=False)
    print(f"loading {config.base.ckpt or 'the embedded model'}", flush=True)
    model, base = build_model(config.model, config.base)
    size = image_side(model, "trainer.image_size", config.trainer.image_size)
    warn_of_photos(base, (path for references in found for path in references.paths), size)
    schemes = []
    for index, (concept, words) in enumerate(zip(config.concepts, concept_words(config), strict=True)):
        schemes.append(make_scheme(model.cond_stage_model, config.method, concept.class_noun, words, index))
    identity = identify(base, schemes)     # what a resumed run must be about, too
    if resumed:
        resumed.check(identity, insist)
    # One per image, in place of the method's.
    templates = caption_templates(found, schemes) if config.data.captions else ()
    counts = [len(references.paths) for references in found]
    info = {"config": shareable(config), "versions": versions()}
    module = ConceptFinetune(model, config.method, schemes, counts, base, effective_learning_rate(config),
                             config.trainer.seed, info, templates)
    if device.type == "cuda":     # a CPU's memory is not what runs out first
        check_memory(config, model, module.trained_tensors(), size)
    framing = framing_of(config.data, size)
    references = load_references(found, module.captions, framing)     # as the network sees them, (N, S, S, 3)
    photos = name_images(references)     # by their pixels
    if resumed:
        resumed.check(RunIdentity(photos=photos), insist)
    return Setup(config, device, module, references, counts, framing, replace(identity, photos=photos), resumed, insist)


def effective_learning_rate(config: TrainConfig) -> float:
    """Returns the rate of K/V and concept words; scaled by the global batch only where asked for."""
    method, trainer = config.method, config.trainer
    if not method.scale_lr:
        return method.learning_rate
    rows = trainer.devices * trainer.num_nodes * 2 * method.batch_size * method.accumulate     # as the release counts
    return method.learning_rate * rows


def concept_words(config: TrainConfig) -> list[list[str]]:
    """Returns every concept's words "V": its own, else the method's; a further concept's are numbered on."""
    taken = set(config.method.words)
    for concept in config.concepts:
        taken.update(concept.words or ())     # words that other concepts claim by name
    words = []
    for index, concept in enumerate(config.concepts):
        if concept.words or index == 0:
            words.append(list(concept.words or config.method.words))
        else:
            words.append(_new_words(len(config.method.words), taken))
    return words


def _new_words(count: int, taken: set[str]) -> list[str]:
    """Returns the first words <new1>, <new2>, ... that nobody has taken, and takes them."""
    words: list[str] = []
    number = 1
    while len(words) < count:
        word = f"<new{number}>"
        if word not in taken:
            words.append(word)
            taken.add(word)
        number += 1
    return words

