"""Attention over image features: self-attention, cross-attention with DBIM, and the transformer around them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules import dbim
from ldm.modules.dbim import DBIMControl
from ldm.util import UserError, default

GROUPS = 32     # of a normalization in Stable Diffusion, at any width


def zero_module(module: nn.Module) -> nn.Module:
    """Sets all parameters of `module` to zero, so that its block starts as the identity, and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normalization(channels: int, group_channels: int | None = None, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalization: SD's 32 groups; fewer where at least `group_channels` channels are to share one.

    Raises:
        UserError: the groups do not divide the channels.
    """
    groups = GROUPS if group_channels is None else min(GROUPS, channels // group_channels)
    if groups < 1 or channels % groups:
        raise UserError(f"normalization in {groups} groups does not divide {channels} channels; choose another width, "
                        "or set group_channels, how many share a group at least, as configs/model/tiny.yaml does.")
    return nn.GroupNorm(groups, channels, eps=eps)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of a second one (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The two-layer network after attention."""

    def __init__(self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0):
        super().__init__()
        inner = dim * mult
        entry = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(entry, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of image features to a context, or to themselves where none is given.

    `masks` is a window for observers: it passes DBIM's concept and auxiliary masks through unchanged.
    """

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64,
                 dropout: float = 0.0):
        super().__init__()
        inner_dim, context_dim = heads * dim_head, default(context_dim, query_dim)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))
        self.masks = nn.Identity()

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Projects text features (B, T, D) of any floating format to keys and values (B, H, T, d)."""
        context = context.to(self.to_k.weight.dtype)
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, y: Tensor) -> Tensor:
        return rearrange(y, "b n (h d) -> b h n d", h=self.heads)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Attends.

        Args:
            x: (B, N, C) image features.
            context: (B, T, D) text features; None attends to `x`.
            mask: (B, T) bool, False where a context position is hidden.
            control: integrates two branches of the batch (DBIM); None is plain, fused attention.
        """
        q = self._split(self.to_q(x))                                                    # (B, H, N, d)
        k, v = self.keys_values(default(context, x))                                     # (B, H, T, d)
        visible = None if mask is None else mask[:, None, None, :]                       # (B, 1, 1, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)                 # (B, H, N, d)
        if control is not None:
            out = self.integrate(out, q, k, v, control)                                  # (B, H, N, d)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))                       # (B, N, C)

    def integrate(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, control: DBIMControl) -> Tensor:
        """Applies DBIM to per-head outputs (B, H, N, d); only two branches' probabilities are ever formed."""
        probs_c, probs_a = (self._probabilities(control.layout.block(q, name), control.layout.block(k, name))
                            for name in ("concept", "auxiliary"))                        # (B/n, H, N, T)
        logits = dbim.concept_logits(probs_c, control)                                   # (B/n, K, H, N)
        if logits.shape[1] > 1 and control.masked:
            out_c, v_c = control.layout.block(out, "concept"), control.layout.block(v, "concept")
            apart = dbim.keep_apart(probs_c, logits, control).to(v.dtype) @ v_c          # (B/n, H, N, d)
            # A prompt of one concept is drawn as if there were no others, to the bit.
            out = control.layout.replace(out, "concept", torch.where(control.several, apart, out_c))
        masks = self.masks(torch.stack(dbim.integration_masks(logits, probs_a, control)))  # (2, B/n, H, N)
        return dbim.integrate(out, masks, control.layout)

    def _probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """Forms attention (B, H, N, T), in float32 at least: DBIM's gains make whole masks of a half's rounding."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):                               # it would round the product
            return (q.to(wide) @ k.to(wide).mT * self.scale).softmax(dim=-1)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalized before and added after."""

    def __init__(self, dim: int, n_heads: int, d_head: int, dropout: float = 0.0, context_dim: int | None = None,
                 gated_ff: bool = True, checkpoint: bool = False):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Returns features (B, N, C) of features and text (B, T, D); recomputes them in training where asked to."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, use_reentrant=False, **dbim.keyword(control))
        return self._forward(x, context, **dbim.keyword(control))

    def _forward(self, x: Tensor, context: Tensor | None = None,
                 control: DBIMControl | None = None) -> Tensor:
        x = self.attn1(self.norm1(x)) + x                                    # (B, N, C)
        x = self.attn2(self.norm2(x), context, **dbim.keyword(control)) + x  # (B, N, C)
        return self.ff(self.norm3(x)) + x                                    # (B, N, C)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around them."""

    def __init__(self, in_channels: int, n_heads: int, d_head: int, depth: int = 1, dropout: float = 0.0,
                 context_dim: int | None = None, use_checkpoint: bool = False, group_channels: int | None = None):
        super().__init__()
        inner_dim = n_heads * d_head
        self.in_channels = in_channels
        self.norm = normalization(in_channels, group_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, n_heads, d_head, dropout, context_dim, checkpoint=use_checkpoint)
            for _ in range(depth))
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None,
                control: DBIMControl | None = None) -> Tensor:
        """Returns a feature map (B, C, H, W) of one and of text (B, T, D)."""
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x))                                       # (B, C', H, W)
        h = rearrange(h, "b c h w -> b (h w) c")                             # (B, N, C')
        for block in self.transformer_blocks:
            h = block(h, context, **dbim.keyword(control))                   # (B, N, C')
        h = rearrange(h, "b (h w) c -> b c h w", h=height, w=width)          # (B, C', H, W)
        # The first operand decides the sum's memory format: x's stays, whatever the rearranged h has.
        return x + self.proj_out(h)                         # (B, C, H, W)


@contextmanager
def record_masks(network: nn.Module, record: list[tuple[str, Tensor]],
                 rows: Sequence[int] | slice = slice(None)) -> Iterator[None]:
    """Appends (layer name, masks (2, B, H, N)) to `record` whenever a layer of `network` integrates branches.

    `rows` are the images of the batch, B of them, that are watched.
    """
    def hook(name: str):
        return lambda module, args, output: record.append((name, output[:, rows].detach().cpu()))

    handles = [module.masks.register_forward_hook(hook(name)) for name, module in network.named_modules()
               if isinstance(module, CrossAttention)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
