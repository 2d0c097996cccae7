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
    column_place,
    meaning,
    sampling_label,
    summarize,
    table,
    write_json,
    write_rows,
)
from ldm.evaluation.scoring import Scorer
from ldm.files import write_text
from ldm.sheets import save_png, sheet
from ldm.util import UserError

SHEET_ROWS = 16     # prompts and seeds on the sheet
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
    nouns: set[str] = set()
    for item in found:
        nouns.add(item.settings.get("concept", {}).get("class_noun", ""))
    nouns.discard("")     # images of the base model say none
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
    if len(set(names)) < len(names):
        names = [f"{item.path.parent.name}/{item.path.name}" for item in found]
    return names


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
    # What the concept is; without references there is no fidelity.
    known = open_references(references) if references else []
    compared = open_references(real) if real else known
    claim(outdir)     # before hours of measuring, not after
    features = scorer.features(images)     # by extractor, (N, D) each
    references_seen = scorer.features(known) if known else None     # by extractor, (M, D) each
    compared_seen = scorer.features(compared) if real else references_seen
    measured = scorer.rows(images, [item.prompt for item in found], noun, references_seen, features)
    rows = []
    for name, item, values in zip(names_of(found), found, measured, strict=True):
        # So that a row can be sampled again.
        passed_on = {key: item.settings[key] for key in PASSED_ON if key in item.settings}
        rows.append({"picture": name, "concept": concept, "class_noun": noun or None, "prompt": item.prompt,
                     **passed_on, **values})
    notes = []
    for reason in scorer.skipped:
        notes.append(f"skipped {reason}")
    if not known:
        notes.append("skipped image alignment: there are no references; give them with --references")
    if not any(item.prompt for item in found):
        notes.append("skipped text alignment: the images do not say their prompts; give them with --prompts")
    groups: dict[str, list[dict[str, Any]]] = {}
    sets: dict[str, dict[str, Any]] = {}
    no_kid: dict[str, list[str]] = {}
    for name, indices in _by_way(found).items():
        groups[name] = [rows[index] for index in indices]
        of_group = {key: values[indices] for key, values in features.items()}     # (G, D) each
        sets[name] = scorer.of_set(of_group, compared_seen)
        reason = scorer.why_no_kid(len(indices), len(compared))
        if reason:
            no_kid.setdefault(reason, []).append(name)
    for reason, names in no_kid.items():
        notes.append(f"skipped {reason} ({'; '.join(names)})")
    shown = dict(zip(names_of(found), images, strict=True))     # images by the name their rows have
    return _write_results(Evaluation(rows, "", notes, outdir), groups, sets, _sheet(groups, shown, known), scorer)


def _by_way(found: Sequence[Found]) -> dict[str, list[int]]:
    """Returns the indices of the images by how they were sampled, in the order of a table's columns."""
    groups: dict[str, list[int]] = {}
    places: dict[str, tuple[bool, float, bool]] = {}
    for index, item in enumerate(found):
        name = sampling_label(item.settings)
        groups.setdefault(name, []).append(index)
        places[name] = column_place(item.settings)
    return {name: groups[name] for name in sorted(groups, key=places.get)}


def _write_results(result: Evaluation, groups: Mapping[str, list], sets: Mapping[str, Mapping[str, Any]],
           page: Image.Image, scorer: Scorer) -> Evaluation:
    """Puts an evaluation on disk."""
    estimates = {}
    for name, rows in groups.items():
        estimates[name] = summarize(rows, list(scorer.titles))
    heading = f"mean [95 % interval], {len(result.rows)} images"
    short = table(estimates, scorer.titles, heading, ("cosine",))
    full = table(estimates, scorer.titles, heading, tuple(SCALES))
    of_sets = []
    for name, values in sets.items():
        numbers = [f"{key} {value:.4f}" for key, value in values.items() if value is not None]
        if numbers:
            of_sets.append(f"{name}: {', '.join(numbers)}")
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
            # A page that can be looked at; every row is in the table.
            if place in places or len(places) < SHEET_ROWS:
                places.setdefault(place, {})[name] = images[row["picture"]]
    lines = []
    for index, ((prompt, seed), cells) in enumerate(places.items()):
        row = [cells.get(name) for name in groups]
        if known:
            row.insert(0, known[index % len(known)])
        lines.append((f"{prompt} ({seed})", row))
    columns = list(groups)
    if known:
        columns.insert(0, "reference")
    return sheet(columns, lines)
