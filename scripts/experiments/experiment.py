"""One experiment from claim to report: jobs, points with intervals, comparisons, areas, plot, sheet, masks."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image

from experiments.areas import Areas, compare_areas
from experiments.chosen import chosen_line
from experiments.claims import Claim, Line
from experiments.comparisons import Comparison, Records, by_unit, compare, comparison_as_json, comparison_table
from experiments.jobs import BASE, Job, Subject, thin_out
from experiments.plots import Curve, tradeoff_plot
from experiments.sweep import Sweep, rows_by_point
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
from ldm.files import claim_results, write_text
from ldm.requests import ImageRequest
from ldm.sheets import mask_panel, save_png, sheet
from ldm.util import UserError, folder_name

SHEET_ROWS, SHEET_COLUMNS = 12, 9
REPORT, PLOT, SHEET, MASKS = "report.md", "plot.png", "sheet.png", "masks"


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
    needed = points_of(claim.lines(sweep.config))
    if not needed:
        raise UserError(f"experiment '{claim.name}' has no points; its list in the sweep's configuration is empty.")
    if sweep.config.runs < 1:
        raise UserError(f"runs is {sweep.config.runs}; give at least 1.")
    jobs = []
    for point in needed:
        runs = 1 if point.method == BASE else sweep.config.runs         # there is one base model
        jobs += [replace(point, concept=name, run=run) for name, run in product(sweep.subjects, range(runs))]
    return jobs


def points_of(lines: Sequence[Line]) -> list[Job]:
    """Returns the points of lines, once each: a curve may share some with another."""
    return list(dict.fromkeys(chain.from_iterable(line.points for line in lines)))


def claim_names(claims: Sequence[Claim], sweep: Sweep) -> None:
    """Notes what experiments write into the sweep's folder.

    Raises:
        UserError: a file of such a name is there and was not made here.
    """
    earlier = any(is_earlier(path.parent) for path in sweep.outdir.glob(f"*/{SUMMARY}"))
    for claim in claims:
        folder = sweep.outdir / claim.name
        if claim.masks:
            claim_results(folder / MASKS, list(map(mask_file, sweep.subjects)), known=is_earlier(folder))
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
    if axes[0] == "judge_edit":
        _check_wishes(jobs, sweep)
    rows = rows_by_point(sweep.run(jobs))
    if claim.chosen:
        line, picked = chosen_line(lines, rows, sweep)
        lines = [*lines, line]
        rows[line.points[0]] = picked
    titles = sweep.scorer.titles
    comparisons, areas = compare(lines, rows, axes, titles), compare_curves(lines, rows, axes)
    folder = sweep.outdir / claim.name
    write_rows(list(chain.from_iterable(map(rows.get, points_of(lines)))), folder)
    estimates, curves = {}, []
    for line in lines:
        curve = []
        for name, point, mark in zip(line.names, line.points, line.marks, strict=True):
            estimates[name] = summarize(rows[point], list(titles))
            curve.append((estimates[name][axes[0]], estimates[name][axes[1]], mark))
        curves.append(Curve(line.label, curve))
    drawn = min(map(len, rows.values()))
    several, minutes = len(estimates) > 1, sweep.store.seconds(jobs) / 60
    parts = [f"## {claim.name} ({claim.source})", claim.question, _circumstances(sweep, command, minutes),
             "![plot](plot.png)" if several else "", "![images](sheet.png)",
             table(estimates, titles, "mean [95 % interval]"), meaning(titles),
             comparison_table(comparisons, titles, axes), area_table(areas), verdict(comparisons, areas, drawn)]
    if claim.masks:
        parts.append(draw_masks(sweep, lines[0].points[0], jobs, folder))
    text = "\n\n".join(filter(None, parts))
    write_json(folder / SUMMARY, {
        "points": as_numbers(estimates), "comparisons": list(map(comparison_as_json, comparisons)),
        "areas": _areas_as_json(areas), "minutes": minutes, "measured_by": sweep.scorer.record, "command": command})
    write_text(folder / REPORT, text + "\n")
    if several:
        tradeoff_plot(curves, titles[axes[0]], titles[axes[1]], plot_title(claim, drawn), folder / PLOT)
    save_png(experiment_sheet(sweep, lines, rows), folder / SHEET)
    return Report(folder, text, comparisons, areas)


def _check_wishes(jobs: Sequence[Job], sweep: Sweep) -> None:
    """Refuses prompts of which the judge knows none, before any work."""
    for job in jobs:
        if any(map(sweep.scorer.judge.wishes, job.said(sweep.subjects[job.concept]))):
            return
    raise UserError(f"'{sweep.scorer.titles['judge_edit']}' can be said of no prompt of this sweep; give other "
                    "prompts, or other --metrics.")


def _circumstances(sweep: Sweep, command: str, minutes: float) -> str:
    """Says in a line what was measured and how long it took."""
    counts = {len(subject.prompts) for subject in sweep.subjects.values()}
    prompts = " or ".join(map(str, sorted(counts)))
    runs = "" if sweep.config.runs == 1 else f"{sweep.config.runs} fine-tuning runs x "
    ending = f" Command: `{command}`" if command else ""
    return (f"{len(sweep.subjects)} concepts x {runs}{prompts} prompts x {sweep.config.seeds} seeds a "
            f"point; {minutes:.1f} minutes of one process, with fine-tuning and points that other experiments share."
            f"{ending}")


def compare_curves(lines: Sequence[Line], rows: Mapping[Job, Records], axes: tuple[str, str]) -> Areas | None:
    """Areas under the lines that have as many points as the longest, and of each less its baseline's."""
    longest = max(len(line.points) for line in lines)
    curves = {line.label: line for line in lines if len(line.points) == longest}
    if longest < 2 or len(curves) < 2:
        return None
    values = {}
    for label, line in curves.items():
        values[label] = [by_unit(rows[point], axis) for point, axis in product(line.points, axes)]
    everywhere = set.intersection(*map(set, chain.from_iterable(values.values())))
    shared = [unit for unit in next(iter(values.values()))[0] if unit in everywhere]
    arrays = {}                                                                     # (points, 2, units) each
    for label, columns in values.items():
        numbers = [means[unit] for means, unit in product(columns, shared)]
        arrays[label] = np.array(numbers).reshape(longest, len(axes), len(shared))
    pairs = [(line.label, line.baseline) for line in curves.values() if line.baseline in curves]
    return compare_areas(arrays, pairs, shared)


def overview(reports: Sequence[Report], sweep: Sweep, command: str = "") -> Path:
    """Writes report.md beside the experiments' folders: every comparison in one table, then every report."""
    titles, axes = sweep.scorer.titles, (sweep.scorer.editability, sweep.scorer.fidelity)
    lines = [f"| experiment | difference [95 % interval] | {titles[axes[0]]} | {titles[axes[1]]} |",
             "|---|---|---|---|"]
    texts = []
    for report in reports:
        for item in report.comparisons:
            lines.append(f"| {report.folder.name} | {item.name} - {item.baseline} | {item.editability} | "
                         f"{item.fidelity} |")
        # Links of a report start at its own folder, one below this file.
        texts.append(re.sub(r"\]\((?=[\w/.]+\))", f"]({report.folder.name}/", report.text))
    told = f"Command: `{command}`" if command else ""
    parts = filter(None, [f"# {len(reports)} experiments", told, "\n".join(lines), *texts])
    return write_text(sweep.outdir / REPORT, "\n\n".join(parts) + "\n")


def area_table(areas: Areas | None) -> str:
    """A markdown table of areas under curves."""
    if areas is None:
        return ""
    lines = ["| area under the curve, share of the box around all points | [95 % interval] | excludes zero |",
             "|---|---|---|"]
    for name, value in areas.areas.items():
        lines.append(f"| {name} | {value} | |")
    for (name, base), value in areas.differences.items():
        answer = "yes" if value.excludes_zero else "no"
        if value.low is None:                           # without an interval there is no answer
            answer = ""
        lines.append(f"| {name} - {base} | {value} | {answer} |")
    return "\n".join(lines)


def verdict(comparisons: Sequence[Comparison], areas: Areas | None, drawn: int) -> str:
    """Says how many of the differences are not decided with so many images a point."""
    found = list(areas.differences.values()) if areas else []
    for item in comparisons:
        found += [item.editability, item.fidelity]
    known = [change for change in found if change.low is not None]
    if found and not known:
        return "Nothing is decided: one prompt of one concept gives no intervals."
    unclear = [change.excludes_zero for change in known].count(False)
    if not unclear:
        return ""
    return (f"Not decided with {drawn} images a point: {unclear} of {len(known)} differences, whose intervals "
            "include zero; more concepts, prompts or seeds make intervals narrower.")


def plot_title(claim: Claim, drawn: int) -> str:
    """Says what a claim's plot shows."""
    return f"{fill(claim.question, 80)}\n{claim.name} ({claim.source}), {drawn} images a point, 95 % intervals"


def _areas_as_json(areas: Areas | None) -> dict[str, Any] | None:
    """Areas for JSON."""
    if areas is None:
        return None
    named = {f"{name} - {base}": value for (name, base), value in areas.differences.items()}
    return {"corner": areas.corner, "box": areas.box,
            **as_numbers({"areas": areas.areas, "differences": named})}


def experiment_sheet(sweep: Sweep, lines: Sequence[Line], rows: Mapping[Job, Records]) -> Image.Image:
    """Lays out prompts of all concepts in rows, points in columns, the first seed of each."""
    places = sheet_columns(lines)
    first: dict[tuple[Job, str, str], str] = {}
    for point, found in rows.items():
        for row in found:
            first.setdefault((point, row["concept"], row["prompt"]), row["picture"])
    references = {name: open_references(subject.references)[0] for name, subject in sweep.subjects.items()}
    shown = []
    for concept, prompt in sheet_rows(list(sweep.subjects.values())):
        cells = [references[concept]]
        for line, index in places:
            cells.append(open_image(sweep.outdir / first[line.points[index], concept, prompt]))
        shown.append((_with_name(prompt, concept), cells))
    titles = [line.names[index] for line, index in places]
    return sheet(["reference", *titles], shown, 128)


def _with_name(prompt: str, concept: str) -> str:
    """Says a prompt to a reader, who knows the concept by its name."""
    return prompt.replace("{}", f"[{concept}]")


def sheet_columns(lines: Sequence[Line]) -> Sequence[tuple[Line, int]]:
    """Picks a sheet's points: of every curve as many as fit, evenly spread, always with its last one.

    Where not even the last ones fit, some curves are left out.
    """
    for count in range(SHEET_COLUMNS, 0, -1):
        sizes = [min(count, len(line.points)) for line in lines]
        if sum(sizes) <= SHEET_COLUMNS:
            break
    places = []
    for line, size in zip(lines, sizes, strict=True):
        # From the end, which is the point that one column shows.
        indices = np.linspace(len(line.points) - 1, 0, size).round().astype(int)
        places += [(line, index) for index in indices[::-1].tolist()]
    return thin_out(places, SHEET_COLUMNS)


def sheet_rows(found: Sequence[Subject]) -> list[tuple[str, str]]:
    """Picks a sheet's concepts and prompts: concepts in turn, and over the sheet prompts from the first to the last."""
    pairs = []
    for subject in found:
        pairs += [(subject.name, prompt) for prompt in subject.prompts]
    if len(pairs) <= SHEET_ROWS:
        return pairs
    shown = []
    for row in range(SHEET_ROWS):
        subject = found[row % len(found)]
        shown.append((subject.name, subject.prompts[row * len(subject.prompts) // SHEET_ROWS]))
    return shown


def draw_masks(sweep: Sweep, point: Job, jobs: Sequence[Job], folder: Path) -> str:
    """Draws DBIM's masks for one prompt of each concept; returns a table of their mean and spread per resolution."""
    numbers: dict[tuple[int, int], list[np.ndarray]] = {}
    images = []
    for index, (name, subject) in enumerate(sweep.subjects.items()):
        job = replace(point, concept=name)
        generator, settings = sweep.ready(job, jobs), sweep.store.settings(job)
        prompt = subject.prompts[index * len(subject.prompts) // len(sweep.subjects)]
        request = ImageRequest(prompt, sweep.config.first_seed, point.strength)
        image, record = generator.masks(request, settings)
        title = f"{_with_name(prompt, name)} (seed {request.seed}, lambda {request.strength:g})"
        save_png(mask_panel(image, record, title), folder / MASKS / mask_file(name))
        images.append(f"![masks of {name}]({MASKS}/{mask_file(name)})")
        for _, masks in record:
            numbers.setdefault(tuple(masks.shape[-2:]), []).append(masks[1].float().mean(dim=(0, 1)).numpy())
    lines = ["| resolution | mean share of the auxiliary branch | spread over pixels |", "|---|---|---|"]
    for (height, width), maps in sorted(numbers.items(), reverse=True):
        # Concepts count alike: the spread is of each image's own pixels, not of the difference between images.
        deviations = [one.std() for one in maps]
        lines.append(f"| {height} x {width} | {np.mean(maps):.3f} | {np.mean(deviations):.3f} |")
    return "\n".join([*lines, "", *images])
