"""Trade-off plots: fidelity over editability, with intervals."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = _figure(7.2, 5.4)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        x, y = [point[0].mean for point in curve.points], [point[1].mean for point in curve.points]
        colour = f"C{number % 10}"
        for i, (across, up, mark) in enumerate(curve.points):
            axes.errorbar(x[i], y[i], xerr=_arms(across), yerr=_arms(up), color=colour, alpha=0.35, linewidth=1)
            axes.annotate(mark, (x[i], y[i]), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.plot(x, y, color=colour, label=curve.label, marker="os^Dv<>pP*"[number % 10], markersize=5, linewidth=1.4)
    axes.set(xlabel=f"editability: {editability}", ylabel=f"fidelity: {fidelity}", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return write_atomically(path, lambda part: figure.savefig(part, format="png"))


def _arms(value: Estimate) -> list[list[float]] | None:
    """Returns an error bar's lengths to both sides; none where there is no interval."""
    if value.low is None:
        return None
    return [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
