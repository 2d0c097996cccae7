"""Bootstrap intervals over concepts and prompts."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, LEVEL = 2000, 0.95     # resamplings; of the intervals


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval; the bounds are None where there is only one unit to resample."""

    mean: float
    low: float | None = None
    high: float | None = None
    units: int = 0

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def resamplings(units: Sequence[object], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Weights (draws, U) of bootstrap resamplings of named units; each draw's sum to one.

    A unit that is a tuple, a concept's prompt, counts as often as its concept times as often as its prompt was drawn:
    a concept's images share one fine-tuned model and a prompt's share its difficulty, so that drawing the pairs one
    by one would promise too much (the pigeonhole bootstrap: McCullagh 2000, Owen 2007). Others are drawn one by one.
    """
    rng = np.random.default_rng(seed)     # the same interval for the same numbers
    counts = np.ones((draws, len(units)))
    parts = [unit if isinstance(unit, tuple) else (unit,) for unit in units]
    for column in zip(*parts, strict=True):
        numbers = {name: number for number, name in enumerate(dict.fromkeys(column))}
        # (draws, names): how often each name was drawn.
        drawn = rng.multinomial(len(numbers), np.full(len(numbers), 1.0 / len(numbers)), size=draws)
        counts *= drawn[:, [numbers[name] for name in column]]
    counts = counts[counts.any(axis=1)]         # where not every concept has every prompt, a draw can miss all pairs
    return counts / counts.sum(axis=1, keepdims=True)


def interval(statistics: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of a statistic's bootstrap values (draws,)."""
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def unit_means(values: Sequence[float | None], units: Sequence[object]) -> dict[object, float]:
    """Means of the values of each unit, in order of appearance; values that are None are left out.

    Images of one prompt differ by their seed only, so that they are no independent witnesses: the unit that is
    resampled is the prompt of a concept, not the image.
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
    low, high = interval(resamplings(list(means), draws, seed) @ values)
    return Estimate(float(values.mean()), low, high, len(values))
