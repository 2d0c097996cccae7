"""What an experiment compares: paired differences of points, in agreement, fidelity and what stands beside them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.areas import difference
from experiments.claims import Line
from experiments.jobs import Job
from ldm.evaluation.report import as_numbers
from ldm.evaluation.statistics import Estimate, unit_means

Records = Sequence[Mapping[str, Any]]
RIGHT, NOUN = "judge_edit", "judge_noun"
BOTH_RIGHT = "both_right"       # fidelity on images that are right in both points


@dataclass(frozen=True)
class Comparison:
    """Paired differences of one point from another: editability and fidelity, and in how many concepts each rose.

    `beside` has those of further columns, by name: what the two axes do not see.
    """

    name: str
    baseline: str
    editability: Estimate
    fidelity: Estimate
    rose: tuple[int, int]
    concepts: int
    beside: Mapping[str, Estimate] = field(default_factory=dict)


def by_unit(rows: Records, column: str) -> dict[object, float]:
    """A column's means per prompt of a concept."""
    units = [(row["concept"], row["prompt"]) for row in rows]
    return unit_means([row.get(column) for row in rows], units)


def compare(lines: Sequence[Line], rows: Mapping[Job, Records], axes: tuple[str, str],
            columns: Sequence[str] = ()) -> list[Comparison]:
    """Compares each point with its counterpart on the baseline's line, the same in order or the only one.

    Args:
        columns: all that was measured; some of it is compared beside the axes.
    """
    known, found = {line.label: line for line in lines}, []
    for line in lines:
        if line.baseline is None:
            continue
        base = known[line.baseline]
        for index, point in enumerate(line.points):
            other = min(index, len(base.points) - 1)
            first, second = rows[point], rows[base.points[other]]
            editability, agreeing, concepts = _change(first, second, axes[0])
            fidelity, resembling, _ = _change(first, second, axes[1])
            found.append(Comparison(line.names[index], base.names[other], editability, fidelity,
                                    (agreeing, resembling), concepts, _beside(first, second, axes, columns)))
    return found


def _change(rows: Records, base: Records, column: str) -> tuple[Estimate, int, int]:
    """Returns a column's paired difference of two points, in how many concepts it is above zero, and of how many."""
    first, second = by_unit(rows, column), by_unit(base, column)
    values, concepts = [], []
    for unit in first:
        if unit in second:
            values.append(first[unit] - second[unit])
            concepts.append(unit[0])
    per_concept = np.array(list(unit_means(values, concepts).values()))
    return difference(first, second), int(np.sum(per_concept > 0)), len(per_concept)


def _beside(rows: Records, base: Records, axes: tuple[str, str], columns: Sequence[str]) -> dict[str, Estimate]:
    """Compares the class noun, likeness by CLIP, and fidelity on images that are right in both points.

    A network of photos, as EfficientNet, hardly sees that a shape melts; and an image that keeps the references'
    background resembles them for it.
    """
    found = {}
    for column in columns:
        alike = column.endswith("_i") and f"{column.removesuffix('_i')}_t" in columns      # of a CLIP
        if column not in axes and (column == NOUN or alike):
            found[column], _, _ = _change(rows, base, column)
    if axes[0] == RIGHT:
        first, second = _right_in_both(rows, base)
        if first:
            found[BOTH_RIGHT], _, _ = _change(first, second, axes[1])
    return found


def _right_in_both(rows: Records, base: Records) -> tuple[Records, Records]:
    """Returns the images that show all their prompt asks for in either point."""
    others = {image_of(row): row for row in base if row[RIGHT] == 1}
    first = [row for row in rows if row[RIGHT] == 1 and image_of(row) in others]
    return first, [others[image_of(row)] for row in first]


def image_of(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Returns what an image is of, however it was made."""
    return row["concept"], row["run"], row["prompt"], row["seed"]


def comparison_table(comparisons: Sequence[Comparison], titles: Mapping[str, str], axes: tuple[str, str]) -> str:
    """A markdown table of paired differences."""
    if not comparisons:
        return ""
    beside: dict[str, str] = {}
    for item in comparisons:
        for name in item.beside:
            beside[name] = titles.get(name, f"{titles[axes[1]]}, images right in both")
    heads = ["difference [95 % interval]", titles[axes[0]], "rose in", titles[axes[1]], "rose in", *beside.values()]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for item in comparisons:
        cells = [f"{item.name} - {item.baseline}", item.editability, f"{item.rose[0]} of {item.concepts} concepts",
                 item.fidelity, f"{item.rose[1]} of {item.concepts}"]
        cells += [item.beside.get(name, "") for name in beside]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def comparison_as_json(item: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    estimates = {"editability": item.editability, "fidelity": item.fidelity, **item.beside}
    numbers = as_numbers({item.name: estimates})
    return {"point": item.name, "baseline": item.baseline, "rose": item.rose, "concepts": item.concepts,
            **numbers[item.name]}
