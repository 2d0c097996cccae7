"""DDPM and LatentDiffusion: the objective, the conditioning, latents in and out."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import SCHEDULE_BUFFERS, load_file
from ldm.models.diffusion.guidance import Conditioning
from ldm.models.diffusion.schedule import schedule_buffers
from ldm.modules.attention import GROUPS
from ldm.modules.dbim import DBIMControl, keyword
from ldm.modules.diffusionmodules.util import extract_into_tensor, noise_like
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.progress import progress
from ldm.recognize import load_checkpoint
from ldm.util import UserError, get_obj_from_str, instantiate_from_config


class DiffusionWrapper(pl.LightningModule):
    """Hands the conditioning to the network in the way `conditioning_key` says."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in (None, "concat", "crossattn", "hybrid"):
            raise UserError(f"conditioning_key '{conditioning_key}' is unknown; use crossattn, concat or hybrid.")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] | None = None,
                c_crossattn: Sequence[Tensor] | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Predicts noise for latents `x` (B, C, H, W) at `t` (B,); lists are joined along tokens and channels."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)                             # (B, C + C', H, W)
        context = None
        if self.conditioning_key in ("crossattn", "hybrid"):
            context = torch.cat(list(c_crossattn), dim=1)                    # (B, T, D)
        return self.diffusion_model(x, t, context=context, **keyword(control))


def forgive_schedule(module: nn.Module, keys: Any) -> None:
    """Takes the schedule off a load's missing keys: it comes from the configuration, and not every file has it."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in SCHEDULE_BUFFERS]


class DDPM(pl.LightningModule):
    """Gaussian diffusion over whatever `model` predicts noise for (Ho et al. 2020).

    The arguments are those of CompVis's YAML files. `parameterization` must be "eps", Stable Diffusion v1's.
    """

    def __init__(self, unet_config: Mapping[str, Any], timesteps: int = 1000, beta_schedule: str = "linear",
                 loss_type: str = "l2", ckpt_path: str | None = None, ignore_keys: Sequence[str] = (),
                 monitor: str = "val/loss", use_ema: bool = True, first_stage_key: str = "image",
                 image_size: int = 256, channels: int = 3, log_every_t: int = 100, linear_start: float = 1e-4,
                 linear_end: float = 2e-2, v_posterior: float = 0.0, conditioning_key: str | None = None,
                 parameterization: str = "eps", scheduler_config: Mapping[str, Any] | None = None):
        super().__init__()
        if parameterization != "eps":
            raise UserError(f"parameterization '{parameterization}' is not Stable Diffusion v1's; use 'eps'.")
        if loss_type not in ("l1", "l2"):
            raise UserError(f"loss_type '{loss_type}' is unknown; use 'l2' or 'l1'.")
        self.parameterization, self.loss_type, self.monitor = parameterization, loss_type, monitor
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.v_posterior, self.scheduler_config = log_every_t, v_posterior, scheduler_config
        self.learning_rate = 1e-4
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.register_schedule(None, beta_schedule, timesteps, linear_start, linear_end)
        self.register_load_state_dict_post_hook(forgive_schedule)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def register_schedule(self, given_betas: Sequence[float] | None = None, beta_schedule: str = "linear",
                          timesteps: int = 1000, linear_start: float = 1e-4, linear_end: float = 2e-2) -> None:
        """Computes the schedule's buffers, each (T,), from the betas that are given or a named schedule's."""
        self.linear_start, self.linear_end = linear_start, linear_end
        buffers = schedule_buffers(timesteps, linear_start, linear_end, beta_schedule, self.v_posterior, given_betas)
        self.num_timesteps = len(buffers["betas"])
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Loads a checkpoint, complete but for keys that begin with one of `ignore_keys`."""
        load_checkpoint(self, load_file(path), path, ignore_keys)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Samples from the averaged weights inside the block, where an average is kept."""
        if self.use_ema:
            self.model_ema.store(self.model.parameters())     # the trained ones come back afterwards
            self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            if self.use_ema:
                self.model_ema.restore(self.model.parameters())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noises `x_start` (B, ...) to time steps `t` (B,): alpha_t x_0 + sigma_t eps (paper Eq 1)."""
        if noise is None:
            noise = torch.randn_like(x_start)
        alpha = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)     # (B, 1, 1, 1)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)     # (B, 1, 1, 1)
        return alpha * x_start + sigma * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns the x_0 that `noise` implies for `x_t`."""
        return (extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
                - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and log-variance of x_{t-1} given x_0 and x_t (Ho et al. 2020, Eq 7)."""
        mean = (extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
                + extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t)
        return (mean, extract_into_tensor(self.posterior_variance, t, x_t.shape),
                extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape))

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Returns the elementwise or mean error of the configured type."""
        distance = F.mse_loss if self.loss_type == "l2" else F.l1_loss
        error = distance(pred, target, reduction="none")
        return error.mean() if mean else error

    def on_train_batch_end(self, *args: object) -> None:
        if self.use_ema:
            self.model_ema(self.model)


def earlier_groups(unet: Mapping[str, Any], first_stage: Mapping[str, Any]) -> tuple[Mapping, Mapping]:
    """Completes the nodes of a small model from before `group_channels` was a key; others come back as they are.

    Such a file is told by an autoencoder whose width 32 groups do not divide: no other code could build it.
    """
    params = first_stage.get("params") or {}
    ddconfig = params.get("ddconfig") or {}
    if "group_channels" in ddconfig or ddconfig.get("ch", GROUPS) % GROUPS == 0:
        return unet, first_stage
    ddconfig = {"group_channels": 4, **ddconfig}     # what such files were trained with
    return ({**unet, "params": {"group_channels": 8, **unet["params"]}},
            {**first_stage, "params": {**params, "ddconfig": ddconfig}})


class LatentDiffusion(DDPM):
    """Diffusion in an autoencoder's latents, conditioned on text (Rombach et al. 2022).

    Args:
        first_stage_config: the autoencoder's `target`/`params`; it is frozen.
        cond_stage_config: the text encoder's.
        num_timesteps_cond: CompVis's number of noise levels of the conditioning; only 1 exists here.
        scale_factor: multiplies latents so that they have about unit variance.
        cond_stage_key: where the caption stands in a batch.
        cond_stage_trainable: trains the text encoder too.
        scale_by_std: CompVis's option to measure `scale_factor` on the first batch; must be off.
    """

    def __init__(self, first_stage_config: Mapping[str, Any], cond_stage_config: Mapping[str, Any],
                 num_timesteps_cond: int = 1, cond_stage_key: str = "image", cond_stage_trainable: bool = False,
                 conditioning_key: str | None = "crossattn", scale_factor: float = 1.0, scale_by_std: bool = False,
                 **ddpm: Any):
        if num_timesteps_cond != 1 or scale_by_std:
            raise UserError("num_timesteps_cond must be 1 and scale_by_std false, as in Stable Diffusion v1.")
        ckpt_path, ignore_keys = ddpm.pop("ckpt_path", None), ddpm.pop("ignore_keys", ())
        ddpm["unet_config"], first_stage_config = earlier_groups(ddpm["unet_config"], first_stage_config)
        super().__init__(conditioning_key=conditioning_key, **ddpm)
        self.scale_factor, self.cond_stage_key = scale_factor, cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.clip_denoised = False     # latents are not bounded as pixels are
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Builds the autoencoder, frozen."""
        self.first_stage_model = instantiate_from_config(config).eval().requires_grad_(False)

    def instantiate_cond_stage(self, config: Mapping[str, Any]) -> None:
        """Builds the text encoder."""
        self.cond_stage_model = instantiate_from_config(config).requires_grad_(self.cond_stage_trainable)

    def get_learned_conditioning(self, c: str | Sequence[str]) -> Tensor:
        """Encodes prompts into text features (B, T, D)."""
        return self.cond_stage_model.encode(c)

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Returns the posterior over latents of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Samples a posterior and scales the sample to the diffusion model's latents (B, C, h, w)."""
        z = encoder_posterior
        if isinstance(z, DiagonalGaussianDistribution):
            z = z.sample()
        return self.scale_factor * z     # to about unit variance

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Turns the diffusion model's latents (B, C, h, w) into images (B, 3, H, W), about [-1, 1]."""
        with torch.no_grad():
            return self.differentiable_decode_first_stage(z)

    def differentiable_decode_first_stage(self, z: Tensor) -> Tensor:
        """Decodes as `decode_first_stage` does, with gradients."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Predicts noise (B, C, h, w); `cond` is text features, a list of them, or DiffusionWrapper's keywords."""
        return self.model(x_noisy, t, **self._keywords(cond))

    def _keywords(self, cond: Conditioning) -> Mapping[str, Any]:
        if isinstance(cond, Mapping):
            return cond
        parts = [cond] if isinstance(cond, Tensor) else cond
        if self.model.conditioning_key == "concat":
            return {"c_concat": parts}
        return {"c_crossattn": parts}

    def get_input(self, batch: Mapping[str, Any], k: str) -> tuple[Tensor, Tensor]:
        """Returns latents (B, C, h, w) and text features of a batch with images (B, H, W, 3) under `k`."""
        images = batch[k].permute(0, 3, 1, 2).contiguous().float()         # (B, 3, H, W)
        latents = self.get_first_stage_encoding(self.encode_first_stage(images))     # (B, C, h, w)
        return latents, self.get_learned_conditioning(batch[self.cond_stage_key])

    def p_losses(self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the error of the predicted noise, per value (B, C, h, w): Eq 1 in its noise form, w_t = 1."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return self.get_loss(self.apply_model(self.q_sample(x_start, t, noise), t, cond), noise, mean=False)

    def p_mean_variance(self, x: Tensor, c: Conditioning, t: Tensor,
                        clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and log-variance of x_{t-1} that the network predicts from `x` at `t` (B,)."""
        x_start = self.predict_start_from_noise(x, t, self.apply_model(x, t, c))             # (B, C, h, w)
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return self.q_posterior(x_start, x, t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, c: Conditioning, t: Tensor, clip_denoised: bool = False, repeat_noise: bool = False,
                 temperature: float = 1.0) -> Tensor:
        """Draws x_{t-1} (B, C, h, w) from the network's prediction at `t` (B,); at t = 0 it is the mean."""
        mean, _, log_variance = self.p_mean_variance(x, c, t, clip_denoised)     # (B, C, h, w), and per row
        noise = temperature * noise_like(x.shape, x.device, repeat_noise)
        return mean + (t > 0).reshape(-1, 1, 1, 1) * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(self, cond: Conditioning, shape: Sequence[int], return_intermediates: bool = False,
                      x_T: Tensor | None = None, verbose: bool = True,
                      callback: Callable[[int], Any] | None = None, timesteps: int | None = None) -> Any:
        """Samples latents of `shape` (B, C, h, w) by DDPM's every step, from time step `timesteps` - 1 on.

        Returns:
            The latents, and with `return_intermediates` a list of those at every `log_every_t`-th time step.
        """
        x = torch.randn(*shape, device=self.device) if x_T is None else x_T
        states = [x]
        last = (timesteps or self.num_timesteps) - 1
        for step in progress(range(last, -1, -1), desc="DDPM", unit="step", quiet=not verbose):
            x = self.p_sample(x, cond, torch.full((len(x),), step, device=self.device), self.clip_denoised)
            if step % self.log_every_t == 0:
                states.append(x)
            if callback:
                callback(step)
        return (x, states) if return_intermediates else x

    def sample(self, cond: Conditioning, batch_size: int = 16, return_intermediates: bool = False,
               x_T: Tensor | None = None, verbose: bool = True, timesteps: int | None = None,
               shape: Sequence[int] | None = None) -> Any:
        """Samples as `p_sample_loop` does, latents of the model's own size unless `shape` (B, C, h, w) is given."""
        if shape is None:
            shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(cond, shape, return_intermediates, x_T, verbose, timesteps=timesteps)

    def sample_log(self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int, **options: Any) -> Any:
        """Samples latents (B, C, h, w) with DDIM or DDPM and returns them and what lay between."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **options)
        shape = (self.channels, self.image_size, self.image_size)
        # Samplers know models, not the other way round.
        sampler = get_obj_from_str("ldm.models.diffusion.ddim.DDIMSampler")(self)
        return sampler.sample(ddim_steps, batch_size, shape, cond, verbose=False, **options)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns a batch's loss at random time steps, and what to log of it."""
        latents, cond = self.get_input(batch, self.first_stage_key)
        t = torch.randint(0, self.num_timesteps, (len(latents),), device=self.device)     # (B,)
        loss = self.p_losses(latents, cond, t).mean()     # every pixel of every row alike
        return loss, {"train/loss": loss}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, values = self.shared_step(batch)
        self.log_dict(values, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        trained = list(self.model.parameters())
        if self.cond_stage_trainable:
            trained += self.cond_stage_model.parameters()
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config)     # ldm.lr_scheduler's
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]
