"""UNetModel: the denoising network, with SD v1's key names and a seam for DBIM's control."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer, normalization, zero_module
from ldm.modules.dbim import DBIMControl, keyword
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import UserError


class TimestepEmbedSequential(nn.Sequential):
    """A sequence whose residual blocks also see the time embedding, and whose transformers see the text."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None,
                control: DBIMControl | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, **keyword(control))
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then smooths with a convolution."""

    def __init__(self, channels: int, use_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))   # (B, C, 2H, 2W)


class Downsample(nn.Module):
    """Halves height and width, by a strided convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool = True):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)                                                    # (B, C, H/2, W/2)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, channels: int, emb_channels: int, dropout: float, out_channels: int,
                 use_checkpoint: bool = False, group_channels: int | None = None):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(normalization(channels, group_channels), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(normalization(out_channels, group_channels), nn.SiLU(), nn.Dropout(dropout),
                                        zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Returns features (B, C', H, W) of features and time embedding (B, E)."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]       # (B, C', H, W)
        return self.skip_connection(x) + self.out_layers(h)                  # (B, C', H, W)


class UNetModel(nn.Module):
    """Predicts the noise in latents from their noised value, the time step and the text.

    The arguments are those of a Stable Diffusion v1 YAML file; `use_spatial_transformer` must be on.

    Args:
        image_size: side of the training latents; recorded only, any size runs.
        attention_resolutions: down-sampling factors at which transformers stand.
        num_heads, num_head_channels: give one of the two, the other -1.
        use_checkpoint: trades a second forward pass for memory in training.
        group_channels: how many channels share a group of a normalization at least; None: 32 groups, as in SD v1.
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int,
                 num_res_blocks: int, attention_resolutions: Sequence[int], dropout: float = 0.0,
                 channel_mult: Sequence[int] = (1, 2, 4, 8), conv_resample: bool = True,
                 use_checkpoint: bool = False, num_heads: int = -1, num_head_channels: int = -1,
                 use_spatial_transformer: bool = True, transformer_depth: int = 1,
                 context_dim: int | None = None, legacy: bool = False, group_channels: int | None = None):
        super().__init__()
        if not use_spatial_transformer or context_dim is None:
            raise UserError("UNetModel: use_spatial_transformer must be true and context_dim given, as in SD v1.")
        if (num_heads == -1) == (num_head_channels == -1):
            raise UserError("UNetModel: give either num_heads or num_head_channels, and leave the other at -1.")
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_res_blocks = model_channels, num_res_blocks
        self.dropout, self.use_checkpoint = dropout, use_checkpoint
        self.context_dim, self.transformer_depth = context_dim, transformer_depth
        self.num_heads, self.num_head_channels, self.group_channels = num_heads, num_head_channels, group_channels
        self.attention_resolutions = set(attention_resolutions)
        self.emb_channels = model_channels * 4     # SD's
        self.reduction = 2 ** (len(channel_mult) - 1)      # latents' sides must be multiples of this

        self.time_embed = nn.Sequential(nn.Linear(model_channels, self.emb_channels), nn.SiLU(),
                                        nn.Linear(self.emb_channels, self.emb_channels))
        skips = self._build_down(channel_mult, conv_resample)
        self._build_middle(skips[-1])
        self._build_up(channel_mult, conv_resample, skips)
        self.out = nn.Sequential(normalization(model_channels, group_channels), nn.SiLU(),
                                 zero_module(nn.Conv2d(model_channels, out_channels, 3, padding=1)))

    @property
    def dtype(self) -> torch.dtype:
        """The format the network computes in, that of its first convolution."""
        return self.input_blocks[0][0].weight.dtype

    def set_checkpointing(self, on: bool) -> None:
        """Makes training recompute activations instead of storing them, or not."""
        self.use_checkpoint = on
        for module in self.modules():
            if isinstance(module, ResBlock):
                module.use_checkpoint = on
            elif isinstance(module, BasicTransformerBlock):
                module.checkpoint = on

    def _res_block(self, channels: int, out_channels: int) -> ResBlock:
        return ResBlock(channels, self.emb_channels, self.dropout, out_channels, self.use_checkpoint,
                        self.group_channels)

    def _transformer(self, channels: int) -> SpatialTransformer:
        heads = self.num_heads
        if heads == -1:
            heads = channels // self.num_head_channels
        return SpatialTransformer(channels, heads, channels // heads, self.transformer_depth, self.dropout,
                                  self.context_dim, self.use_checkpoint, self.group_channels)

    def _build_down(self, channel_mult: Sequence[int], conv_resample: bool) -> list[int]:
        """Builds the contracting half and returns the channels of every skip connection."""
        channels, factor = self.model_channels, 1
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(self.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(channels, mult * self.model_channels)]
                channels = mult * self.model_channels
                if factor in self.attention_resolutions:
                    layers.append(self._transformer(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(channels, conv_resample)))
                skips.append(channels)
                factor *= 2
        return skips

    def _build_middle(self, channels: int) -> None:
        self.middle_block = TimestepEmbedSequential(self._res_block(channels, channels), self._transformer(channels),
                                                    self._res_block(channels, channels))

    def _build_up(self, channel_mult: Sequence[int], conv_resample: bool, skips: list[int]) -> None:
        """Builds the expanding half; every block also takes one skip connection."""
        self.output_blocks = nn.ModuleList()
        channels, skips = skips[-1], list(skips)
        factor = 2 ** (len(channel_mult) - 1)
        for level, mult in reversed(list(enumerate(channel_mult))):
            for position in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(channels + skips.pop(), mult * self.model_channels)]
                channels = mult * self.model_channels
                if factor in self.attention_resolutions:
                    layers.append(self._transformer(channels))
                if level > 0 and position == self.num_res_blocks:
                    layers.append(Upsample(channels, conv_resample))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Predicts noise for noised latents.

        Args:
            x: (B, C, H, W) latents, of any floating format.
            timesteps: (B,), or one for all rows: (1,).
            context: (B, T, D) text features.
            control: integrates two branches of the batch (DBIM).

        Returns:
            (B, C, H, W) in the format of `x`.
        """
        # The ablation: DBIM in the last layer alone.
        layer_control = None if control is not None and control.last_layer_only else control
        emb = timestep_embedding(timesteps, self.model_channels).to(self.dtype)                  # (B, model_channels)
        emb = self.time_embed(emb)                                                               # (B, emb_channels)
        h, skips = x.to(self.dtype), []     # (B, C, H, W)
        for block in self.input_blocks:
            h = block(h, emb, context, **keyword(layer_control))
            skips.append(h)
        h = self.middle_block(h, emb, context, **keyword(layer_control))
        for index, block in enumerate(self.output_blocks):
            last = index == len(self.output_blocks) - 1      # the last cross-attention layer stands in this block
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, context, **keyword(control if last else layer_control))
        return self.out(h).to(x.dtype)                                           # (B, C, H, W)
