"""DDIMSampler: the short loop of Song et al. 2021, its inverse, and its use for image-to-image."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint import SCHEDULE_BUFFERS
from ldm.models.diffusion.guidance import Guidance, draw_noise
from ldm.models.diffusion.sampler import Sampler, SamplingRecord, StepOptions, refuse_set
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps
from ldm.modules.diffusionmodules.util import extract_into_tensor, noise_like
from ldm.progress import progress
from ldm.util import UserError


def ddim_step(x: Tensor, eps: Tensor, alpha: float, alpha_prev: float, sigma: float,
              noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step (Song et al. 2021, Eq 12): returns the previous state and the predicted x_0."""
    pred_x0 = (x - (1.0 - alpha) ** 0.5 * eps) / alpha**0.5
    direction = (1.0 - alpha_prev - sigma**2) ** 0.5 * eps     # points to x_t
    x_prev = alpha_prev**0.5 * pred_x0 + direction
    if noise is not None:
        x_prev = x_prev + sigma * noise
    return x_prev, pred_x0


class DDIMSampler(Sampler):
    """Samples with DDIM, with exactly as many steps as asked for."""

    def make_schedule(self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0,
                      verbose: bool = True) -> None:
        """Fixes the steps for everything that goes by the index of one; shows the model's schedule under its names."""
        if ddim_discretize != "uniform":
            raise ValueError(f"ddim_discretize '{ddim_discretize}' is unknown; use 'uniform'.")
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps)             # (S,)
        alphas_cumprod = self.model.alphas_cumprod.detach().cpu().double().numpy()
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev = ddim_parameters(
            alphas_cumprod, self.ddim_timesteps, ddim_eta)
        self.ddim_sqrt_one_minus_alphas = np.sqrt(1.0 - self.ddim_alphas)
        self.ddim_eta = ddim_eta
        self.ddim_sigmas_for_original_num_steps, *_ = ddim_parameters(
            alphas_cumprod, np.arange(self.ddpm_num_timesteps), ddim_eta)                         # (T,)
        for name in SCHEDULE_BUFFERS:
            setattr(self, name, getattr(self.model, name, None))

    @staticmethod
    def times(steps: int, num_timesteps: int) -> Sequence[int]:
        return ddim_timesteps(steps, num_timesteps)

    def run(self, x: Tensor, guidance: Guidance, steps: int, record: SamplingRecord, options: StepOptions) -> Tensor:
        self.make_schedule(steps, ddim_eta=options.eta)
        return self._loop(x, guidance, steps, record, options)

    def _loop(self, x: Tensor, guidance: Guidance, steps: int, record: SamplingRecord, options: StepOptions) -> Tensor:
        """Goes from step `steps` - 1 down to 0."""
        indices = range(steps - 1, -1, -1)[: options.stop_after]
        for index in progress(indices, desc="DDIM", unit="step", quiet=not options.verbose):
            t = int(self.ddim_timesteps[index])
            (x,) = guidance.end_joint_phase(t, x)     # DCI: the auxiliary branch leaves at t/T <= 1 - T_a
            x = self._keep(x, t, guidance, options)
            x, pred_x0 = self._step(x, guidance.eps(x, t), index, guidance.noise, options)        # (rows, C, h, w)
            record.step(steps - index - 1, x, pred_x0)
        return x

    def _keep(self, x: Tensor, t: int, guidance: Guidance, options: StepOptions) -> Tensor:
        """Puts `x0`, noised to time step `t`, where the mask is 1 in every branch of state `x`."""
        if options.mask is None:
            return x
        step = torch.full((len(options.x0),), t, device=x.device)
        # What the mask keeps, as noisy as the state.
        known = self.model.q_sample(options.x0, step, draw_noise(options.x0, guidance.generators))
        return torch.cat([known * options.mask + part * (1.0 - options.mask) for part in x.split(len(options.x0))])

    def _step(self, x: Tensor, eps: Tensor, index: int, draw: Callable[[Tensor], Tensor],
              options: StepOptions) -> tuple[Tensor, Tensor]:
        """Takes the step of an index of the schedule; `draw` draws the noise it adds, if any."""
        sigma, noise = float(self.ddim_sigmas[index]), None
        if sigma > 0:
            noise = options.temperature * draw(x)     # not drawn at sigma 0, so that seeds do not shift
            if options.noise_dropout > 0:
                noise = F.dropout(noise, options.noise_dropout)
        return ddim_step(x, eps, float(self.ddim_alphas[index]), float(self.ddim_alphas_prev[index]), sigma, noise)

    @torch.no_grad()
    def p_sample_ddim(self, x: Tensor, c: Any, t: Tensor, index: int, repeat_noise: bool = False,
                      use_original_steps: bool = False, quantize_denoised: bool = False, temperature: float = 1.0,
                      noise_dropout: float = 0.0, score_corrector: None = None, corrector_kwargs: None = None,
                      unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Any = None,
                      dynamic_threshold: None = None) -> tuple[Tensor, Tensor]:
        """Takes one step from latents `x` (B, C, h, w) at time steps `t` (B,), all alike; returns x and pred_x0.

        `index` is the step's in the schedule made before; `repeat_noise` adds the same noise to all rows.
        """
        refuse_set(use_original_steps=use_original_steps, quantize_denoised=quantize_denoised,
                   score_corrector=score_corrector, corrector_kwargs=corrector_kwargs,
                   dynamic_threshold=dynamic_threshold)
        guidance = Guidance(self.model, c, unconditional_conditioning, unconditional_guidance_scale)
        return self._step(x, guidance.eps(x, t[0].item()), index,
                          lambda x: noise_like(x.shape, x.device, repeat_noise),
                          StepOptions(temperature=temperature, noise_dropout=noise_dropout))

    def ddim_sampling(self, cond: Any, shape: Sequence[int], x_T: Tensor | None = None,
                      ddim_use_original_steps: bool = False, callback: Callable[[int], Any] | None = None,
                      timesteps: None = None, quantize_denoised: bool = False, mask: Tensor | None = None,
                      x0: Tensor | None = None, img_callback: Callable[[Tensor, int], Any] | None = None,
                      log_every_t: int = 100, **options: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Samples latents of `shape` (B, C, h, w) by the schedule made before; `options` are those of `sample`."""
        refuse_set(ddim_use_original_steps=ddim_use_original_steps, timesteps=timesteps,
                   quantize_denoised=quantize_denoised)
        return self.sample(len(self.ddim_timesteps), shape[0], shape[1:], cond, callback, img_callback=img_callback,
                           eta=self.ddim_eta, mask=mask, x0=x0, x_T=x_T, log_every_t=log_every_t, **options)

    @torch.no_grad()
    def encode(self, x0: Tensor, c: Any, t_enc: int, use_original_steps: bool = False,
               return_intermediates: int | None = None, unconditional_guidance_scale: float = 1.0,
               unconditional_conditioning: Any = None,
               callback: Callable[[int], Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Inverts DDIM: takes latents `x0` (B, C, h, w) up `t_enc` steps of the schedule made before.

        Returns:
            What `decode` takes back to `x0`, and a record: `x_encoded`, the same; `intermediate_steps`, and with
            `return_intermediates` the `intermediates` at them, about so many.

        Raises:
            UserError: the schedule has fewer steps.
        """
        if use_original_steps:
            self.make_schedule(self.ddpm_num_timesteps)
        if not 1 <= t_enc <= len(self.ddim_timesteps):
            raise UserError(f"t_enc is {t_enc}; give 1 to {len(self.ddim_timesteps)}, the steps of the schedule.")
        guidance = Guidance(self.model, c, unconditional_conditioning, unconditional_guidance_scale)
        x, steps, states = x0, [], []
        for index in progress(range(t_enc), desc="encoding", unit="step"):
            eps = guidance.eps(x, int(self.ddim_timesteps[index]))                                # (B, C, h, w)
            x, _ = ddim_step(x, eps, float(self.ddim_alphas_prev[index]), float(self.ddim_alphas[index]), 0.0, None)
            if return_intermediates and (index >= t_enc - 2 or index % max(1, t_enc // return_intermediates) == 0):
                steps.append(index)
                states.append(x)
            if callback:
                callback(index)
        found = {"x_encoded": x, "intermediate_steps": steps}
        if return_intermediates:
            found["intermediates"] = states
        return x, found

    @torch.no_grad()
    def stochastic_encode(self, x0: Tensor, t: Tensor, use_original_steps: bool = False,
                          noise: Tensor | None = None) -> Tensor:
        """Noises latents `x0` (B, C, h, w) to step indices `t` (B,) of the schedule made before (image-to-image)."""
        alphas = self.model.alphas_cumprod
        if not use_original_steps:
            alphas = torch.as_tensor(self.ddim_alphas, dtype=torch.float32, device=x0.device)
        alpha = extract_into_tensor(alphas, t, x0.shape)     # (B, 1, 1, 1)
        if noise is None:
            noise = torch.randn_like(x0)
        return alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise

    @torch.no_grad()
    def decode(self, x_latent: Tensor, cond: Any, t_start: int, unconditional_guidance_scale: float = 1.0,
               unconditional_conditioning: Any = None, use_original_steps: bool = False,
               callback: Callable[[int], Any] | None = None) -> Tensor:
        """Denoises latents from step index `t_start` of the schedule made before (image-to-image)."""
        if use_original_steps:
            self.make_schedule(self.ddpm_num_timesteps)
        guidance = Guidance(self.model, cond, unconditional_conditioning, unconditional_guidance_scale)
        # No callbacks but the steps'.
        record = SamplingRecord(x_latent, len(x_latent), t_start, t_start, callback, None)
        return self._loop(x_latent, guidance, t_start, record, StepOptions())
