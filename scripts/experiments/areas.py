"""Paired differences, and the area under a fidelity-editability curve, with bootstrap intervals."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.evaluation.statistics import DRAWS, Estimate, estimate, interval, resamplings


def difference(first: Mapping[object, float], second: Mapping[object, float], draws: int = DRAWS,
               seed: int = 0) -> Estimate:
    """Mean of first - second over the units both have, with the interval of the paired differences."""
    differences = {name: first[name] - second[name] for name in first if name in second}
    return estimate(differences, draws, seed)


def frontier(points: np.ndarray) -> np.ndarray:
    """Points (P, 2) that no other point beats in both coordinates, from left to right."""
    best: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:      # from left to right, equally far ones upwards
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
    x = np.concatenate([[0.0], curve[:, 0]])
    y = np.concatenate([curve[:1, 1], curve[:, 1]])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


@dataclass(frozen=True)
class Areas:
    """Areas of several curves as shares of the box around all their points, and differences of pairs of them.

    Attributes:
        corner, box: lower left corner and sides of that box: editability, fidelity. Each resampling has its own.
        differences: area of the first name's curve minus that of the second's.
    """

    corner: tuple[float, float]
    box: tuple[float, float]
    areas: dict[str, Estimate]
    differences: dict[tuple[str, str], Estimate]


def shares_of_box(curves: np.ndarray) -> np.ndarray:
    """Areas (C,) under curves (C, P, 2), each as a share of the box around all points of all."""
    corner, top = curves.min(axis=(0, 1)), curves.max(axis=(0, 1))
    scaled = (curves - corner) / np.maximum(top - corner, 1e-12)        # points that all agree make a box without sides
    return np.array([area(curve, np.zeros(2)) for curve in scaled])


def compare_areas(curves: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], units: Sequence[object],
                  draws: int = DRAWS, seed: int = 0) -> Areas:
    """Areas under trade-off curves measured on the same units, resampled together; one unit gives no intervals.

    Args:
        curves: per name the units' points (points, 2, units): editability and fidelity.
        pairs: which curves to compare with which.
        units: the units' names, as `resamplings` takes them.

    Raises:
        ValueError: the curves have different units or numbers of points; the latter matters because the best of more
            points is higher by chance alone.
    """
    shapes = {values.shape for values in curves.values()}
    if len(shapes) != 1 or not units or next(iter(shapes))[2] != len(units):
        raise ValueError(f"curves of shapes {sorted(shapes)} cannot be compared")
    stacked = np.stack(list(curves.values()))                                       # (C, P, 2, U)
    means = stacked.mean(axis=3)                                                    # (C, P, 2)
    corner, top = means.min(axis=(0, 1)), means.max(axis=(0, 1))
    resampled = np.einsum("cpku,du->dcpk", stacked, resamplings(units, draws, seed))
    values = np.array([shares_of_box(draw) for draw in resampled])                  # (draws, C)
    exact = dict(zip(curves, shares_of_box(means), strict=True))
    drawn = dict(zip(curves, values.T, strict=True))

    def about(value: float, resampled_values: np.ndarray) -> Estimate:
        if len(units) == 1:
            return Estimate(float(value), units=1)
        return Estimate(float(value), *interval(resampled_values), len(units))

    areas = {name: about(exact[name], drawn[name]) for name in curves}
    differences = {}
    for first, second in pairs:
        # Both curves come from the same resampling, so that what their units share cancels.
        differences[first, second] = about(exact[first] - exact[second], drawn[first] - drawn[second])
    return Areas(tuple(corner.tolist()), tuple((top - corner).tolist()), areas, differences)
