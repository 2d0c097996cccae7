"""Where each concept's class images come from: a folder, the base model itself, or nowhere."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm.config import ConceptConfig, DCIConfig, RegularizationConfig, SampleConfig
from ldm.data.batches import CaptionedImages
from ldm.data.folder_lock import turn_in
from ldm.data.framing import Framing, join_masks, load_framed
from ldm.data.images import why_unusable
from ldm.data.regularization import (
    IMAGES,
    RegularizationSet,
    class_caption,
    holds,
    read_regularization,
    save_jpeg,
    write_lists,
)
from ldm.files import set_aside, write_text
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.pipeline import Generator
from ldm.progress import progress
from ldm.util import UserError, folder_name
from ldm.words import NEW_WORD

NOUN = "{}"       # stands for the class noun in data.reg.prompt


def chosen_mode(settings: RegularizationConfig, concept: ConceptConfig) -> str:
    """Returns the mode of one concept: the configured one, else its folder where it names one, else none."""
    if settings.mode:
        return settings.mode
    return "none" if concept.regularization is None else "folder"


def make_class_images(settings: RegularizationConfig, concepts: Sequence[ConceptConfig], model: LatentDiffusion,
                      identity: dict[str, str], side: int, device: torch.device) -> None:
    """Draws (on `device`, with `side` px) every concept's class images where that is configured.

    Raises:
        UserError: what the base model draws cannot be written.
    """
    for concept in concepts:
        if chosen_mode(settings, concept) == "generate":
            generate_class_images(Generator(model, identity, device), concept.class_noun, settings, side)


def load_class_images(settings: RegularizationConfig, concepts: Sequence[ConceptConfig], identity: dict[str, str],
                      framing: Framing) -> CaptionedImages | None:
    """Reads every concept's class images, saying for each how many there are and from where; None without any.

    Raises:
        UserError: a folder is wrong.
    """
    images, captions, masks, groups = [], [], [], []
    for index, concept in enumerate(concepts):
        found = class_images_of(concept, settings, identity, framing.size)
        if found is None:
            print(f"{concept.name}: no regularization images, so the class may be forgotten (see real_reg/README.md)")
            continue
        print(f"{concept.name}: {found.source}")
        for item in found.skipped:
            print(f"{concept.name}: skipped regularization image {item}")
        pixels, own = load_framed(found.paths, framing)     # (N, S, S, 3) and (N, S, S) or None
        images.append(pixels)
        masks.append(own)
        captions += [without_tags(caption, concept.class_noun) for caption in found.captions]
        groups += [index] * len(found.paths)     # a class image stands beside its own concept's references
    if not images:
        return None
    return CaptionedImages(torch.cat(images), captions, join_masks(images, masks), groups)


def without_tags(caption: str, class_noun: str) -> str:
    """Returns a class image's caption without <tags>, as web pages leave them: they would be read as new words."""
    return " ".join(NEW_WORD.sub(" ", caption).split()) or class_caption(class_noun)


def class_images_of(concept: ConceptConfig, settings: RegularizationConfig, identity: dict[str, str],
                    side: int) -> RegularizationSet | None:
    """Returns one concept's class images, which are there; None without any."""
    mode = chosen_mode(settings, concept)
    if mode == "none":
        return None
    if mode == "folder":
        if concept.regularization is None:
            raise UserError(f"data.reg.mode is folder but concept '{concept.name}' names none; give --reg_datapath, or "
                            "another mode.")
        return read_regularization(Path(concept.regularization), concept.class_noun, concept.regularization_caption)
    folder = generated_folder(identity, concept.class_noun, settings, side)
    if not (folder / IMAGES).exists():     # the lists come last: a set without them is not finished
        return None
    return _first(read_regularization(folder, concept.class_noun), settings.num)


def _first(found: RegularizationSet, count: int) -> RegularizationSet:
    """Keeps the first images of a generated set, which may hold more than are asked for."""
    return replace(found, paths=found.paths[:count], captions=found.captions[:count],
                   source=f"regularization (generate): {min(count, len(found.paths))} of {len(found.paths)} image(s),"
                          f" {found.source.partition('image(s) ')[2]}")


def class_prompt(settings: RegularizationConfig, class_noun: str) -> str:
    """Returns the prompt for the base model."""
    if settings.prompt is None:
        return class_caption(class_noun).removeprefix("a ")       # "photo of a cat", Custom Diffusion's
    return settings.prompt.replace(NOUN, class_noun)


def generated_folder(identity: dict[str, str], class_noun: str, settings: RegularizationConfig, side: int) -> Path:
    """Names the folder of drawn class images after all that decides them: base, prompt, steps, seed and the rest."""
    # Whatever decides an image.
    facts = [identity["hash"], class_prompt(settings, class_noun), settings.steps, settings.scale, settings.eta,
             settings.seed, side]
    # Another prompt or base makes another set, beside it.
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:10]
    return Path(settings.root) / "generated" / f"samples_{folder_name(class_noun)}-{key}"


def generate_class_images(generator: Generator, class_noun: str, settings: RegularizationConfig, side: int) -> Path:
    """Draws `settings.num` class images in the real_reg format with a base model, or those that are still missing.

    Image i has the seed `settings.seed` + i, so a run that was stopped or asked for fewer is topped up, and what is
    damaged is set aside and drawn again. A second process that wants the same set waits.

    Raises:
        UserError: a setting is out of range, or the disk refuses.
    """
    folder = generated_folder(generator.identity, class_noun, settings, side)
    with turn_in(folder):     # two runs of the same class would draw the same set
        images = folder / folder_name(class_noun)
        good = _drawn(images, settings.num)     # an earlier run's, which may have been stopped
        missing = [number for number in range(settings.num) if number not in good]
        if missing:
            _sample_missing(generator, class_prompt(settings, class_noun), settings, side, images, missing)
        _list_drawn(folder, images.name, sorted({*good, *missing}), generator, class_prompt(settings, class_noun),
                    settings, side)
    return folder


def _drawn(images: Path, wanted: int) -> list[int]:
    """Returns the numbers of the images that are there; sets those aside that are damaged and still wanted."""
    good = []
    for path in sorted(images.glob("[0-9]*.jpg")):
        if not path.stem.isdecimal():
            continue
        problem = why_unusable(path)
        if problem is None:
            good.append(int(path.stem))
        elif int(path.stem) < wanted:
            set_aside(path, problem)
    return good


def _sample_missing(generator: Generator, prompt: str, settings: RegularizationConfig, side: int, images: Path,
                    numbers: Sequence[int]) -> None:
    """Draws the images of some numbers, in ascending order, a run of consecutive ones at a time."""
    with progress(total=settings.num, initial=settings.num - len(numbers), desc=f"drawing '{prompt}'",
                  unit="image") as bar:
        for run in _runs(numbers):
            sampling = SampleConfig(model=None, dci=DCIConfig(use=False), steps=settings.steps, eta=settings.eta,
                                    scale=settings.scale, height=side, width=side, n_samples=len(run),
                                    batch_size=settings.batch_size, seed=settings.seed + run[0])
            for number, sample in zip(run, generator.generate([prompt], sampling, bar.update), strict=True):
                save_jpeg(sample.image, images / f"{number:05d}.jpg")


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Divides ascending numbers into runs of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if not runs or number != runs[-1][-1] + 1:
            runs.append([])     # a gap: other seeds
        runs[-1].append(number)
    return runs


def _list_drawn(folder: Path, name: str, numbers: Sequence[int], generator: Generator, prompt: str,
                settings: RegularizationConfig, side: int) -> None:
    """Writes the lists of a drawn set, and by what it was drawn, where they are not there as they should be."""
    write_lists(folder, [(f"{name}/{number:05d}.jpg", prompt,
                          f"generated:{generator.identity['hash']}:{settings.seed + number}") for number in numbers])
    facts = {"base": generator.identity, "prompt": prompt, "side": side,
             **{name: getattr(settings, name) for name in ("steps", "scale", "eta", "seed")}}
    text = json.dumps(facts, indent=1) + "\n"
    if not holds(folder / "generated.json", text):
        write_text(folder / "generated.json", text)
