"""The learning-rate factors that Stable Diffusion configurations name."""
from __future__ import annotations

from collections.abc import Sequence


class LambdaLinearScheduler:
    """Per cycle: rises linearly from f_start to f_max over warm_up_steps, then goes linearly to f_min.

    Each argument lists one value a cycle. Calling it with the number of steps taken gives the factor.
    """

    def __init__(self, warm_up_steps: Sequence[int], f_min: Sequence[float], f_max: Sequence[float],
                 f_start: Sequence[float], cycle_lengths: Sequence[int], verbosity_interval: int = 0):
        self.cycles = list(zip(warm_up_steps, f_min, f_max, f_start, cycle_lengths, strict=True))

    def schedule(self, n: int, **kwargs: object) -> float:
        """Returns the learning-rate factor after `n` steps."""
        cycle = 0
        while cycle < len(self.cycles) - 1 and n > self.cycles[cycle][-1]:
            n -= self.cycles[cycle][-1]
            cycle += 1
        warm_up, f_min, f_max, f_start, length = self.cycles[cycle]
        if n < warm_up:
            return f_start + (f_max - f_start) * n / warm_up
        return f_min + (f_max - f_min) * max(length - n, 0) / length

    __call__ = schedule
