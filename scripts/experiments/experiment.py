"""One experiment from claim to report: jobs, points with intervals, comparisons, areas, plot, sheet, masks."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from experiments.areas import Areas, compare_areas, difference
from experiments.claims import Claim, Line
from experiments.jobs import BASE, Job, Subject, thin_out
from experiments.plots import Curve, tradeoff_plot
from experiments.sweep import Sweep, points
from ldm.data.images import open_image
from ldm.evaluation.evaluate import open_references
from ldm.evaluation.report import (
    SUMMARY,
    as_numbers,
    claim_results_folder,
    is_earlier,
    meaning,
    summarize,
    table,
    write_json,
    write_rows,
)
from ldm.evaluation.statistics import Estimate, unit_means
from ldm.files import claim_results, write_text
from ldm.requests import ImageRequest
from ldm.sheets import mask_panel, save_png, sheet
from ldm.util import UserError, folder_name

Rows = Sequence[Mapping[str, Any]]
SHEET_ROWS, SHEET_COLUMNS = 12, 9
REPORT, PLOT, SHEET, MASKS = "report.md", "plot.png", "sheet.png", "masks"


@dataclass(frozen=True)
class Comparison:
    """Paired differences of one point from another: editability and fidelity, and in how many concepts each rose."""

    name: str
    baseline: str
    editability: Estimate
    fidelity: Estimate
    rose: tuple[int, int]
    concepts: int


@dataclass(frozen=True)
class Report:
    """What an experiment found."""

    folder: Path
    text: str
    comparisons: list[Comparison]
    areas: Areas | None


def jobs_of(claim: Claim, sweep: Sweep) -> list[Job]:
    """Returns what an experiment needs of every concept.

    Raises:
        UserError: the sweep's configuration lists none of its points, or asks for no run.
    """
    needed = dict.fromkeys(point for line in claim.lines(sweep.config) for point in line.points)
    if not needed:
        raise UserError(f"experiment '{claim.name}' has no points; its list in the sweep's configuration is empty.")
    if sweep.config.runs < 1:
        raise UserError(f"runs is {sweep.config.runs}; give at least 1.")
    return [replace(point, concept=name, run=run) for point in needed for name in sweep.subjects
            for run in range(1 if point.method == BASE else sweep.config.runs)]


def claim_names(claims: Sequence[Claim], sweep: Sweep) -> None:
    """Notes what experiments write into the sweep's folder.

    Raises:
        UserError: a file of such a name is there and was not made here.
    """
    earlier = any(is_earlier(path.parent) for path in sweep.outdir.glob(f"*/{SUMMARY}"))
    for claim in claims:
        folder = sweep.outdir / claim.name
        if claim.masks:
            claim_results(folder / MASKS, [mask_file(name) for name in sweep.subjects], known=is_earlier(folder))
        claim_results_folder(folder, REPORT, PLOT, SHEET)
    if len(claims) > 1:
        claim_results(sweep.outdir, [REPORT], known=earlier)


def mask_file(subject: str) -> str:
    """Names the image of a concept's masks."""
    return f"{folder_name(subject)}.png"


def run_claim(claim: Claim, sweep: Sweep, command: str = "") -> Report:
    """Carries an experiment out and writes rows.jsonl, rows.csv, summary.json, plot.png, sheet.png and report.md.

    One point makes no plot.

    Raises:
        UserError: the sweep lacks what the experiment needs, or no metric measures one of its two sides.
    """
    axes = (sweep.scorer.editability, sweep.scorer.fidelity)
    if None in axes:
        raise UserError("a trade-off needs a metric of prompt agreement (judge or a CLIP) and one of images; give more "
                        "--metrics.")
    lines, jobs = claim.lines(sweep.config), jobs_of(claim, sweep)
    if axes[0] == "judge_edit" and not any(sweep.scorer.judge.wishes(text) for job in jobs for text in sweep.said(job)):
        raise UserError(f"'{sweep.scorer.titles[axes[0]]}' can be said of no prompt of this sweep; give other prompts, "
                        "or other --metrics.")
    rows = points(sweep.run(jobs))
    comparisons, areas = compare(lines, rows, axes), compare_curves(lines, rows, axes)
    folder = sweep.outdir / claim.name
    write_rows([row for point in dict.fromkeys(job.point for job in jobs) for row in rows[point]], folder)
    titles = sweep.scorer.titles
    estimates = {_name(line, index): summarize(rows[point], list(titles))
                 for line in lines for index, point in enumerate(line.points)}
    drawn = min(len(rows[point]) for line in lines for point in line.points)
    several, minutes = len(estimates) > 1, sweep.seconds(jobs) / 60
    text = "\n\n".join(filter(None, [
        f"## {claim.name} ({claim.source})", claim.question, _circumstances(sweep, command, minutes),
        "![plot](plot.png)" if several else "", "![images](sheet.png)",
        table(estimates, titles, "mean [95 % interval]"), meaning(titles),
        comparison_table(comparisons, titles, axes), area_table(areas), verdict(comparisons, areas, drawn)]))
    if claim.masks:
        text += "\n\n" + draw_masks(sweep, lines[0].points[0], jobs, folder)
    write_json(folder / SUMMARY, {
        "points": as_numbers(estimates), "comparisons": [_as_json(item) for item in comparisons],
        "areas": _areas_as_json(areas), "minutes": minutes, "measured_by": sweep.scorer.record, "command": command})
    write_text(folder / REPORT, text + "\n")
    curves = [Curve(line.label, [(*(estimates[_name(line, index)][axis] for axis in axes), mark)
                                 for index, mark in enumerate(line.marks)]) for line in lines]
    if several:
        tradeoff_plot(curves, titles[axes[0]], titles[axes[1]], plot_title(claim, drawn), folder / PLOT)
    save_png(experiment_sheet(sweep, lines, rows), folder / SHEET)
    return Report(folder, text, comparisons, areas)


def _name(line: Line, index: int) -> str:
    """Names a point in tables."""
    return f"{line.label}, {line.marks[index]}".removesuffix(", ")


def _circumstances(sweep: Sweep, command: str, minutes: float) -> str:
    """Says in a line what was measured and how long it took."""
    subjects = list(sweep.subjects.values())
    prompts = sorted({len(subject.prompts) for subject in subjects})
    runs = "" if sweep.config.runs == 1 else f"{sweep.config.runs} fine-tuning runs x "
    return (f"{len(subjects)} concepts x {runs}{' or '.join(map(str, prompts))} prompts x {sweep.config.seeds} seeds a "
            f"point; {minutes:.1f} minutes of one process, with fine-tuning and points that other experiments share."
            + (f" Command: `{command}`" if command else ""))


def by_unit(rows: Rows, column: str) -> dict[object, float]:
    """A column's means per prompt of a concept."""
    return unit_means([row.get(column) for row in rows], [(row["concept"], row["prompt"]) for row in rows])


def compare(lines: Sequence[Line], rows: Mapping[Job, Rows], axes: tuple[str, str]) -> list[Comparison]:
    """Compares each point with its counterpart on the baseline's line, the same in order or the only one."""
    known, found = {line.label: line for line in lines}, []
    for line in lines:
        if line.baseline is None:
            continue
        base = known[line.baseline]
        for index, point in enumerate(line.points):
            other = min(index, len(base.points) - 1)
            pairs = [(by_unit(rows[point], axis), by_unit(rows[base.points[other]], axis)) for axis in axes]
            per_concept = [_concept_differences(*pair) for pair in pairs]
            found.append(Comparison(
                _name(line, index), _name(base, other), difference(*pairs[0]), difference(*pairs[1]),
                tuple(sum(value > 0 for value in values) for values in per_concept), len(per_concept[0])))
    return found


def _concept_differences(first: Mapping[Any, float], second: Mapping[Any, float]) -> list[float]:
    """Differences of the concepts' means over prompts."""
    shared = [unit for unit in first if unit in second]
    return list(unit_means([first[unit] - second[unit] for unit in shared], [unit[0] for unit in shared]).values())


def compare_curves(lines: Sequence[Line], rows: Mapping[Job, Rows], axes: tuple[str, str]) -> Areas | None:
    """Areas under the lines that have as many points as the longest, and of each less its baseline's."""
    longest = max(len(line.points) for line in lines)
    curves = {line.label: line for line in lines if len(line.points) == longest}
    if longest < 2 or len(curves) < 2:
        return None
    values = {line.label: [[by_unit(rows[point], axis) for axis in axes] for point in line.points]
              for line in curves.values()}
    shared = [unit for unit in next(iter(values.values()))[0][0]
              if all(unit in axis for points_ in values.values() for point in points_ for axis in point)]
    arrays = {label: np.array([[[axis[unit] for unit in shared] for axis in point] for point in points_])
              for label, points_ in values.items()}                                 # (points, 2, units) each
    pairs = [(line.label, line.baseline) for line in curves.values() if line.baseline in curves]
    return compare_areas(arrays, pairs, shared)


def comparison_table(comparisons: Sequence[Comparison], titles: Mapping[str, str], axes: tuple[str, str]) -> str:
    """A markdown table of paired differences."""
    if not comparisons:
        return ""
    lines = [f"| difference [95 % interval] | {titles[axes[0]]} | rose in | {titles[axes[1]]} | rose in |",
             "|---|---|---|---|---|"]
    lines += [f"| {item.name} - {item.baseline} | {item.editability} | {item.rose[0]} of {item.concepts} concepts | "
              f"{item.fidelity} | {item.rose[1]} of {item.concepts} |" for item in comparisons]
    return "\n".join(lines)


def overview(reports: Sequence[Report], sweep: Sweep, command: str = "") -> Path:
    """Writes report.md beside the experiments' folders: every comparison in one table, then every report."""
    titles, axes = sweep.scorer.titles, (sweep.scorer.editability, sweep.scorer.fidelity)
    lines = [f"| experiment | difference [95 % interval] | {titles[axes[0]]} | {titles[axes[1]]} |",
             "|---|---|---|---|"]
    lines += [f"| {report.folder.name} | {item.name} - {item.baseline} | {item.editability} | {item.fidelity} |"
              for report in reports for item in report.comparisons]
    parts = [f"# {len(reports)} experiments", f"Command: `{command}`" if command else "", "\n".join(lines),
             *(re.sub(r"\]\((?=[\w/.]+\))", f"]({report.folder.name}/", report.text) for report in reports)]
    return write_text(sweep.outdir / REPORT, "\n\n".join(filter(None, parts)) + "\n")


def area_table(areas: Areas | None) -> str:
    """A markdown table of areas under curves."""
    if areas is None:
        return ""
    lines = ["| area under the curve, share of the box around all points | [95 % interval] | excludes zero |",
             "|---|---|---|", *(f"| {name} | {value} | |" for name, value in areas.areas.items())]
    lines += [f"| {name} - {base} | {value} | {'' if value.low is None else 'yes' if value.excludes_zero else 'no'} |"
              for (name, base), value in areas.differences.items()]
    return "\n".join(lines)


def verdict(comparisons: Sequence[Comparison], areas: Areas | None, drawn: int) -> str:
    """Says how many of the differences are not decided with so many images a point."""
    found = [estimate for item in comparisons for estimate in (item.editability, item.fidelity)]
    found += list(areas.differences.values()) if areas else []
    known = [estimate for estimate in found if estimate.low is not None]
    if found and not known:
        return "Nothing is decided: one prompt of one concept gives no intervals."
    unclear = sum(not estimate.excludes_zero for estimate in known)
    if not unclear:
        return ""
    return (f"Not decided with {drawn} images a point: {unclear} of {len(known)} differences, whose intervals "
            "include zero; more concepts, prompts or seeds make intervals narrower.")


def plot_title(claim: Claim, drawn: int) -> str:
    """Says what a claim's plot shows."""
    return f"{fill(claim.question, 80)}\n{claim.name} ({claim.source}), {drawn} images a point, 95 % intervals"


def _as_json(item: Comparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return {"point": item.name, "baseline": item.baseline, "rose": item.rose, "concepts": item.concepts,
            **as_numbers({"": {"editability": item.editability, "fidelity": item.fidelity}})[""]}


def _areas_as_json(areas: Areas | None) -> dict[str, Any] | None:
    """Areas for JSON."""
    if areas is None:
        return None
    named = {f"{name} - {base}": value for (name, base), value in areas.differences.items()}
    return {"corner": areas.corner, "box": areas.box,
            **as_numbers({"areas": areas.areas, "differences": named})}


def experiment_sheet(sweep: Sweep, lines: Sequence[Line], rows: Mapping[Job, Rows]) -> Image.Image:
    """Lays out prompts of all concepts in rows, points in columns, the first seed of each."""
    places = sheet_columns(lines)
    first = {point: {(row["concept"], row["prompt"]): row for row in reversed(found)} for point, found in rows.items()}
    references = {name: open_references(subject.references)[0] for name, subject in sweep.subjects.items()}
    shown = []
    for concept, prompt in sheet_rows(list(sweep.subjects.values())):
        rows_shown = [first[line.points[index]][concept, prompt] for line, index in places]
        cells = [open_image(sweep.outdir / row["picture"]) for row in rows_shown]
        shown.append((f"{prompt.replace('{}', '[' + concept + ']')}", [references[concept], *cells]))
    return sheet(["reference", *(_name(line, index) for line, index in places)], shown, 128)


def sheet_columns(lines: Sequence[Line]) -> Sequence[tuple[Line, int]]:
    """Picks a sheet's points: of every curve as many as fit, evenly spread, always with its last one.

    Where not even the last ones fit, some curves are left out.
    """
    for count in range(SHEET_COLUMNS, 0, -1):
        sizes = [min(count, len(line.points)) for line in lines]
        if sum(sizes) <= SHEET_COLUMNS or count == 1:
            break
    places = [(line, int(index)) for line, size in zip(lines, sizes, strict=True)
              for index in np.linspace(len(line.points) - 1, 0, size).round()[::-1]]
    return thin_out(places, SHEET_COLUMNS)


def sheet_rows(found: Sequence[Subject]) -> list[tuple[str, str]]:
    """Picks a sheet's concepts and prompts: concepts in turn, and over the sheet prompts from the first to the last."""
    if sum(len(subject.prompts) for subject in found) <= SHEET_ROWS:
        return [(subject.name, prompt) for subject in found for prompt in subject.prompts]
    turns = [(row, found[row % len(found)]) for row in range(SHEET_ROWS)]
    return [(subject.name, subject.prompts[row * len(subject.prompts) // SHEET_ROWS]) for row, subject in turns]


def draw_masks(sweep: Sweep, point: Job, jobs: Sequence[Job], folder: Path) -> str:
    """Draws DBIM's masks for one prompt of each concept; returns a table of their mean and spread per resolution."""
    numbers: dict[tuple[int, int], list[np.ndarray]] = {}
    for index, (name, subject) in enumerate(sweep.subjects.items()):
        job = replace(point, concept=name)
        generator, settings = sweep.ready(job, jobs), sweep.settings(job)
        prompt = subject.prompts[index * len(subject.prompts) // len(sweep.subjects)]
        request = ImageRequest(prompt, sweep.config.first_seed, point.strength)
        image, record = generator.masks(request, settings)
        title = f"{prompt.replace('{}', '[' + name + ']')} (seed {request.seed}, lambda {request.strength:g})"
        save_png(mask_panel(image, record, title), folder / MASKS / mask_file(name))
        for _, masks in record:
            numbers.setdefault(tuple(masks.shape[-2:]), []).append(masks[1].float().mean(dim=(0, 1)).numpy())
    lines = ["| resolution | mean share of the auxiliary branch | spread over pixels |", "|---|---|---|"]
    lines += [f"| {height} x {width} | {np.mean(maps):.3f} | {np.mean([one.std() for one in maps]):.3f} |"
              for (height, width), maps in sorted(numbers.items(), reverse=True)]
    return "\n".join([*lines, "", *(f"![masks of {name}](masks/{folder_name(name)}.png)" for name in sweep.subjects)])
