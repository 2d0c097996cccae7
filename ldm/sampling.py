"""One sampling run from configuration to files: images with their settings inside, sheets, mask panels."""
from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.base import build_model, empty_model
from ldm.choice import Chooser, load_chooser
from ldm.comparison import comparison_sheet
from ldm.config import SampleConfig, typed
from ldm.config_files import save_config
from ldm.customization.delta import Concept, load_concepts
from ldm.customization.merge import with_own_words
from ldm.customization.tokens import AUTO
from ldm.data.captions import captioned
from ldm.data.images import Unusable, decode, open_image
from ldm.device import FORMATS, choose_device, supported_precision
from ldm.embedded import warn_of_words
from ldm.files import NameTaken
from ldm.pipeline import Generator, Sample
from ldm.progress import progress
from ldm.requests import ImageRequest
from ldm.sheets import mask_panel, save_png
from ldm.util import UserError

HEAD_LENGTH = 200      # letters of a configuration file that are read for the numbers it claims


@dataclass(frozen=True)
class Written:
    """What a run wrote."""

    folder: Path
    images: int
    sheets: list[Path]
    files: list[Path]


def rehearse(config: SampleConfig | DictConfig, concepts: Sequence[Concept], prompts: Sequence[str],
             masks: bool = False) -> Generator:
    """Plans a run without the base's weights, and returns a generator that can tell of it but cannot draw.

    Raises:
        UserError: what `Generator.requests` refuses; a concept that does not fit the model; no image has masks.
    """
    # On the meta device: no weights, no memory.
    identity = dict(concepts[0].base) if concepts else {}
    generator = Generator(empty_model(config.model), identity, "meta", any_base=config.base.any_base)
    generator.load(*concepts)
    requests = generator.requests(prompts, config)
    if masks:
        watched_requests(requests)
    return generator


def check_run(config: SampleConfig | DictConfig) -> None:
    """Refuses settings out of range, and a run without a model."""
    typed(config)
    if isinstance(config, DictConfig) and OmegaConf.is_missing(config, "model"):
        raise UserError("no model is configured; add configs/model/*.yaml with -b.")


def load_generator(config: SampleConfig | DictConfig, files: Sequence[Path] = (), words: tuple[str, ...] = (),
                   class_noun: str | Sequence[str] = "", prompts: Sequence[str] = (),
                   masks: bool = False) -> Generator:
    """Builds the base and puts concept files in; mistakes are refused first, those in `prompts` too if they are given.

    `words` and `class_noun` are what foreign files do not say (`load_concepts`).
    """
    check_run(config)     # in the order of what it costs to find out
    device = choose_device(config.device)
    concepts = load_concepts(files, words, class_noun)
    if len(concepts) > 1:       # words that two files share are renamed
        for file, concept in zip(files, with_own_words(concepts), strict=True):
            for scheme in concept.schemes:
                print(f"'{file}' in prompts: {scheme.concept}", flush=True)
    if prompts:     # mistakes in them come to light before 4 GB are read
        rehearse(config, concepts, prompts, masks)
    precision = supported_precision(config.precision, device)     # weights are cast as they are read, not after
    model, identity = build_model(config.model, config.base, FORMATS.get(precision, torch.float32))
    generator = Generator(model, identity, device, precision, config.compile, config.base.any_base)
    generator.load(*concepts, padding=config.padding)
    return generator


def chooser_for(config: SampleConfig | DictConfig, files: Sequence[Path]) -> Chooser | None:
    """Returns what chooses lambda, where the configuration asks for that.

    Raises:
        UserError: there are no references to stay like, or no CLIP for this base.
    """
    config = typed(config)
    choice = config.dci.choice
    if not (choice.use and config.dci.use and files):
        return None
    if choice.metric == "small_clip" and config.base.ckpt:
        raise UserError("lambda is chosen by a CLIP, and the one that ships knows the embedded model's world only; "
                        "give another with dci.choice.metric=clip_b32 dci.choice.weights=FILE.")
    if choice.metric != "small_clip" and not choice.weights:
        raise UserError(f"the weights of '{choice.metric}', which is to choose lambda, are not given; name their file "
                        "with dci.choice.weights=FILE.")
    references = reference_images(files)
    if choice.references:
        references = [open_image(path) for path in captioned(Path(choice.references), captions=False).paths]
    if not references:
        raise UserError(f"lambda is chosen by likeness to the concept's photos, and there are none beside "
                        f"'{files[0]}'; name their folder with dci.choice.references=FOLDER.")
    return load_chooser(choice, references, choose_device(config.device))


def token_table(config: SampleConfig | DictConfig, files: Sequence[Path], words: tuple[str, ...],
                class_noun: str | Sequence[str], prompts: Sequence[str]) -> str:
    """Returns the tokens of both branches' prompts; weights are read only where they choose the auxiliary noun."""
    if config.dci.replace_noun == AUTO:
        return load_generator(config, files, words, class_noun, prompts).prompts.describe(prompts, config.dci)
    check_run(config)
    concepts = load_concepts(files, words, class_noun)
    return rehearse(config, concepts, prompts).prompts.describe(prompts, config.dci)


def file_name(number: int, sample: Sample, first_seed: int) -> str:
    """Names an image: prompt number, image number, the prompt's words, plain or lambda (in full past two places)."""
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]*>|[{}]", "", sample.request.prompt.lower())).strip("-")[:40]
    strength, way = sample.request.strength, "plain"
    if strength is not None:
        way = f"lambda{strength:+.2f}" if round(strength, 2) == strength else f"lambda{strength:+}"
    if sample.settings.get("dci", {}).get("preview"):
        way += "-preview"
    return f"{number:03d}-{sample.request.seed - first_seed:02d}-{words}-{way}.png"


def claim_names(outdir: Path, config: SampleConfig | DictConfig, count: int) -> tuple[int, str]:
    """Takes the next `count` prompt numbers of a folder and the end of a sheet's name, for this run alone.

    The run's config.yaml is its claim. It is written first, as a new file whose head names the numbers, so that of
    several runs that start at once each sees those before it.

    Returns:
        The first number, and "" or "-0001" or so.

    Raises:
        UserError: the folder cannot be written.
    """
    while True:
        tail = free_tail(outdir)
        first = first_free_number(outdir)
        head = f"# The images of this run are numbered {first:03d} to {first + count - 1:03d}.\n"
        try:
            save_config(config, outdir / f"config{tail}.yaml", head, new=True)
        except NameTaken:     # another run was quicker; look again
            continue
        return first, tail


def free_tail(outdir: Path) -> str:
    """Returns the first end of a sheet's name that no run into a folder has."""
    tail, numbers = "", itertools.count(1)
    while (outdir / f"grid{tail}.png").exists() or (outdir / f"config{tail}.yaml").exists():
        tail = f"-{next(numbers):04d}"
    return tail


def first_free_number(outdir: Path) -> int:
    """Returns the first prompt number that no image in a folder has and no run into it has claimed."""
    taken = [-1]
    for path in (outdir / "samples").glob("*.png"):
        if match := re.match(r"(\d{3,})[-.]", path.name):
            taken.append(int(match[1]))
    for path in outdir.glob("config*.yaml"):
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.readline(HEAD_LENGTH)     # the claim is the first line
        if match := re.match(r"# The (?:images|pictures) of this run are numbered \d+ to (\d+)", head):
            taken.append(int(match[1]))
    return max(taken) + 1


def sample_run(generator: Generator, config: SampleConfig | DictConfig, prompts: Sequence[str], outdir: Path,
               concept_files: Sequence[Path] = (), grid: bool = True, masks: bool = False,
               chooser: Chooser | None = None) -> Written:
    """Draws all prompts into `outdir`/samples and lays them out as sheets; `chooser` keeps one strength of each.

    Every image is on disk before the next batch starts. Prompts may repeat; a repeated one is drawn once. Nothing in
    the folder is replaced, whoever else draws into it: prompts are numbered on, and grid-0001.png and config-0001.yaml
    stand beside earlier ones.
    """
    prompts = list(dict.fromkeys(prompts))
    requests = generator.requests(prompts, config)
    warn_of_words(generator.identity, generator.prompts.texts(prompts))     # the embedded model knows few
    watched: list[ImageRequest] = []
    if masks:
        watched = watched_requests(requests, chooser is not None)
    references = reference_images(concept_files) if grid else []     # only shown, never measured
    first, tail = claim_names(outdir, config, len(prompts))     # from here on the folder has a place for this run
    if first:
        print(f"'{outdir}' holds images already; those of this run are numbered from {first:03d}", flush=True)
    number = {prompt: index for index, prompt in enumerate(prompts, first)}
    print_auxiliary(generator, config, requests)     # a noun that was chosen should not be a secret
    drawn: dict[ImageRequest, Image.Image] = {}
    files, panels = [], []
    with progress(total=len(requests), desc="sampling", unit="image") as bar:
        samples = generator.generate(prompts, config, bar.update, watched)
        if chooser:
            samples = chooser.keep(samples, len(config.dci.agg_lambda), config.plain)
        for sample in samples:
            prompt_number = number[sample.request.prompt]
            name = file_name(prompt_number, sample, config.seed)
            files.append(save_png(sample.image, outdir / "samples" / name, sample.settings))
            drawn[sample.request] = sample.image     # for the sheet
            if sample.request in watched:
                panels.append(save_masks(generator, sample, outdir / "masks" / f"{prompt_number:03d}.png"))
    sheets = []
    if grid:
        dual = any(request.strength is not None for request in requests)
        captions = generator.prompts.captions(prompts, config.dci if dual else None)
        plain = "fine-tuned" if generator.concept else "base model"
        title = "What is predicted where the joint phase ends" if config.dci.preview else ""
        page = comparison_sheet(captions, plain, drawn, references, title, chosen=chooser is not None)
        sheets.append(save_png(page, outdir / f"grid{tail}.png"))
    return Written(outdir, len(drawn), sheets + panels, files)


def watched_requests(requests: Sequence[ImageRequest], all_strengths: bool = False) -> list[ImageRequest]:
    """Returns the first DCI image of each prompt, whose masks are drawn; or all strengths of its seed.

    Raises:
        UserError: no image uses DCI.
    """
    first: dict[str, ImageRequest] = {}
    watched = []
    for request in requests:
        if request.strength is None:
            continue
        shown = first.setdefault(request.prompt, request)
        if request == shown or (all_strengths and request.seed == shown.seed):
            watched.append(request)
    if not watched:
        raise UserError("there are no masks to draw: no image uses DCI; set dci.use to true.")
    return watched


def print_auxiliary(generator: Generator, config: SampleConfig | DictConfig, requests: Sequence[ImageRequest]) -> None:
    """Says which noun stands for the concept in the second branch, and in how many prompts where they differ."""
    prompts = set()
    for request in requests:
        if request.strength is not None:
            prompts.add(request.prompt)
    nouns: Counter[str] = Counter()
    for request in requests:
        if request.prompt in prompts:
            prompts.remove(request.prompt)         # once each, in the prompts' order
            nouns[generator.prompts.auxiliary_noun(request.prompt, config.dci) or ""] += 1
    del nouns[""]
    told = []
    for noun, count in nouns.most_common():
        told.append(noun if count == nouns.total() else f"{noun} ({count} of {nouns.total()} prompts)")
    if told:
        print(f"auxiliary noun: {', '.join(told)}", flush=True)


def reference_images(files: Sequence[Path]) -> list[Image.Image]:
    """Returns the reference images beside runs' concept files, of each in turn; none for other files."""
    sets = []
    for file in files:
        sets.append(_references_of(file))
    return [image for images in itertools.zip_longest(*sets) for image in images if image is not None]


def _references_of(file: Path) -> list[Image.Image]:
    """Returns the reference images beside a run's concept file, as training saved them.

    They only stand beside what is drawn, so one that cannot be read is named and left out.
    """
    # logs/<run>/checkpoints/step-*.safetensors.
    folder = file.parent.parent / "images" / "references"
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.glob("*.png")):
        try:
            found.append(decode(path).image)
        except Unusable as problem:
            print(f"warning: reference image '{path}' {problem}; the sheet goes without it", flush=True)
    return found


def save_masks(generator: Generator, sample: Sample, path: Path) -> Path:
    """Draws DBIM's masks of an image that was watched."""
    request = sample.request
    title = f"{generator.prompts.texts([request.prompt])[0]} (seed {request.seed}, lambda {request.strength:g})"
    return save_png(mask_panel(sample.image, sample.masks, title), path)
