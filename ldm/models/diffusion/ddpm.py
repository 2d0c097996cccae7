"""DDPM and LatentDiffusion: the objective, the conditioning, latents in and out."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoint import load_file
from ldm.models.diffusion.schedule import schedule_buffers
from ldm.modules.attention import ProjectedText
from ldm.modules.dbim import DBIMControl
from ldm.modules.diffusionmodules.openaimodel import StepShifts
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.recognize import load_checkpoint
from ldm.util import UserError, instantiate_from_config

Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Any]


class DiffusionWrapper(pl.LightningModule):
    """Hands the conditioning to the network in the way `conditioning_key` says."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in (None, "concat", "crossattn", "hybrid"):
            raise UserError(f"conditioning_key '{conditioning_key}' is unknown; use crossattn, concat or hybrid.")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(self, x: Tensor, t: Tensor | StepShifts, c_concat: Sequence[Tensor] | None = None,
                c_crossattn: Sequence[Tensor | ProjectedText] | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Predicts noise for latents `x` (B, C, H, W) at `t` (B,); lists are joined along tokens and channels."""
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)                             # (B, C + C', H, W)
        context = None
        if self.conditioning_key in ("crossattn", "hybrid"):
            context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context=context, control=control)


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
        self.linear_start, self.linear_end = linear_start, linear_end
        self.num_timesteps = int(timesteps)
        self.learning_rate = 1e-4
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        buffers = schedule_buffers(timesteps, linear_start, linear_end, beta_schedule, v_posterior)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Loads a checkpoint, complete but for keys that begin with one of `ignore_keys`."""
        load_checkpoint(self, load_file(path), path, ignore_keys)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Samples from the averaged weights inside the block, where an average is kept."""
        if self.use_ema:
            self.model_ema.store(self.model.parameters())
            self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            if self.use_ema:
                self.model_ema.restore(self.model.parameters())

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noises `x_start` (B, ...) to time steps `t` (B,): alpha_t x_0 + sigma_t eps (paper Eq 1)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return alpha * x_start + sigma * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns the x_0 that `noise` implies for `x_t`."""
        return (extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
                - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise)

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Returns the elementwise or mean error of the configured type."""
        error = (F.mse_loss if self.loss_type == "l2" else F.l1_loss)(pred, target, reduction="none")
        return error.mean() if mean else error

    def on_train_batch_end(self, *args: object) -> None:
        if self.use_ema:
            self.model_ema(self.model)


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
        super().__init__(conditioning_key=conditioning_key, **ddpm)
        self.scale_factor, self.cond_stage_key = scale_factor, cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config).requires_grad_(cond_stage_trainable)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def get_learned_conditioning(self, c: str | Sequence[str]) -> Tensor:
        """Encodes prompts into text features (B, T, D)."""
        return self.cond_stage_model.encode(c)

    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Returns the posterior over latents of pictures (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Samples a posterior and scales the sample to the diffusion model's latents (B, C, h, w)."""
        z = encoder_posterior
        if isinstance(z, DiagonalGaussianDistribution):
            z = z.sample()
        return self.scale_factor * z

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Turns the diffusion model's latents (B, C, h, w) into pictures (B, 3, H, W), about [-1, 1]."""
        with torch.no_grad():
            return self.first_stage_model.decode(z / self.scale_factor)

    def apply_model(self, x_noisy: Tensor, t: Tensor | StepShifts, cond: Conditioning) -> Tensor:
        """Predicts noise (B, C, h, w); `cond` is text features, a list of them, or DiffusionWrapper's keywords."""
        return self.model(x_noisy, t, **self._keywords(cond))

    def _keywords(self, cond: Conditioning) -> Mapping[str, Any]:
        if isinstance(cond, Mapping):
            return cond
        key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
        return {key: [cond] if isinstance(cond, Tensor) else cond}

    def prepare_conditioning(self, cond: Conditioning, latents: tuple[int, ...] = (),
                             aside: Callable[[], AbstractContextManager] | None = None) -> Mapping[str, Any] | None:
        """Does once what a run's conditioning asks in every step; `apply_model` takes the result in its place.

        Args:
            cond: as `apply_model` takes it, of R rows in len(latents) blocks.
            latents: which block of the latents each block of rows denoises, as in `ProjectedText`.
            aside: opens a context in which the network has other weights, for the auxiliary branch's keys and values.

        Returns:
            Keywords of `DiffusionWrapper`, or None where the conditioning is not text alone.
        """
        if self.model.conditioning_key != "crossattn":
            return None
        keywords = self._keywords(cond)
        text = torch.cat(list(keywords["c_crossattn"]), dim=1)
        projected = self.model.diffusion_model.project_text(text, latents)
        if aside is not None:
            with aside():
                projected = projected.with_auxiliary(self.model.diffusion_model.project_text(text, latents))
        return {**keywords, "c_crossattn": [projected]}

    def prepare_steps(self, timesteps: Sequence[int]) -> list[StepShifts]:
        """Embeds the time steps of a run at once; `apply_model` takes the entries as `t` for all rows."""
        return self.model.diffusion_model.time_table(torch.tensor(timesteps, device=self.device))

    def get_input(self, batch: Mapping[str, Any], k: str) -> tuple[Tensor, Tensor]:
        """Returns latents (B, C, h, w) and text features of a batch with pictures (B, H, W, 3) under `k`."""
        pictures = batch[k].permute(0, 3, 1, 2).contiguous().float()         # (B, 3, H, W)
        latents = self.get_first_stage_encoding(self.encode_first_stage(pictures))
        return latents, self.get_learned_conditioning(batch[self.cond_stage_key])

    def p_losses(self, x_start: Tensor, cond: Conditioning, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the error of the predicted noise, per value (B, C, h, w): Eq 1 in its noise form, w_t = 1."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.get_loss(self.apply_model(self.q_sample(x_start, t, noise), t, cond), noise, mean=False)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        latents, cond = self.get_input(batch, self.first_stage_key)
        t = torch.randint(0, self.num_timesteps, (len(latents),), device=self.device)
        loss = self.p_losses(latents, cond, t).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [*self.model.parameters(), *(self.cond_stage_model.parameters() if self.cond_stage_trainable else ())]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]

