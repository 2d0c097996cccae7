"""One evaluation: a folder of images, or images drawn for it, to rows, tables and a sheet."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.captions import captioned
from ldm.data.images import open_image
from ldm.evaluation.image_sets import Found
from ldm.evaluation.metrics import SCALES
from ldm.evaluation.report import (
    SUMMARY,
    as_numbers,
    claim_results_folder,
    meaning,
    place,
    summarize,
    table,
    way,
    write_json,
    write_rows,
)
from ldm.evaluation.scoring import Scorer
from ldm.files import write_text
from ldm.sheets import save_png, sheet
from ldm.util import UserError

SHEET_ROWS = 16
TABLE, SHEET = "table.md", "sheet.png"
PASSED_ON = ("seed", "strength", "steps", "sampler", "scale", "text", "auxiliary_text")    # of an image's settings


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found and where it lies."""

    rows: list[dict[str, Any]]
    table: str
    notes: list[str]
    folder: Path


def open_references(source: Path) -> list[Image.Image]:
    """Opens the usable images of any layout that training reads."""
    return [open_image(path) for path in captioned(source, captions=False).paths]


def class_noun_of(found: Sequence[Found], wanted: str) -> str:
    """Returns the class noun: the wanted one, or what the images themselves say.

    Raises:
        UserError: the images contradict each other, or a prompt has {} and nobody says what it stands for.
    """
    nouns = {item.settings.get("concept", {}).get("class_noun", "") for item in found} - {""}
    if len(nouns) > 1 and not wanted:
        raise UserError(f"the images contradict each other about the class noun ({', '.join(sorted(nouns))}); give "
                        "the right one with --class_noun.")
    noun = wanted or "".join(nouns)
    if not noun and any(item.prompt and "{}" in item.prompt for item in found):
        raise UserError("the prompts have {} and the images do not say which class noun that is; give it with "
                        "--class_noun.")
    return noun


def names_of(found: Sequence[Found]) -> list[str]:
    """Returns file names, with their folders where the same name occurs in several."""
    names = [item.path.name for item in found]
    return names if len(set(names)) == len(names) else [f"{item.path.parent.name}/{item.path.name}" for item in found]


def claim(outdir: Path) -> None:
    """Notes what an evaluation writes into `outdir`.

    Raises:
        UserError: a file of such a name is there and was not made here.
    """
    claim_results_folder(outdir, TABLE, SHEET)


def evaluate(found: Sequence[Found], scorer: Scorer, outdir: Path, references: Path | None = None,
             class_noun: str = "", real: Path | None = None, concept: str | None = None) -> Evaluation:
    """Measures images and writes rows.jsonl, rows.csv, summary.json, table.md and sheet.png into `outdir`.

    Args:
        references: the concept's images, for fidelity.
        real: images that KID compares with; None is `references`.
        concept: its name, for the rows.

    Raises:
        UserError: images cannot be read, two of them contradict each other about the class noun, or `outdir` holds
            files of these names that were not made here.
    """
    noun = class_noun_of(found, class_noun)
    images = [open_image(item.path) for item in found]
    known = open_references(references) if references else []
    compared = open_references(real) if real else known
    claim(outdir)
    features, references_seen = scorer.features(images), scorer.features(known) if known else None
    measured = scorer.rows(images, [item.prompt for item in found], noun, references_seen, features)
    compared_seen = scorer.features(compared) if real else references_seen
    rows = [{"picture": name, "concept": concept, "class_noun": noun or None, "prompt": item.prompt,
             **{name: item.settings[name] for name in PASSED_ON if name in item.settings}, **values}
            for name, item, values in zip(names_of(found), found, measured, strict=True)]
    notes = [f"skipped {reason}" for reason in scorer.skipped]
    notes += ["skipped image alignment: there are no references; give them with --references"] * (not known)
    notes += ["skipped text alignment: the images do not say their prompts; give them with --prompts"] * (
        not any(item.prompt for item in found))
    ways, groups, sets, no_kid = [way(item.settings) for item in found], {}, {}, {}
    places = {name: place(item.settings) for name, item in zip(ways, found, strict=True)}
    for name in sorted(places, key=places.get):
        drawn = [index for index, other in enumerate(ways) if other == name]
        groups[name] = [rows[index] for index in drawn]
        sets[name] = scorer.of_set({key: values[drawn] for key, values in features.items()}, compared_seen)
        no_kid.setdefault(scorer.why_no_kid(len(drawn), len(compared)), []).append(name)
    notes += [f"skipped {reason} ({'; '.join(names)})" for reason, names in no_kid.items() if reason]
    shown = dict(zip(names_of(found), images, strict=True))
    return _write_results(Evaluation(rows, "", notes, outdir), groups, sets, _sheet(groups, shown, known), scorer)


def _write_results(result: Evaluation, groups: Mapping[str, list], sets: Mapping[str, Mapping[str, Any]],
           page: Image.Image, scorer: Scorer) -> Evaluation:
    """Puts an evaluation on disk."""
    estimates = {name: summarize(rows, list(scorer.titles)) for name, rows in groups.items()}
    heading = f"mean [95 % interval], {len(result.rows)} images"
    short, full = (table(estimates, scorer.titles, heading, scales) for scales in (("cosine",), tuple(SCALES)))
    of_sets = [f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items() if value is not None)
               for name, values in sets.items() if any(value is not None for value in values.values())]
    write_rows(result.rows, result.folder)
    write_json(result.folder / SUMMARY, {"metrics": as_numbers(estimates), "sets": sets,
                                        "measured_by": scorer.record, "notes": result.notes})
    explained = [meaning(scorer.titles), *of_sets]
    write_text(result.folder / TABLE, "\n\n".join([full, *explained, *result.notes]) + "\n")
    save_png(page, result.folder / SHEET)
    return Evaluation(result.rows, "\n\n".join([short, *explained]), result.notes, result.folder)


def _sheet(groups: Mapping[str, list], images: Mapping[str, Image.Image],
           known: Sequence[Image.Image]) -> Image.Image:
    """Lays the images out: a row per prompt and seed, a column per way, a reference in front."""
    places: dict[tuple[object, object], dict[str, Image.Image]] = {}
    for name, rows in groups.items():
        for index, row in enumerate(rows):
            place = (row["prompt"] or row["picture"], row.get("seed", index))
            if place in places or len(places) < SHEET_ROWS:
                places.setdefault(place, {})[name] = images[row["picture"]]
    lines = []
    for index, ((prompt, seed), cells) in enumerate(places.items()):
        reference = [known[index % len(known)]] if known else []
        lines.append((f"{prompt} ({seed})", [*reference, *(cells.get(name) for name in groups)]))
    return sheet([*(["reference"] if known else []), *groups], lines)
