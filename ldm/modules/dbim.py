"""Dual-Branch Integration Module: what cross-attention needs to know, and the formula (paper Eq 3-5)."""
from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.modules.dbim_gains import MASK_SUM, SPATIAL_GAIN, TOKEN_GAIN
from ldm.util import UserError

REFERENCE_PIXELS = 64 * 64  # the finest layer at 512x512, where MASK_SUM was chosen


class BranchLayout(enum.Enum):
    """Which rows of a batch belong to which branch, as blocks of equal size in this order."""

    SHARED = ("unconditional", "concept", "auxiliary")
    SEPARATE = ("unconditional", "concept", "unconditional", "auxiliary")
    UNGUIDED = ("concept", "auxiliary")

    @property
    def blocks(self) -> int:
        """Number of blocks the batch divides into."""
        return len(self.value)

    @property
    def latents(self) -> tuple[int, ...]:
        """Which branch's latents each block denoises: 0 the concept's, 1 the auxiliary's."""
        last = self.value.index("concept")
        return tuple(int(index > last) for index in range(self.blocks))

    def block(self, values: Tensor, name: str) -> Tensor:
        """Returns the rows of `values` that belong to branch `name`: 'concept' or 'auxiliary'."""
        return values.chunk(self.blocks)[self.value.index(name)]

    def replace(self, values: Tensor, name: str, rows: Tensor) -> Tensor:
        """Returns `values` with other rows for branch `name`."""
        blocks = list(values.chunk(self.blocks))
        blocks[self.value.index(name)] = rows.to(values.dtype)
        return torch.cat(blocks)


@dataclass(frozen=True, eq=False)
class DBIMControl:
    """What cross-attention needs to integrate two branches, for one forward pass.

    B is the number of prompts, T the number of text positions (77), K the most concepts that a prompt mentions. Masks
    are bool or 0/1.

    Raises:
        UserError: masks of different shape, or a prompt that does not mention the concept.
    """

    concept_tokens: Tensor               # (B, T) S^c: where the concept prompt says "V noun"; (B, K, T) of several
    concept_prompt: Tensor               # (B, T) every content token of the concept prompt
    context_tokens: Tensor               # (B, T) S^a: the auxiliary prompt without its noun
    context_prompt: Tensor               # (B, T) every content token of the auxiliary prompt
    strength: Tensor                     # () or (B,) lambda; a tensor, so that its value recompiles nothing
    layout: BranchLayout
    full_pixels: int                     # h*w of the finest layer; ties gains to a layer's relative resolution
    masked: bool = True                  # False: the paper's ablation without masks: both outputs are added
    last_layer_only: bool = False        # True: the paper's ablation without deep aggregation
    token_gain: float = TOKEN_GAIN
    spatial_gain: float = SPATIAL_GAIN
    mask_sum: float = MASK_SUM

    def __post_init__(self) -> None:
        any_concept = self.concept_sets.sum(dim=1) > 0
        masks = (any_concept, self.concept_prompt, self.context_tokens, self.context_prompt)
        shapes = {tuple(mask.shape) for mask in masks}
        if len(shapes) != 1 or self.concept_tokens.ndim not in (2, 3):
            raise UserError(f"DBIM needs four token masks of one shape (B, T), got {sorted(shapes)}.")
        if not bool(any_concept.any(dim=1).all()):
            raise UserError("DCI needs the concept in every prompt; one of the prompts does not mention it.")

    @property
    def concept_sets(self) -> Tensor:
        """S^c of each concept, (B, K, T); an empty one belongs to a concept that the prompt does not mention."""
        return self.concept_tokens if self.concept_tokens.ndim == 3 else self.concept_tokens[:, None]

    @property
    def several(self) -> Tensor:
        """Which prompts mention several concepts, (B, 1, 1, 1)."""
        return ((self.concept_sets.sum(dim=-1) > 0).sum(dim=-1) > 1)[:, None, None, None]


def keyword(control: DBIMControl | None) -> dict[str, DBIMControl]:
    """Returns how `control` is handed on: not at all without DBIM, for layers that others put in know no such name."""
    return {} if control is None else {"control": control}


def branch_map(probs: Tensor, tokens: Tensor, prompt: Tensor, gain: float) -> Tensor:
    """Sums the attention of a token set (Eq 3), after the release's second softmax over the prompt's tokens.

    Args:
        probs: (B, H, N, T) attention probabilities of one branch.
        tokens: (B, T) the token set S.
        prompt: (B, T) all content tokens; every other position takes no part.

    Returns:
        (B, H, N) in [0, 1].
    """
    outside = ~prompt.bool()[:, None, None, :]                                 # (B, 1, 1, T)
    shares = (gain * probs.float()).masked_fill(outside, -torch.inf).softmax(dim=-1)  # (B, H, N, T)
    return (shares * tokens[:, None, None, :]).sum(dim=-1)                     # (B, H, N)


def integration_masks(logits: Tensor, probs_a: Tensor, control: DBIMControl) -> tuple[Tensor, Tensor]:
    """Computes the aggregation masks (M^c, M^a) of Eq 3-4, both (B, H, N) float32 with M^c + M^a = 1.

    Of several concepts, whose `logits` are `concept_logits`, the strongest counts at each pixel, so that lambda means
    what it means for one. Without masks both are 1, as the paper's ablation adds the two branches directly (Fig. 10).
    """
    s_c = logits.amax(dim=1)                                                   # (B, H, N)
    if not control.masked:
        one = torch.ones_like(s_c)
        return one, one
    m_a = branch_map(probs_a, control.context_tokens, control.context_prompt, control.token_gain)   # Eq 3
    s_a = _mask_sum(control) * (control.spatial_gain * m_a).softmax(dim=-1)    # (B, H, N)
    lam = control.strength.reshape(-1, 1, 1)                                   # (1 or B, 1, 1)
    mask_c = torch.sigmoid(s_c - lam * s_a)                                    # softmax over two branches, Eq 4
    return mask_c, 1.0 - mask_c


def _mask_sum(control: DBIMControl) -> float:
    """Returns what a spatial softmax is multiplied by.

    500 was chosen for a 64x64 finest layer: a mean logit of 500/N there, and of 4, 16, 64 times that below. At another
    size each layer keeps the logit its relative resolution has at 512x512.
    """
    return control.mask_sum * control.full_pixels / REFERENCE_PIXELS


def concept_logits(probs_c: Tensor, control: DBIMControl) -> Tensor:
    """Returns how much each concept is where (Eq 3, 4), (B, K, H, N); -inf for one that a prompt does not mention."""
    logits = []
    for tokens in control.concept_sets.unbind(dim=1):                          # (B, T) each
        m_c = branch_map(probs_c, tokens, control.concept_prompt, control.token_gain)               # Eq 3
        s_c = _mask_sum(control) * (control.spatial_gain * m_c).softmax(dim=-1)                     # (B, H, N)
        missing = ~tokens.bool().any(dim=-1)[:, None, None]                    # (B, 1, 1)
        logits.append(s_c.masked_fill(missing, -torch.inf))
    return torch.stack(logits, dim=1)


def keep_apart(probs_c: Tensor, logits: Tensor, control: DBIMControl) -> Tensor:
    """Lets each concept fade where another one is: the concept branch's attention (B, H, N, T), shared out anew.

    Ours, for several concepts in one prompt (the paper has one): with their logits s_i (Eq 4), attention to the tokens
    of concept i is multiplied by exp(s_i - max_k s_k), which is 1 where it rules, and divided by its new sum.
    """
    fading = (logits - logits.amax(dim=1, keepdim=True)).exp()                 # (B, K, H, N)
    share = torch.ones_like(probs_c)                                           # (B, H, N, T)
    for one, tokens in zip(fading.unbind(dim=1), control.concept_sets.unbind(dim=1), strict=True):
        share = torch.where(tokens.bool()[:, None, None, :], one[..., None], share)
    kept = probs_c * share
    return kept / kept.sum(dim=-1, keepdim=True)


def integrate(out: Tensor, masks: Tensor, layout: BranchLayout) -> Tensor:
    """Fuses the auxiliary branch's output into the concept branch's (Eq 5); all other rows stay as they are.

    Args:
        out: (n*B, H, N, d) attention outputs per head, before the output projection, in `layout`.
        masks: (2, B, H, N) the masks M^c and M^a, in float32: rounded to a half, they would not add up to 1.
    """
    mask_c, mask_a = masks[..., None]                                          # (B, H, N, 1) each
    out_c, out_a = (layout.block(out, name) for name in ("concept", "auxiliary"))
    fused = mask_c * out_c + mask_a * out_a                                    # (B, H, N, d), Eq 5
    return layout.replace(out, "concept", fused)                               # (n*B, H, N, d)
