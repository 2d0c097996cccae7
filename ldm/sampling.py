"""One sampling run from configuration to files: pictures with their settings inside, sheets, mask panels."""
from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm.config import SampleConfig, save_config
from ldm.customization.delta import load_concept
from ldm.embedded import warn_of_words
from ldm.pictures import mask_panel, save_png, sheet
from ldm.pipeline import Generator, Row, Sample, build_model, check_settings, choose_device
from ldm.progress import progress
from ldm.util import UserError


@dataclass(frozen=True)
class Written:
    """What a run wrote."""

    folder: Path
    pictures: int
    sheets: list[Path]
    files: list[Path]


def load_generator(config: SampleConfig | DictConfig, concept_path: Path | None, words: tuple[str, ...] = (),
                   class_noun: str = "") -> Generator:
    """Builds the base and puts the concept in; cheap mistakes are refused first."""
    check_settings(config)
    if isinstance(config, DictConfig) and OmegaConf.is_missing(config, "model"):
        raise UserError("no model is configured; add configs/model/*.yaml with -b.")
    device = choose_device(config.device)
    concept = load_concept(concept_path, words, class_noun) if concept_path else None
    generator = Generator(*build_model(config.model, config.base), device, config.precision, config.compile)
    generator.load(concept)
    return generator


def file_name(number: int, sample: Sample, first_seed: int) -> str:
    """Names a picture: prompt number, picture number, the prompt's words, plain or lambda (in full past two places)."""
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]*>|[{}]", "", sample.row.prompt.lower())).strip("-")[:40]
    strength, way = sample.row.strength, "plain"
    if strength is not None:
        way = f"lambda{strength:+.2f}" if round(strength, 2) == strength else f"lambda{strength:+}"
    return f"{number:03d}-{sample.row.seed - first_seed:02d}-{words}-{way}.png"


def free_names(outdir: Path) -> tuple[int, str]:
    """Returns the first prompt number and the end of a sheet's name that earlier runs into a folder left free."""
    found = (re.match(r"(\d{3,})[-.]", path.name) for path in (outdir / "samples").glob("*.png"))
    number = max((int(match[1]) + 1 for match in found if match), default=0)
    tails = itertools.chain([""], (f"-{run:04d}" for run in itertools.count(1)))
    return number, next(tail for tail in tails if not ((outdir / f"grid{tail}.png").exists() or
                                                       (outdir / f"config{tail}.yaml").exists()))


def draw_run(generator: Generator, config: SampleConfig | DictConfig, prompts: Sequence[str], outdir: Path,
             concept_path: Path | None = None, grid: bool = True, masks: bool = False) -> Written:
    """Draws all prompts into `outdir`/samples and lays them out as sheets.

    Every picture is on disk before the next batch starts. Prompts may repeat; a repeated one is drawn once. Nothing in
    the folder is replaced: prompts are numbered on, and grid-0001.png and config-0001.yaml stand beside earlier ones.
    """
    prompts = list(dict.fromkeys(prompts))
    rows = generator.plan(prompts, config)
    warn_of_words(generator.identity, generator.texts(prompts))
    first, tail = free_names(outdir)
    if first:
        print(f"'{outdir}' holds pictures already; those of this run are numbered from {first:03d}", flush=True)
    number = {prompt: index for index, prompt in enumerate(prompts, first)}
    drawn: dict[Row, Image.Image] = {}
    files = []
    with progress(total=len(rows), desc="sampling", unit="picture") as bar:
        for sample in generator.generate(prompts, config, bar.update):
            name = file_name(number[sample.row.prompt], sample, config.seed)
            files.append(save_png(sample.image, outdir / "samples" / name, sample.settings))
            drawn[sample.row] = sample.image
    if isinstance(config, DictConfig):
        save_config(config, outdir / f"config{tail}.yaml")
    sheets = []
    if grid:
        page = comparison_sheet(generator, prompts, drawn, reference_picture(concept_path))
        sheets.append(save_png(page, outdir / f"grid{tail}.png"))
    if masks:
        sheets += draw_masks(generator, config, rows, outdir, number)
    return Written(outdir, len(drawn), sheets, files)


def reference_picture(concept_path: Path | None) -> list[Image.Image]:
    """Returns the reference pictures beside a run's concept file, as training saved them; none for other files."""
    folder = concept_path.parent.parent / "images" / "references" if concept_path else None
    if folder is None or not folder.is_dir():
        return []
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def comparison_sheet(generator: Generator, prompts: Sequence[str], drawn: dict[Row, Image.Image],
                     references: Sequence[Image.Image], title: str = "") -> Image.Image:
    """Lays pictures out as reference | fine-tuned | + DCI at each lambda, one row per prompt and seed."""
    strengths = list(dict.fromkeys(row.strength for row in drawn))
    base = "fine-tuned" if generator.concept else "base model"
    columns = (["reference"] if references else []) + [base if strength is None else f"+ DCI, lambda {strength:g}"
                                                       for strength in strengths]
    rows = []
    for index, prompt in enumerate(prompts):
        for seed in sorted({row.seed for row in drawn}):
            cells = [references[index % len(references)]] if references else []
            cells += [drawn[Row(prompt, seed, strength)] for strength in strengths]
            rows.append((f"{generator.texts([prompt])[0]}   (seed {seed})", cells))
    return sheet(columns, rows, title=title)


def draw_masks(generator: Generator, config: SampleConfig | DictConfig, rows: Sequence[Row], outdir: Path,
               number: Mapping[str, int]) -> list[Path]:
    """Draws DBIM's masks of the first DCI picture of each prompt, named by the prompt's number."""
    first = {row.prompt: row for row in reversed(rows) if row.strength is not None}
    if not first:
        raise UserError("there are no masks to draw: no picture uses DCI; set dci.use to true.")
    paths = []
    for prompt, index in number.items():
        row = first[prompt]
        title = f"{generator.texts([prompt])[0]} (seed {row.seed}, lambda {row.strength:g})"
        panel = mask_panel(*generator.masks(row, config), title)
        paths.append(save_png(panel, outdir / "masks" / f"{index:03d}.png"))
    return paths
