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
MARK_PLACES = [(5, 5), (5, -5), (-5, 5), (-5, -5), (5, 15), (5, -15), (-5, 15), (-5, -15),
               (5, 25), (5, -25), (-5, 25), (-5, -25)]                          # in points; of equal ones the first


@dataclass(frozen=True)
class Curve:
    """A labeled line of points: editability, fidelity, and a mark that says what the point is."""

    label: str
    points: Sequence[tuple[Estimate, Estimate, str]]

    @property
    def means(self) -> np.ndarray:
        """Where the points are, (P, 2)."""
        return np.array([(editability.mean, fidelity.mean) for editability, fidelity, _ in self.points])

    @property
    def marks(self) -> tuple[str, ...]:
        """What the points are."""
        return tuple(mark for *_, mark in self.points)


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
    spoken = marked(curves)
    marks = []
    for number, curve in enumerate(curves):
        color, shape = f"C{number % 10}", "os^Dv<>pP*"[number % 10]
        sizes = np.linspace(LARGEST, SMALLEST, len(curve.points))[::-1]         # a lone point is large
        for (across, up, mark), size in zip(curve.points, sizes, strict=True):
            spot = (across.mean, up.mean)
            axes.errorbar(*spot, xerr=_arms(across), yerr=_arms(up), color=color, alpha=0.2, linewidth=1)
            axes.plot(*spot, color=color, marker=shape, markersize=size)
            marks.append((mark if curve in spoken else "", spot, color))
        axes.plot(*curve.means.T, color=color, linewidth=1.4)
        # Points differ in size, so the legend's marker is of a line without any.
        axes.plot([], [], color=color, label=fill(curve.label, 80), marker=shape, markersize=6, linewidth=1.4)
    axes.set(xlabel=f"editability: {editability}", ylabel=f"fidelity: {fidelity}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    several = [curve.marks for curve in curves if len(curve.points) > 1]
    order = None
    if len(several) > len(spoken):          # only then do all of them say the same
        order = f"markers grow along a curve, from {several[0][0]} to {several[0][-1]}"
    _add_legend(figure, order)
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
    reach = LARGEST * axes.figure.dpi / 72                                      # px: a marker, and as much around it
    points, written = [], []
    for _, spot, _ in marks:
        place = axes.transData.transform(spot)
        points.append(Bbox([place - reach, place + reach]))
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
    if len({curve.marks for curve in several}) != 1:
        return curves
    corners = np.stack([curve.means for curve in several])
    extent = np.ptp(corners, axis=(0, 1))                                       # (2): so that both axes count alike
    ways = np.diff(corners, axis=1) / np.where(extent > 0, extent, 1)           # (curves, points - 1, 2)
    longest = np.linalg.norm(ways, axis=2).sum(axis=1).argmax()
    return [several[int(longest)]]


def _arms(value: Estimate) -> list[list[float]] | None:
    """Returns an error bar's lengths to both sides; none where there is no interval."""
    if value.low is None:
        return None
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
