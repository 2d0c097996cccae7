"""Encoder and Decoder of the autoencoder, with SD v1's key names."""
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import normalization

EPS = 1e-6      # of the autoencoder's normalizations


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))     # (B, C, 2H, 2W)


class Downsample(nn.Module):
    """Halves height and width; the convolution is padded on the right and below only."""

    def __init__(self, channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                 # (B, C, H/2, W/2)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual around them."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, group_channels: int | None = None):
        super().__init__()
        self.norm1 = normalization(in_channels, group_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, group_channels, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                    # (B, C', H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))                      # (B, C', H, W)
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int, group_channels: int | None = None):
        super().__init__()
        self.norm = normalization(channels, group_channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                              # (B, 1, N, C)
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])                 # (B, C, H, W)
        return x + self.proj_out(h)


class Mid(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int, dropout: float, group_channels: int | None = None):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, group_channels)
        self.attn_1 = AttnBlock(channels, group_channels)
        self.block_2 = ResnetBlock(channels, channels, dropout, group_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResolutionLevel(nn.Module):
    """One resolution: blocks, attention after each where asked, and the change of resolution, if any."""

    def __init__(self, blocks: list[nn.Module], attn: list[nn.Module], resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attn)
        self.resample_name = None
        if resample:
            self.resample_name = resample[0]
            self.add_module(*resample)                                           # "downsample" or "upsample"

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if self.resample_name is None:
            return x
        return self.get_submodule(self.resample_name)(x)


class Encoder(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] → moments of the latents (B, 2*z_channels, H/f, W/f).

    Args are those of `ddconfig` in a Stable Diffusion v1 YAML file; `out_ch` belongs to the decoder. `group_channels`
    is how many channels share a group of a normalization at least (normalized alone, a channel would lose its mean, and
    with it the colors); None is SD's 32 groups at any width.
    """

    def __init__(self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
                 attn_resolutions: Sequence[int], dropout: float = 0.0, resamp_with_conv: bool = True,
                 in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
                 group_channels: int | None = None):
        super().__init__()
        self.reduction = 2 ** (len(ch_mult) - 1)                                 # images are this much larger
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for level, mult in enumerate(ch_mult):
            blocks, attn = [], []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, group_channels))
                channels = ch * mult
                if resolution in attn_resolutions:
                    attn.append(AttnBlock(channels, group_channels))
            resample = None
            if level < len(ch_mult) - 1:
                resample = ("downsample", Downsample(channels, resamp_with_conv))
                resolution //= 2
            self.down.append(ResolutionLevel(blocks, attn, resample))
        self.mid = Mid(channels, dropout, group_channels)
        self.norm_out = normalization(channels, group_channels, EPS)
        moments = 2 * z_channels if double_z else z_channels           # mean and log-variance
        self.conv_out = nn.Conv2d(channels, moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))                           # (B, 2z, H/f, W/f)


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) → image (B, out_ch, f*h, f*w), about [-1, 1]; args as in `Encoder`."""

    def __init__(self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
                 attn_resolutions: Sequence[int], dropout: float = 0.0, resamp_with_conv: bool = True,
                 in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
                 group_channels: int | None = None):
        super().__init__()
        channels = ch * ch_mult[-1]
        resolution = resolution // 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = Mid(channels, dropout, group_channels)
        levels: list[ResolutionLevel] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks, attn = [], []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, ch * mult, dropout, group_channels))
                channels = ch * mult
                if resolution in attn_resolutions:
                    attn.append(AttnBlock(channels, group_channels))
            resample = None
            if level > 0:
                resample = ("upsample", Upsample(channels, resamp_with_conv))
            levels.insert(0, ResolutionLevel(blocks, attn, resample))
            resolution *= 2
        self.up = nn.ModuleList(levels)                                          # index 0 is the finest
        self.norm_out = normalization(channels, group_channels, EPS)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))                           # (B, out_ch, f*h, f*w)
