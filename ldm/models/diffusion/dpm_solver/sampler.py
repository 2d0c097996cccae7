"""DPMSolverSampler: DPM-Solver++(2M), the multistep solver of Lu et al. 2022, and its formulas."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.sampler import Sampler, SamplingRecord, StepOptions
from ldm.progress import progress
from ldm.util import UserError

FEW_STEPS = 15      # below it the last step is of first order, which is stabler (Lu et al.'s lower_order_final)


class NoiseLevel(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps; lam = log(alpha / sigma) is half the log signal-to-noise ratio."""

    alpha: float
    sigma: float
    lam: float


def noise_level(alpha_cumprod: float) -> NoiseLevel:
    """Returns the noise level of a value of alpha-bar."""
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod)
    return NoiseLevel(alpha, sigma, math.log(alpha / sigma))


def dpm_timesteps(steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Returns the `steps` + 1 decreasing time steps T-1 ... 0 between which the steps go, evenly spaced: (S + 1,).

    They fall between the network's, as CompVis's do: for 10 steps 999, 899.1, 799.2, ...

    Raises:
        UserError: `steps` is outside 1..num_timesteps - 1, which is all the steps there are between T-1 and 0.
    """
    if not 1 <= steps < num_timesteps:
        raise UserError(f"DPM-Solver++ cannot take {steps} sampling steps; give 1 to {num_timesteps - 1}.")
    return np.linspace(num_timesteps - 1, 0, steps + 1)


def alphas_between(alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Returns alpha-bar at time steps of which some lie between two; its logarithm is linear there, as in CompVis."""
    return np.exp(np.interp(timesteps, np.arange(len(alphas_cumprod)), np.log(alphas_cumprod)))


def extrapolate(x0: Tensor, x0_before: Tensor, h: float, h_before: float) -> Tensor:
    """Extrapolates two data predictions to second order: D of Algorithm 2, from steps of lam `h_before` and `h`."""
    r = h_before / h
    return (1.0 + 1.0 / (2.0 * r)) * x0 - 1.0 / (2.0 * r) * x0_before


def dpm_step(x: Tensor, data: Tensor, source: NoiseLevel, target: NoiseLevel) -> Tensor:
    """Solves the diffusion ODE for constant `data` from `source` to `target` (Lu et al. 2022, Proposition 4.1)."""
    h = target.lam - source.lam
    return target.sigma / source.sigma * x - target.alpha * math.expm1(-h) * data


class DPMSolverSampler(Sampler):
    """Samples with DPM-Solver++(2M); it adds no noise."""

    @staticmethod
    def times(steps: int, num_timesteps: int) -> Sequence[float]:
        return dpm_timesteps(steps, num_timesteps)[:-1]

    def run(self, x: Tensor, guidance: Guidance, steps: int, record: SamplingRecord, options: StepOptions) -> Tensor:
        if options.eta != 0.0 or options.mask is not None or options.x0 is not None:
            raise UserError("DPM-Solver++ takes no eta but 0, no mask and no x0; sample with DDIM, which does.")
        timesteps = dpm_timesteps(steps, self.ddpm_num_timesteps)
        alphas_cumprod = self.model.alphas_cumprod.detach().cpu().double().numpy()
        levels = [noise_level(alpha) for alpha in alphas_between(alphas_cumprod, timesteps).tolist()]
        timesteps = timesteps.tolist()
        before: list[Tensor] = []                                        # the data prediction of the step before
        indices = range(steps)[: options.stop_after]
        for i in progress(indices, desc="DPM-Solver++", unit="step", quiet=not options.verbose):
            x, *before = guidance.end_joint_phase(timesteps[i], x, *before)
            source, target = levels[i], levels[i + 1]
            pred_x0 = (x - source.sigma * guidance.eps(x, timesteps[i])) / source.alpha     # (rows, C, h, w)
            data = pred_x0
            first_order = not before or (steps < FEW_STEPS and i == steps - 1)
            if not first_order:
                data = extrapolate(pred_x0, *before, target.lam - source.lam, source.lam - levels[i - 1].lam)
            x, before = dpm_step(x, data, source, target), [pred_x0]
            record.step(i, x, pred_x0)
        return x
