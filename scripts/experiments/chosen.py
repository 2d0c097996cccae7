"""Lambda chosen by the program, as a point of an experiment: its images are those of the fixed strengths."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.claims import CHOSEN, Line
from experiments.comparisons import image_of
from experiments.jobs import Job, Subject, SweepConfig
from experiments.sweep import Sweep
from ldm.choice import Chooser, choose
from ldm.config import CHOICE_METRICS
from ldm.data.images import open_image
from ldm.evaluation.evaluate import open_references
from ldm.evaluation.scoring import plain_text
from ldm.util import UserError

Rows = Mapping[Job, Sequence[Mapping[str, Any]]]


def chosen_line(lines: Sequence[Line], rows: Rows, sweep: Sweep) -> tuple[Line, list[dict[str, Any]]]:
    """Returns a line of one point, and its rows: for every image that of the strength chosen among the lines'.

    Chosen as `scripts/sample.py --agg_lambda auto` chooses: the likeness is to the concept's references.

    Raises:
        UserError: there is no CLIP to choose with.
    """
    fixed = [point for line in lines for point in line.points if point.strength is not None]
    plain = next(point for line in lines for point in line.points if point.strength is None)
    by_image = {point: {image_of(row): row for row in rows[point]} for point in (plain, *fixed)}
    choosers = {name: chooser_of(sweep, subject) for name, subject in sweep.subjects.items()}
    found = []
    for image, raw in by_image[plain].items():
        candidates = {point.strength: by_image[point][image] for point in fixed}
        chooser = choosers[raw["concept"]]
        images = [open_image(sweep.outdir / row["picture"]) for row in (raw, *candidates.values())]
        first, *scores = chooser.score(images, plain_text(raw["prompt"], raw["class_noun"]))
        strength = choose(first, dict(zip(candidates, scores, strict=True)), chooser.margin, chooser.tolerance)
        found.append({**candidates[strength], "chosen": True})
    point = Job("", fixed[0].method, fixed[0].step, words=CHOSEN)
    return Line(CHOSEN, (point,), ("",), lines[0].label), found


def chooser_of(sweep: Sweep, subject: Subject) -> Chooser:
    """Returns a concept's chooser, with the CLIP that the sweep measures with and the concept's own references."""
    config: SweepConfig = sweep.config
    clips = [extractor for extractor in sweep.scorer.extractors if extractor.encode_texts]
    if not clips:
        raise UserError(f"lambda is chosen by a CLIP; name one with --metrics: {', '.join(CHOICE_METRICS)}.")
    references = subject.training(config, config.method).concepts[0].images
    choice = Job("", config.method, config.step, strength=0.0).sampling(config).dci.choice
    # The last CLIP is the largest.
    return Chooser(clips[-1], open_references(references), choice.margin, choice.tolerance)
