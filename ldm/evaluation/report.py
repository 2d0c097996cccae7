"""Results on disk and on screen: JSON rows, CSV, tables with intervals, sheets of images."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.evaluation.metrics import PER_IMAGE, SCALES
from ldm.evaluation.statistics import Estimate, estimate, unit_means
from ldm.files import claim_results, write_text
from ldm.records import Record, is_record

Records = Sequence[Mapping[str, Any]]
ROWS, SUMMARY = ("rows.jsonl", "rows.csv"), "summary.json"      # what every folder of results holds
CLIPPED = "_clipped"        # column name's end: cosines below zero counted as zero


def units_of(rows: Records) -> list[object]:
    """Names what is resampled: concepts and prompts; images where there are no two of these."""
    units = [(row.get("concept"), row.get("prompt")) for row in rows]     # images of a prompt share its difficulty
    return units if len(set(units)) > 1 else list(range(len(rows)))


def summarize(rows: Records, columns: Sequence[str]) -> dict[str, Estimate]:
    """Means with bootstrap intervals of the columns that hold numbers; of CLIP-T also with negative cosines as zero."""
    units, found = units_of(rows), {}
    for column in columns:
        values = [row.get(column) for row in rows]
        means = unit_means(values, units)
        if not means:
            continue
        found[column] = estimate(means)
        if column.endswith("_t"):      # CLIPScore counts a negative cosine as zero, image by image
            clipped = [None if value is None else max(value, 0.0) for value in values]
            found[column + CLIPPED] = estimate(unit_means(clipped, units))
    return found


def sampling_label(settings: Mapping[str, Any]) -> str:
    """Returns how an image was sampled by its own settings, as headings say it."""
    if "strength" not in settings:
        return "images"
    if settings["strength"] is not None:
        return f"DCI, lambda {settings['strength']:g}"
    return "fine-tuned" if "concept" in settings else "base model"


def column_place(settings: Mapping[str, Any]) -> tuple[bool, float, bool]:
    """Returns where such images' column stands: plain ones first, base before fine-tuned, then by rising lambda."""
    strength = settings.get("strength")
    return strength is not None, strength or 0.0, "concept" in settings


def table(groups: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str], first: str = "",
          scales: Sequence[str] = tuple(SCALES)) -> str:
    """A markdown table: a line per metric, a column per group; CLIP-T on each of some scales, by its name."""
    lines = [f"| {first} | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]     # markdown
    for name, title in titles.items():
        if not any(name in group for group in groups.values()):     # a metric that no group has
            continue
        shown = ("cosine",)
        if name.endswith("_t"):
            shown = tuple(scales)
        for scale in shown:
            key = name + CLIPPED if scale in PER_IMAGE else name
            cells = [title]
            if name.endswith(("_t", "_i")):
                cells = [f"{title}, {scale}"]
            for group in groups.values():
                cells.append(str(_scaled(group[key], scale)) if key in group else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def meaning(titles: Mapping[str, str]) -> str:
    """Says in a few sentences what the numbers of a table are and which are good."""
    parts = ["Higher is better in every line"]
    if "judge_edit" in titles:
        parts.append("'right' is the share of images that the judge found to show what was asked, 1 is all")
    if any(name.endswith("_t") for name in titles):
        parts.append("CLIP-T is likeness to the prompt")
    if any(name.endswith("_i") for name in titles):
        parts.append("CLIP-I and image similarity are likeness to the concept's own images")
    return ("; ".join(parts) + ". Numbers compare within a line only, and columns whose intervals overlap widely may "
            "differ by chance.")


def _scaled(value: Estimate, scale: str) -> Estimate:
    """Puts an estimate on another scale; they are monotone, so that the bounds stay bounds."""
    change = SCALES[scale]
    if value.low is None:
        return Estimate(change(value.mean), units=value.units)
    return Estimate(change(value.mean), change(value.low), change(value.high), value.units)


def claim_results_folder(folder: Path, *names: str) -> None:
    """Notes that rows, a summary and files of these names are written to a folder, and replace only what is ours.

    Earlier versions kept no note of it; theirs is a folder whose summary says what measured.

    Raises:
        UserError: one of the files is there and was not made here, or the folder cannot be written.
    """
    claim_results(folder, [*ROWS, SUMMARY, *names], known=is_earlier(folder))


class _Summary(Record):
    """By which a summary is known as ours."""

    measured_by: Any


def is_earlier(folder: Path) -> bool:
    """Says whether an evaluation or an experiment wrote into a folder, by its summary."""
    return is_record(_Summary, folder / SUMMARY)


def write_rows(rows: Records, folder: Path) -> None:
    """Writes rows.jsonl, a JSON object per image, and the same as rows.csv."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    names: dict[str, None] = {}         # an ordered set
    for row in rows:
        names.update(dict.fromkeys(row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in zip(ROWS, (text, buffer.getvalue()), strict=True):
        write_text(folder / name, content)


def write_json(path: Path, content: Any) -> Path:
    """Writes JSON a reader can read."""
    return write_text(path, json.dumps(content, indent=1) + "\n")


def as_numbers(groups: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """The same as `table`, for JSON."""
    numbers: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for group, values in groups.items():
        numbers[group] = {name: asdict(value) for name, value in values.items()}
    return numbers
