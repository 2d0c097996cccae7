"""AutoencoderKL: images to latents and back, and its training."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import load_state, load_weights
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError, instantiate_from_config


class Released(nn.Module):
    """Stands where a part of the autoencoder was before its memory was given back."""

    def __init__(self, reduction: int):
        super().__init__()
        self.reduction = reduction


class AutoencoderKL(pl.LightningModule):
    """A convolutional autoencoder whose latents are Gaussian (Rombach et al. 2022).

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: `target`/`params` of the training loss; `torch.nn.Identity` in files for inference.
        embed_dim: channels of the latents.
        ckpt_path: weights to start from.
        image_key: where the image (B, H, W, 3) in [-1, 1] stands in a batch.
        monitor: the quantity by which a training run keeps its best checkpoint.
    """

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], embed_dim: int,
                 ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), image_key: str = "image",
                 monitor: str | None = None):
        super().__init__()
        self.image_key, self.embed_dim, self.monitor = image_key, embed_dim, monitor
        self.learning_rate = 1e-3     # a script may set another, as CompVis's main.py does
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        z_channels = ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)     # of mean and log-variance
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        if ckpt_path is not None:
            state = load_state(ckpt_path)
            for key in list(state):
                if key.startswith(tuple(ignore_keys)):
                    del state[key]
            load_weights(self, state, ckpt_path)

    def release(self, decoder: bool) -> None:
        """Gives back the memory of the encoder and, unless `decoder` is to stay, of the decoder; for good."""
        self.encoder = Released(self.encoder.reduction)     # keeps the one number that is asked of it later
        if not decoder:
            self.decoder = Released(self.encoder.reduction)

    @property
    def format(self) -> torch.dtype:
        """The number format the weights are in; images and latents keep theirs."""
        return self.post_quant_conv.weight.dtype

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Returns the posterior over latents (B, embed_dim, H/f, W/f) of images (B, 3, H, W) in [-1, 1]."""
        moments = self.quant_conv(self.encoder(x.to(self.format)))     # (B, 2*embed_dim, H/f, W/f)
        return DiagonalGaussianDistribution(moments.to(x.dtype))

    def decode(self, z: Tensor) -> Tensor:
        """Returns images (B, 3, f*h, f*w), about [-1, 1], of latents (B, embed_dim, h, w)."""
        return self.decoder(self.post_quant_conv(z.to(self.format))).to(z.dtype)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Encodes and decodes; returns the reconstruction and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()               # (B, embed_dim, h, w)
        return self.decode(z), posterior

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Returns the batch's images as (B, 3, H, W) float32."""
        return batch[k].permute(0, 3, 1, 2).contiguous().float()

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        if isinstance(self.loss, nn.Identity):
            raise UserError("lossconfig is torch.nn.Identity: this configuration is for inference; name a loss.")
        inputs = self.get_input(batch, self.image_key)     # (B, 3, H, W)
        reconstructions, posterior = self(inputs)
        loss = self.loss(inputs, reconstructions, posterior)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
