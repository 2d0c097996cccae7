"""DDIMSampler: the short loop of Song et al. 2021, and its use for image-to-image."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Guidance, draw_noise, make_guidance
from ldm.models.diffusion.sampler import Record, Sampler
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.progress import progress
from ldm.util import UserError


def ddim_step(x: Tensor, eps: Tensor, alpha: float, alpha_prev: float, sigma: float,
              noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step (Song et al. 2021, Eq 12): returns the previous state and the predicted x_0."""
    pred_x0 = (x - (1.0 - alpha) ** 0.5 * eps) / alpha**0.5
    direction = (1.0 - alpha_prev - sigma**2) ** 0.5 * eps
    x_prev = alpha_prev**0.5 * pred_x0 + direction
    return (x_prev if noise is None else x_prev + sigma * noise), pred_x0


class DDIMSampler(Sampler):
    """Samples with DDIM, with exactly as many steps as asked for."""

    def make_schedule(self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0,
                      verbose: bool = True) -> None:
        """Fixes the steps for `stochastic_encode` and `decode`."""
        if ddim_discretize != "uniform":
            raise ValueError(f"ddim_discretize '{ddim_discretize}' is unknown; use 'uniform'.")
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps)             # (S,)
        alphas_cumprod = self.model.alphas_cumprod.detach().cpu().double().numpy()
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev = ddim_parameters(
            alphas_cumprod, self.ddim_timesteps, ddim_eta)
        self.ddim_sqrt_one_minus_alphas = np.sqrt(1.0 - self.ddim_alphas)

    @staticmethod
    def times(steps: int, num_timesteps: int) -> Sequence[int]:
        return ddim_timesteps(steps, num_timesteps)

    def run(self, x: Tensor, guidance: Guidance, steps: int, record: Record, *, eta: float, mask: Tensor | None,
            x0: Tensor | None, temperature: float, verbose: bool) -> Tensor:
        self.make_schedule(steps, ddim_eta=eta)
        return self._loop(x, guidance, steps, record, mask, x0, temperature, verbose)

    def _loop(self, x: Tensor, guidance: Guidance, steps: int, record: Record | None, mask: Tensor | None,
              x0: Tensor | None, temperature: float, verbose: bool) -> Tensor:
        """Goes from step `steps` - 1 down to 0."""
        if mask is not None and x0 is None:
            raise UserError("a mask needs x0, the latents to keep where it is 1.")
        guidance.plan(self.ddim_timesteps[:steps])
        for index in progress(range(steps - 1, -1, -1), desc="DDIM", unit="step", quiet=not verbose):
            t, sigma = int(self.ddim_timesteps[index]), float(self.ddim_sigmas[index])
            (x,) = guidance.narrow(t, x)
            if mask is not None:
                step = torch.full((len(x0),), t, device=x.device)
                known = self.model.q_sample(x0, step, draw_noise(x0, guidance.generators))
                x = torch.cat([known * mask + part * (1.0 - mask) for part in x.split(len(x0))])
            eps = guidance.eps(x, t)                                                              # (rows, C, h, w)
            noise = temperature * guidance.noise(x) if sigma > 0 else None
            x, pred_x0 = ddim_step(x, eps, float(self.ddim_alphas[index]), float(self.ddim_alphas_prev[index]),
                                   sigma, noise)
            if record is not None:
                record.step(steps - index - 1, x, pred_x0)
        return x

    @torch.no_grad()
    def stochastic_encode(self, x0: Tensor, t: Tensor, use_original_steps: bool = False,
                          noise: Tensor | None = None) -> Tensor:
        """Noises latents `x0` (B, C, h, w) to step indices `t` (B,) of the schedule made before (image-to-image)."""
        alphas = self.model.alphas_cumprod if use_original_steps else \
            torch.as_tensor(self.ddim_alphas, dtype=torch.float32, device=x0.device)
        alpha = extract_into_tensor(alphas, t, x0.shape)
        noise = torch.randn_like(x0) if noise is None else noise
        return alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise

    @torch.no_grad()
    def decode(self, x_latent: Tensor, cond: Any, t_start: int, unconditional_guidance_scale: float = 1.0,
               unconditional_conditioning: Any = None, use_original_steps: bool = False) -> Tensor:
        """Denoises latents from step index `t_start` of the schedule made before (image-to-image)."""
        if use_original_steps:
            self.make_schedule(self.ddpm_num_timesteps)
        guidance = make_guidance(self.model, cond, unconditional_conditioning, unconditional_guidance_scale, None, None)
        return self._loop(x_latent, guidance, t_start, None, None, None, 1.0, True)
