"""Trade-off plots: fidelity over editability, with intervals."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.checkpoint import write_atomically
from ldm.evaluation.statistics import Estimate
from ldm.util import UserError


@dataclass(frozen=True)
class Curve:
    """A labelled line of points: editability, fidelity, and a mark that says what the point is."""

    label: str
    points: Sequence[tuple[Estimate, Estimate, str]]


def _figure(width: float, height: float):
    """Makes an empty figure without any window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("plots need the package matplotlib; install it with: pip install matplotlib.") from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tradeoff_plot(curves: Sequence[Curve], editability: str, fidelity: str, title: str, path: Path) -> Path:
    """Draws curves with their 95 % intervals as crosses; up and right is better.

    Points grow along a curve. Where all curves have the same marks, the longest alone says them: others lie too close.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = _figure(7.2, 5.4)
    axes = figure.add_subplot()
    spoken = marked(curves)
    for number, curve in enumerate(curves):
        x, y = [point[0].mean for point in curve.points], [point[1].mean for point in curve.points]
        colour, shape = f"C{number % 10}", "os^Dv<>pP*"[number % 10]
        for i, (across, up, mark) in enumerate(curve.points):
            axes.errorbar(x[i], y[i], xerr=_arms(across), yerr=_arms(up), color=colour, alpha=0.2, linewidth=1)
            axes.plot(x[i], y[i], color=colour, marker=shape, markersize=7 - 3 * (len(x) - 1 - i) / len(x))
            if curve in spoken:
                axes.annotate(mark, (x[i], y[i]), xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour)
        axes.plot(x, y, color=colour, linewidth=1.4)
        axes.plot([], [], color=colour, label=curve.label, marker=shape, markersize=6, linewidth=1.4)
    axes.set(xlabel=f"editability: {editability}", ylabel=f"fidelity: {fidelity}", title=title)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return write_atomically(path, lambda part: figure.savefig(part, format="png"))


def marked(curves: Sequence[Curve]) -> Sequence[Curve]:
    """Picks the curves whose marks are written: where all of several points say the same, the longest of them."""
    several = [curve for curve in curves if len(curve.points) > 1]
    if len({tuple(mark for *_, mark in curve.points) for curve in several}) != 1:
        return curves
    corners = np.array([[[across.mean, up.mean] for across, up, _ in curve.points] for curve in several])
    extent = np.ptp(corners, axis=(0, 1))                                       # (2): so that both axes count alike
    ways = np.diff(corners, axis=1) / np.where(extent > 0, extent, 1)           # (curves, points - 1, 2)
    return [several[int(np.linalg.norm(ways, axis=2).sum(axis=1).argmax())]]


def _arms(value: Estimate) -> list[list[float]] | None:
    """Returns an error bar's lengths to both sides; none where there is no interval."""
    if value.low is None:
        return None
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
