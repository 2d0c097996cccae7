"""Trade-off plots: fidelity over editability, with intervals."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill

import numpy as np

from ldm.evaluation.statistics import Estimate
from ldm.files import write_atomically
from ldm.util import UserError

SMALLEST, LARGEST = 4, 8                                                        # markers, in points
MARK_PLACES = [(x, y) for far in (5, 15, 25) for x, y in ((5, far), (5, -far), (-5, far), (-5, -far))]


@dataclass(frozen=True)
class Curve:
    """A labeled line of points: editability, fidelity, and a mark that says what the point is."""

    label: str
    points: Sequence[tuple[Estimate, Estimate, str]]


def check_plots() -> None:
    """Refuses to go on without matplotlib, which is not among the packages that fine-tuning and sampling need."""
    if not find_spec("matplotlib"):
        raise UserError("plots need the package matplotlib; install it with: pip install matplotlib.")


def _figure(width: float, height: float):
    """Makes an empty figure without any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tradeoff_plot(curves: Sequence[Curve], editability: str, fidelity: str, title: str, path: Path) -> Path:
    """Writes `tradeoff_figure` as PNG."""
    figure = tradeoff_figure(curves, editability, fidelity, title)
    return write_atomically(path, lambda part: figure.savefig(part, format="png"))


def tradeoff_figure(curves: Sequence[Curve], editability: str, fidelity: str, title: str):
    """Draws curves with their 95 % intervals as crosses; up and right is better.

    Points grow along a curve. Where all curves have the same marks, the longest alone says them: others lie too close.
    """
    figure = _figure(7.2, 5.4)
    axes = figure.add_subplot()
    spoken, several = marked(curves), [curve for curve in curves if len(curve.points) > 1]
    marks = []
    for number, curve in enumerate(curves):
        x, y = [point[0].mean for point in curve.points], [point[1].mean for point in curve.points]
        color, shape = f"C{number % 10}", "os^Dv<>pP*"[number % 10]
        sizes = np.linspace(LARGEST, SMALLEST, len(x))[::-1]
        for i, (across, up, mark) in enumerate(curve.points):
            axes.errorbar(x[i], y[i], xerr=_arms(across), yerr=_arms(up), color=color, alpha=0.2, linewidth=1)
            axes.plot(x[i], y[i], color=color, marker=shape, markersize=sizes[i])
            marks.append((mark if curve in spoken else "", (x[i], y[i]), color))
        axes.plot(x, y, color=color, linewidth=1.4)
        axes.plot([], [], color=color, label=fill(curve.label, 80), marker=shape, markersize=6, linewidth=1.4)
    axes.set(xlabel=f"editability: {editability}", ylabel=f"fidelity: {fidelity}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    ends = [several[0].points[end][2] for end in (0, -1)] if len(several) > len(spoken) else []
    _add_legend(figure, f"markers grow along a curve, from {' to '.join(ends)}" if ends else None)
    _write_marks(axes, marks)
    return figure


def _add_legend(figure, title: str | None) -> None:
    """Puts the legend below the axes, in as many columns as the figure is wide enough for."""
    for columns in (3, 2, 1):
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=8, title=title, title_fontsize=8)
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def _write_marks(axes, marks: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Writes marks (text, point, color) beside their points, where they cover the fewest others and other points."""
    from matplotlib.transforms import Bbox
    reach, written = LARGEST * axes.figure.dpi / 72, []                         # px: a marker, and as much around it
    points = [Bbox([spot - reach, spot + reach]) for spot in axes.transData.transform([spot for _, spot, _ in marks])]
    for index, (mark, spot, color) in enumerate(marks):
        if not mark:
            continue
        text = axes.annotate(mark, spot, (0, 0), textcoords="offset points", fontsize=8, color=color)
        others = [*points[:index], *points[index + 1:], *written]
        covered = [_put(text, place).count_overlaps(others) for place in MARK_PLACES]
        written.append(_put(text, MARK_PLACES[int(np.argmin(covered))]))


def _put(text, place: tuple[int, int]):
    """Moves a mark to a side of its point, `place` points away; returns its box."""
    text.set(position=place, ha="left" if place[0] > 0 else "right", va="bottom" if place[1] > 0 else "top")
    return text.get_window_extent()


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
