"""Noise schedules and time-step lists: pure functions."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.util import UserError


def schedule_buffers(timesteps: int = 1000, linear_start: float = 0.00085, linear_end: float = 0.0120,
                     beta_schedule: str = "linear", v_posterior: float = 0.0,
                     given_betas: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Computes the twelve schedule buffers of a Stable Diffusion checkpoint, each (T,) float32.

    `v_posterior` mixes the posterior's lower variance bound (0) with its upper bound beta (1). `given_betas` take the
    place of the schedule described by the arguments before.
    """
    if given_betas is None:
        betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end)     # (T,)
    else:
        betas = np.asarray(given_betas, dtype=np.float64)                              # (T,)
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)                                                       # alpha-bar
    previous = np.append(1.0, cumprod[:-1])
    variance = (1 - v_posterior) * betas * (1 - previous) / (1 - cumprod) + v_posterior * betas
    values = {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumprod - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - cumprod),
    }
    # On the CPU also where a model is built on the meta device, whose weights come from a file: these do not.
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}


def ddim_timesteps(steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Returns exactly `steps` increasing time steps.

    Where `steps` divides `num_timesteps` they are Stable Diffusion's: 1, 1 + stride, ... For other numbers SD's list
    has more steps than asked, or leaves the schedule; here the stride is a fraction and each step is rounded down.

    Raises:
        UserError: `steps` is outside 1..num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"the number of sampling steps is {steps}; give one between 1 and {num_timesteps}.")
    spaced = np.arange(steps) * num_timesteps // steps                  # 0, T/S, 2T/S, ... all < T
    return spaced + 1 if steps < num_timesteps else spaced


def ddim_parameters(alphas_cumprod: np.ndarray, timesteps: np.ndarray,
                    eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (sigmas, alphas, previous alphas), each (S,), of DDIM (Song et al. 2021, Eq 16).

    Raises:
        UserError: `eta` is outside 0..1, where the step's variance would exceed what there is.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; give a number between 0 (deterministic) and 1 (DDPM's noise).")
    alphas = alphas_cumprod[timesteps]
    previous = np.concatenate([alphas_cumprod[:1], alphas_cumprod[timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
    return sigmas, alphas, previous
