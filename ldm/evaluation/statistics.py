"""Bootstrap intervals over prompts, and the area under a fidelity-editability curve."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval; the bounds are None where there is only one unit to resample."""

    mean: float
    low: float | None = None
    high: float | None = None
    units: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def resamplings(units: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights (draws, units) of bootstrap resamplings: how often each unit is drawn, divided by their number."""
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1.0 / units), size=draws)
    return counts / units


def interval(statistics: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of a statistic's bootstrap values (draws,)."""
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def unit_means(values: Sequence[float | None], units: Sequence[object]) -> dict[object, float]:
    """Means of the values of each unit, in order of appearance; values that are None are left out.

    Pictures of one prompt differ by their seed only, so that they are no independent witnesses: the unit that is
    resampled is the prompt (of a concept), not the picture.
    """
    groups: dict[object, list[float]] = {}
    for value, name in zip(values, units, strict=True):
        if value is not None:
            groups.setdefault(name, []).append(float(value))
    return {name: float(np.mean(group)) for name, group in groups.items()}


def estimate(means: Mapping[object, float], draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean over units with its bootstrap interval.

    Raises:
        ValueError: there is no unit.
    """
    values = np.array(list(means.values()))
    if not len(values):
        raise ValueError("there is nothing to average")
    if len(values) == 1:
        return Estimate(float(values[0]), units=1)
    low, high = interval(resamplings(len(values), draws, seed) @ values)
    return Estimate(float(values.mean()), low, high, len(values))


def difference(first: Mapping[object, float], second: Mapping[object, float], draws: int = DRAWS,
               seed: int = 0) -> Estimate:
    """Mean of first - second over the units both have, with the interval of the paired differences."""
    return estimate({name: first[name] - second[name] for name in first if name in second}, draws, seed)


def frontier(points: np.ndarray) -> np.ndarray:
    """Points (P, 2) that no other point beats in both coordinates, from left to right."""
    best: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        while best and best[-1][1] <= point[1]:
            best.pop()
        best.append(point)
    return np.array(best)


def area(points: np.ndarray, corner: np.ndarray) -> float:
    """Area under a trade-off curve: between `corner` (2,) and the line through the undominated ones of points (P, 2).

    The first coordinate is editability, the second fidelity. Left of the first undominated point the curve is level,
    right of the last it falls straight down. Parts below or left of the corner do not count.
    """
    curve = frontier(np.maximum(points, corner)) - corner
    x, y = np.concatenate([[0.0], curve[:, 0]]), np.concatenate([curve[:1, 1], curve[:, 1]])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


@dataclass(frozen=True)
class Areas:
    """Areas of several curves as shares of the box around all their points, and differences of pairs of them.

    Attributes:
        corner, box: lower left corner and sides of that box: editability, fidelity.
        differences: area of the first name's curve minus that of the second's.
    """

    corner: tuple[float, float]
    box: tuple[float, float]
    areas: dict[str, Estimate]
    differences: dict[tuple[str, str], Estimate]


def compare_areas(curves: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], draws: int = DRAWS,
                  seed: int = 0) -> Areas:
    """Areas under trade-off curves measured on the same units, resampled together.

    Args:
        curves: per name the units' points (points, 2, units): editability and fidelity.
        pairs: which curves to compare with which.

    Raises:
        ValueError: the curves have different units or numbers of points; the latter matters because the best of more
            points is higher by chance alone.
    """
    shapes = {values.shape for values in curves.values()}
    if len(shapes) != 1 or not shapes.copy().pop()[2]:
        raise ValueError(f"curves of shapes {sorted(shapes)} cannot be compared")
    stacked = np.stack(list(curves.values()))                                       # (C, P, 2, U)
    means = stacked.mean(axis=3)                                                    # (C, P, 2)
    corner, top = means.min(axis=(0, 1)), means.max(axis=(0, 1))
    box = np.maximum(top - corner, 1e-12)
    drawn = np.einsum("cpku,du->dcpk", stacked, resamplings(stacked.shape[3], draws, seed))
    scaled = (drawn - corner) / box
    values = np.array([[area(curve, np.zeros(2)) for curve in draw] for draw in scaled])          # (draws, C)
    exact = np.array([area((curve - corner) / box, np.zeros(2)) for curve in means])              # (C,)
    names, units = list(curves), stacked.shape[3]
    areas = {name: Estimate(float(exact[i]), *interval(values[:, i]), units) for i, name in enumerate(names)}
    differences = {}
    for pair in pairs:
        i, j = map(names.index, pair)
        differences[pair] = Estimate(float(exact[i] - exact[j]), *interval(values[:, i] - values[:, j]), units)
    return Areas(tuple(map(float, corner)), tuple(map(float, box)), areas, differences)
