"""Tests of DBIM: the formula against numbers worked out by hand and by numpy, and what it must leave alone."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.base import build_model
from ldm.config import BaseConfig
from ldm.modules.attention import CrossAttention, SpatialTransformer, record_masks
from ldm.modules.dbim import BranchLayout, DBIMControl, concept_logits, integration_masks
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError

SHARED, SEPARATE, UNGUIDED = BranchLayout.SHARED, BranchLayout.SEPARATE, BranchLayout.UNGUIDED
POSITIONS, PIXELS, CHANNELS, CONTEXT = 12, 16, 8, 6      # T, N, C, D of the layers below


@dataclass(frozen=True)
class Prompt:
    """Where the tokens of a concept prompt and its auxiliary prompt stand; position 0 is the start token."""

    concept_length: int
    concept: tuple[int, ...]
    auxiliary_length: int
    noun: tuple[int, ...]

    @property
    def context(self) -> list[int]:
        """S^a: the auxiliary prompt's positions without its noun."""
        return [position for position in range(1, self.auxiliary_length + 1) if position not in self.noun]


# "A V* tortoise plu|shy in times square" and "A cat in times square", the paper's example in CLIP's tokens
PAPER = Prompt(8, (2, 3, 4, 5), 5, (2,))
# "V* dog on the moon" and "man on the moon"
MOON = Prompt(5, (1, 2), 4, (1,))


def token_mask(rows: Sequence[Iterable[int]], positions: int = POSITIONS) -> Tensor:
    """Returns a mask (B, T), True at the given positions of each row."""
    mask = torch.zeros(len(rows), positions, dtype=torch.bool)
    for row, places in zip(mask, rows, strict=True):
        row[list(places)] = True
    return mask


def make_control(strength: float | Sequence[float], layout: BranchLayout = SEPARATE,
                 prompts: Sequence[Prompt] = (PAPER,), full_pixels: int = 64, **options: bool) -> DBIMControl:
    """Builds a control for `prompts`; a sequence of strengths is one for each."""
    return DBIMControl(token_mask([prompt.concept for prompt in prompts]),
                       token_mask([range(1, prompt.concept_length + 1) for prompt in prompts]),
                       token_mask([prompt.context for prompt in prompts]),
                       token_mask([range(1, prompt.auxiliary_length + 1) for prompt in prompts]),
                       torch.tensor(strength), layout, full_pixels, **options)


def randomize(module: nn.Module) -> nn.Module:
    """Gives every parameter random values, those that start at zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=fan_in**-0.5)
    return module.eval()


@pytest.fixture
def layer() -> CrossAttention:
    """A layer of two heads whose attention is far from uniform."""
    torch.manual_seed(0)
    layer = randomize(CrossAttention(CHANNELS, CONTEXT, heads=2, dim_head=4))
    with torch.no_grad():
        layer.to_q.weight.mul_(3.0)
    return layer.requires_grad_(False)


def random_branches(batch: int = 1, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Draws image features (B, N, C) and text features (B, T, D) for each branch name."""
    rng = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(batch, PIXELS, CHANNELS, generator=rng),
                   torch.randn(batch, POSITIONS, CONTEXT, generator=rng))
            for name in ("unconditional", "concept", "auxiliary")}


def run(layer: CrossAttention, branches: dict[str, tuple[Tensor, Tensor]], control: DBIMControl | None,
        layout: BranchLayout = SEPARATE) -> dict[str, Tensor]:
    """Runs the branches as one batch and returns each one's output (B, N, C)."""
    layout = control.layout if control else layout
    x, context = (torch.cat(parts) for parts in zip(*(branches[name] for name in layout.value), strict=True))
    return dict(zip(layout.value, layer(x, context, control=control).chunk(layout.blocks), strict=True))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance)


@pytest.mark.parametrize("layout", BranchLayout)
def test_only_the_concept_rows_change(layer, layout):
    torch.manual_seed(2)
    rows = 2 * layout.blocks
    x, context = torch.randn(rows, PIXELS, CHANNELS), torch.randn(rows, POSITIONS, CONTEXT)
    plain = layer(x, context).chunk(layout.blocks)
    joint = layer(x, context, control=make_control(0.5, layout, [PAPER, MOON])).chunk(layout.blocks)
    for name, before, after in zip(layout.value, plain, joint, strict=True):
        assert close(before, after) == (name != "concept")


@pytest.mark.parametrize("layout", BranchLayout)
def test_extreme_strengths_leave_one_branch(layer, layout):
    branches = random_branches()
    plain = run(layer, branches, None, layout)
    assert close(run(layer, branches, make_control(-1e7, layout))["concept"], plain["concept"])
    assert close(run(layer, branches, make_control(1e7, layout))["concept"], plain["auxiliary"])


@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.5, 3.0])
def test_equal_branches_in_equal_branch_out(layer, strength):
    branches = random_branches()
    branches["auxiliary"] = branches["concept"]
    out = run(layer, branches, make_control(strength))
    assert close(out["concept"], run(layer, branches, None)["concept"])


def test_layouts_agree(layer):
    branches = random_branches(batch=2)
    separate, shared, unguided = (run(layer, branches, make_control(0.5, layout, [PAPER, MOON]))
                                  for layout in (SEPARATE, SHARED, UNGUIDED))
    for name in ("unconditional", "concept", "auxiliary"):
        assert close(separate[name], shared[name])
    for name in ("concept", "auxiliary"):
        assert close(separate[name], unguided[name])


@pytest.mark.parametrize("strengths", [0.5, [0.5, -1.5]], ids=["one strength", "one per prompt"])
def test_a_batch_of_two_prompts_equals_two_batches(layer, strengths):
    branches = random_branches(batch=2)
    together = run(layer, branches, make_control(strengths, SEPARATE, [PAPER, MOON]))
    for row, prompt in enumerate((PAPER, MOON)):
        strength = strengths[row] if isinstance(strengths, list) else strengths
        single = {name: (x[row:row + 1], context[row:row + 1]) for name, (x, context) in branches.items()}
        alone = run(layer, single, make_control(strength, SEPARATE, [prompt]))
        assert all(close(together[name][row:row + 1], alone[name]) for name in alone)


def hand_layer() -> CrossAttention:
    """One head of width 1: the query is the pixel, the key a context's first number, the value its second."""
    layer = CrossAttention(1, 2, heads=1, dim_head=1)
    with torch.no_grad():
        for part, value in ((layer.to_q, [[1.0]]), (layer.to_k, [[1.0, 0.0]]), (layer.to_v, [[0.0, 1.0]]),
                            (layer.to_out[0], [[1.0]])):
            part.weight.copy_(torch.tensor(value))
        layer.to_out[0].bias.zero_()
    return layer.requires_grad_(False)


def test_hand_worked_case():
    """Two pixels, three tokens (start, "on", noun), lambda 1/2, in plain numbers.

    A query 0 sees all keys alike, 1/3 each. A query ln 2 gives the one key that is 1 twice the others' weight, 1/2.
    """
    zero, twice = 0.0, math.log(2.0)
    # The concept branch looks for its noun at pixel 1, the auxiliary branch for "on" at pixel 0.
    x = torch.tensor([[[zero], [twice]], [[twice], [zero]]])
    context = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [1.0, 4.0]], [[0.0, -1.0], [1.0, 3.0], [0.0, -2.0]]])
    out_c = (7 / 3, 0.25 * 1 + 0.25 * 2 + 0.5 * 4)
    out_a = (0.25 * -1 + 0.5 * 3 + 0.25 * -2, 0.0)
    assert (out_c[1], out_a[0]) == (2.75, 0.75)

    looked_at = math.exp(10 / 2) / (math.exp(10 / 2) + math.exp(10 / 4))       # of two tokens; 0.9241
    m_c, m_a = (0.5, looked_at), (looked_at, 0.5)                              # Eq 3
    share = math.exp(10 * looked_at) / (math.exp(10 * looked_at) + math.exp(10 * 0.5))  # of two pixels; 0.9858
    assert (round(looked_at, 4), round(share, 4)) == (0.9241, 0.9858)
    total = 500 * 16 / 4096                                                    # a layer below a 4x4 finest layer
    s_c, s_a = (total * (1 - share), total * share), (total * share, total * (1 - share))
    mask_c = [math.exp(c) / (math.exp(c) + math.exp(0.5 * a)) for c, a in zip(s_c, s_a, strict=True)]    # Eq 4
    assert [round(value, 3) for value in mask_c] == [0.282, 0.871]
    expected = [m * c + (1 - m) * a for m, c, a in zip(mask_c, out_c, out_a, strict=True)]   # Eq 5
    assert m_c != m_a

    content = token_mask([[1, 2]], 3)
    control = DBIMControl(token_mask([[2]], 3), content, token_mask([[1]], 3), content, torch.tensor(0.5), UNGUIDED,
                          full_pixels=16)
    out = hand_layer()(x, context, control=control)[..., 0].tolist()
    assert out[0] == pytest.approx(expected, abs=1e-5)
    assert out[1] == pytest.approx(out_a, abs=1e-6)


def test_without_control_it_is_plain_fused_attention(layer, monkeypatch):
    fused: list[int] = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, **options: fused.append(1) or original(*args, **options))
    x, context = random_branches(batch=3)["concept"]
    heads = []
    for q, k, v in zip(*(part(y).split(4, dim=-1) for part, y in
                         ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))), strict=True):
        scores = (q @ k.mT / 2.0).exp()                                        # (B, N, T), 2 = sqrt(d)
        heads.append(scores / scores.sum(dim=-1, keepdim=True) @ v)            # (B, N, d)
    assert close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)))
    assert fused == [1]


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(3)
    block = randomize(SpatialTransformer(16, n_heads=2, d_head=8, context_dim=CONTEXT, use_checkpoint=True,
                                         group_channels=8))
    x, context = torch.randn(8, 16, 4, 4), torch.randn(8, POSITIONS, CONTEXT)
    control = make_control([0.5, -1.0], SEPARATE, [PAPER, MOON])
    gradients = []
    for checkpointed in (True, False):
        for part in block.transformer_blocks:
            part.checkpoint = checkpointed
        gradients.append(torch.autograd.grad(block(x, context, control).square().sum(), list(block.parameters())))
    assert all(torch.equal(one, other) and one.abs().sum() > 0 for one, other in zip(*gradients, strict=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def independent_output(layer: CrossAttention, x: dict[str, np.ndarray], context: dict[str, np.ndarray],
                       prompt: Prompt, strength: float, mask_sum: float) -> np.ndarray:
    """States the layer's concept output (N, C) again in float64: prompts cut to L tokens, one head at a time."""
    weights = {key: value.double().numpy() for key, value in layer.state_dict().items()}
    width = len(weights["to_q.weight"]) // layer.heads
    heads = []
    for head in range(layer.heads):
        rows = slice(head * width, (head + 1) * width)
        spatial, outputs = {}, {}
        for branch, length in (("concept", prompt.concept_length), ("auxiliary", prompt.auxiliary_length)):
            q = x[branch] @ weights["to_q.weight"][rows].T                     # (N, d)
            k = context[branch] @ weights["to_k.weight"][rows].T               # (T, d)
            probs = softmax(q @ k.T / math.sqrt(width))                        # (N, T)
            outputs[branch] = probs @ (context[branch] @ weights["to_v.weight"][rows].T)    # (N, d)
            shares = softmax(10 * probs[:, 1:length + 1])                      # (N, L)
            if branch == "concept":
                raw = sum(shares[:, position - 1] for position in prompt.concept)
            else:
                raw = 1 - sum(shares[:, position - 1] for position in prompt.noun)
            spatial[branch] = mask_sum * softmax(10 * raw)                     # (N,)
        pair = softmax(np.stack([spatial["concept"], strength * spatial["auxiliary"]], axis=-1))    # (N, 2)
        heads.append(pair[:, :1] * outputs["concept"] + pair[:, 1:] * outputs["auxiliary"])
    return np.concatenate(heads, axis=-1) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


def independent_mask(q: np.ndarray, k: np.ndarray, scale: float, tokens: Sequence[Tensor], strength: float,
                     mask_sum: float) -> np.ndarray:
    """States one head's M^c (N,) again, from queries (2, N, d) and keys (2, T, d) of the two branches."""
    logits = []
    for branch, (chosen, prompt) in enumerate((tokens[:2], tokens[2:])):
        probs = softmax(scale * q[branch] @ k[branch].T)                       # (N, T)
        shares = softmax(10 * probs[:, prompt[0].numpy()])                     # (N, L)
        raw = shares[:, chosen[0, prompt[0]].numpy()].sum(axis=-1)             # (N,)
        logits.append(mask_sum * softmax(10 * raw))                            # (N,)
    return softmax(np.stack([logits[0], strength * logits[1]], axis=-1))[:, 0]


@pytest.mark.parametrize("prompt", [PAPER, MOON], ids=["paper", "moon"])
@pytest.mark.parametrize("full_pixels", [16, 64, 256])
@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.7])
def test_layer_equals_an_independent_statement(layer, prompt, full_pixels, strength):
    branches = random_branches(seed=4)
    x, context = ({name: values[part][0].double().numpy() for name, values in branches.items()} for part in (0, 1))
    expected = independent_output(layer, x, context, prompt, strength, 500 * full_pixels / 4096)
    out = run(layer, branches, make_control(strength, SEPARATE, [prompt], full_pixels))["concept"][0]
    assert np.abs(out.double().numpy() - expected).max() < 1e-5


def random_probs(pixels: int, seed: int, spread: float = 3.0) -> Tensor:
    """Draws attention probabilities (1, 2, N, T)."""
    rng = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(1, 2, pixels, POSITIONS, generator=rng)).softmax(dim=-1)


def masks_of(probs_c: Tensor, probs_a: Tensor, control: DBIMControl) -> tuple[Tensor, Tensor]:
    return integration_masks(concept_logits(probs_c, control), probs_a, control)


def test_masks_sum_to_one():
    masks = masks_of(random_probs(64, 6), random_probs(64, 7), make_control(0.5))
    assert masks[0].dtype == torch.float32 and masks[0].shape == (1, 2, 64) and masks[0].std() > 0.01
    assert close(masks[0] + masks[1], torch.ones(1, 2, 64))


@pytest.mark.parametrize("side, printed", [
    (64, ("0.41", "0.44", "0.47", "0.50", "0.53")), (32, ("0.19", "0.27", "0.38", "0.50", "0.62")),
    (16, ("0.003", "0.02", "0.12", "0.50", "0.88")), (8, ("0.0000", "0.0000", "0.0004", "0.50", "0.9996"))])
def test_shares_of_the_auxiliary_branch_under_uniform_attention(side, printed):
    """lambda -2, -1, 0, 1, 2 at the four layer sizes of a 512x512 image."""
    probs = torch.full((1, 1, side * side, POSITIONS), 1 / POSITIONS)
    for strength, text in zip((-2.0, -1.0, 0.0, 1.0, 2.0), printed, strict=True):
        _, mask_a = masks_of(probs, probs, make_control(strength, full_pixels=64 * 64))
        decimals = len(text.partition(".")[2])
        assert {f"{share:.{decimals}f}" for share in mask_a.flatten().tolist()} == {text}


@pytest.mark.parametrize("full", [(64, 64), (48, 80), (16, 16)])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_layers_mean_logit_depends_on_its_relative_resolution_alone(full, factor):
    """At lambda 0 the logit of M^c is s^c, whose mean is 500/N at 512x512: 0.122, 0.488, 1.95 by layer."""
    full_pixels = full[0] * full[1]
    pixels = full_pixels // factor**2
    probs = (random_probs(pixels, seed, spread=0.1) for seed in (8, 9))   # mild: a mask near 1 loses its logit
    mask_c, _ = masks_of(*probs, make_control(0.0, full_pixels=full_pixels))
    assert mask_c.double().logit().mean().item() == pytest.approx(500 / 4096 * factor**2, rel=1e-4)


def test_an_inverted_auxiliary_set_is_not_the_papers(layer):
    """The noun alone in place of everything else: invisible at lambda 0, plain at any other."""
    branches, right = random_branches(), make_control(0.0)
    for strength, same in ((0.0, True), (1.0, False), (-1.0, False)):
        given = [torch.tensor(strength), SEPARATE, right.full_pixels]
        outputs = [run(layer, branches, DBIMControl(right.concept_tokens, right.concept_prompt, context_tokens,
                                                    right.context_prompt, *given))["concept"]
                   for context_tokens in (right.context_tokens, right.context_prompt & ~right.context_tokens)]
        assert close(*outputs) == same


def test_strength_zero_is_not_off(layer):
    masks = masks_of(random_probs(4096, 10), random_probs(4096, 11), make_control(0.0, full_pixels=4096))
    assert 0.0 < masks[1].min() and masks[1].max() <= 0.5
    branches = random_branches()
    out = run(layer, branches, make_control(0.0))["concept"]
    assert (out - run(layer, branches, None)["concept"]).abs().max() > 0.1


def test_without_masks_the_outputs_are_added(layer):
    branches = random_branches()
    plain = run(layer, branches, None)
    added = plain["concept"] + plain["auxiliary"] - layer.to_out[0].bias      # heads are added before the projection
    for strength in (-2.0, 0.0, 2.0):
        assert close(run(layer, branches, make_control(strength, masked=False))["concept"], added)


def test_contradictory_controls_are_refused():
    right, short = make_control(0.0), token_mask([PAPER.context], 10)
    with pytest.raises(UserError, match=r"one shape.*\(1, 10\).*\(1, 12\)"):
        DBIMControl(right.concept_tokens, right.concept_prompt, short, right.context_prompt, right.strength, SHARED,
                    64)
    with pytest.raises(UserError, match="does not mention"):
        DBIMControl(token_mask([[1], []]), *[token_mask([[1], [1]])] * 3, right.strength, SHARED, 64)


# Several concepts in one prompt.

BOTH = Prompt(8, (2, 3), 7, (2, 5))      # "a V cat beside a W dog outdoors": the cat's tokens; its auxiliary prompt
CAT, DOG = (2, 3), (6, 7)


def several(strength: float, sets: Sequence[Sequence[int]], prompts: Sequence[Prompt] = (BOTH,),
            layout: BranchLayout = SEPARATE) -> DBIMControl:
    """Builds a control of one prompt whose concepts have these tokens."""
    control = make_control(strength, layout, prompts)
    return replace(control, concept_tokens=torch.stack([token_mask([places])[0] for places in sets])[None])


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.5])
def test_one_of_one_concept_is_the_concept_to_the_bit(layer, strength):
    branches, control = random_branches(), make_control(strength)
    one = replace(control, concept_tokens=control.concept_tokens[:, None])
    assert torch.equal(run(layer, branches, one)["concept"], run(layer, branches, control)["concept"])


def test_the_order_of_concepts_does_not_matter_and_a_twin_adds_nothing(layer):
    branches = random_branches()
    found = run(layer, branches, several(0.5, [CAT, DOG]))
    assert torch.equal(found["concept"], run(layer, branches, several(0.5, [DOG, CAT]))["concept"])
    assert not close(found["concept"], run(layer, branches, several(0.5, [CAT]))["concept"], 1e-4)
    assert close(run(layer, branches, several(0.5, [CAT, CAT]))["concept"],
                 run(layer, branches, several(0.5, [CAT]))["concept"])
    assert torch.equal(found["auxiliary"], run(layer, branches, None)["auxiliary"])
    # Without masks the outputs are added, of however many concepts.
    bare = [run(layer, branches, replace(several(0.5, sets), masked=False))["concept"] for sets in ([CAT, DOG], [CAT])]
    assert torch.equal(*bare)


def test_a_concept_that_a_prompt_does_not_mention_is_as_if_it_were_not_there(layer):
    branches = random_branches()
    assert torch.equal(run(layer, branches, several(0.5, [CAT, ()]))["concept"],
                       run(layer, branches, several(0.5, [CAT]))["concept"])


@pytest.mark.parametrize("strength", [-1.0, 1.5])
def test_two_concepts_equal_an_independent_statement(layer, strength):
    """In float64 numpy, head by head: who fades where, the strongest one's mask, the fused output."""
    branches, control = random_branches(seed=5), several(strength, [CAT, DOG])
    found = run(layer, branches, control)["concept"][0].double().numpy()
    weights = {name: value.double().numpy() for name, value in layer.state_dict().items()}
    heads = []
    for head in range(layer.heads):
        part = slice(4 * head, 4 * head + 4)
        attention, values = {}, {}
        for name in ("concept", "auxiliary"):
            x, text = (tensor[0].double().numpy() for tensor in branches[name])
            attention[name] = softmax(x @ weights["to_q.weight"][part].T
                                                 @ (text @ weights["to_k.weight"][part].T).T * layer.scale)
            values[name] = text @ weights["to_v.weight"][part].T
        total = 500 * control.full_pixels / 4096

        def logit(probs: np.ndarray, tokens: Sequence[int], last: int, total: float = total) -> np.ndarray:
            gathered = softmax(10 * probs[:, 1:last + 1])[:, np.array(tokens) - 1].sum(axis=1)
            return total * softmax(10 * gathered)

        cat, dog = (logit(attention["concept"], tokens, BOTH.concept_length) for tokens in (CAT, DOG))
        context = logit(attention["auxiliary"], BOTH.context, BOTH.auxiliary_length)
        strongest = np.maximum(cat, dog)
        faded = attention["concept"].copy()
        faded[:, CAT] *= np.exp(cat - strongest)[:, None]
        faded[:, DOG] *= np.exp(dog - strongest)[:, None]
        faded /= faded.sum(axis=1, keepdims=True)
        mask = (1 / (1 + np.exp(strength * context - strongest)))[:, None]
        heads.append(mask * (faded @ values["concept"]) + (1 - mask) * (attention["auxiliary"] @ values["auxiliary"]))
    expected = np.concatenate(heads, axis=1) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("strength", [-1.0, 1.5])
@pytest.mark.parametrize("dtype, bounds", [(torch.bfloat16, {256: 3e-4, 64: 2e-3, 16: 8e-3}),
                                           (torch.float16, {256: 4e-5, 64: 3e-4, 16: 8e-4})], ids=["bf16", "fp16"])
@torch.no_grad()
def test_masks_hardly_feel_half_precision(dtype, bounds, strength):
    """On the embedded model's own queries and keys, against float64: rms errors by the number of pixels.

    With the product of queries and keys rounded too, they were four to nine times as large.
    """
    model = build_model(OmegaConf.load(ROOT / "configs" / "model" / "tiny.yaml").model, BaseConfig())[0]
    text = model.get_learned_conditioning(["", "a red cat in the snow", "a dog in the snow"])
    positions, layers = text.shape[1], []
    named, content, others, other_content = (token_mask([places], positions) for places in (
        (2, 3), range(1, 7), (1, 3, 4, 5), range(1, 6)))
    control = DBIMControl(named, content, others, other_content, torch.tensor(strength), SHARED, full_pixels=256)
    handles = [layer.register_forward_pre_hook(lambda layer, args: layers.append((layer, *args)))
               for layer in model.model.diffusion_model.modules()
               if isinstance(layer, CrossAttention) and layer.to_k.in_features != layer.to_q.in_features]
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(15))
    model.apply_model(x, torch.full((3,), 900), text)
    for handle in handles:
        handle.remove()
    errors: dict[int, list[Tensor]] = {}
    for layer, features, context in layers:
        q, k = layer._split(layer.to_q(features)), layer.keys_values(context)[0]     # (B, H, N, d), (B, H, T, d)
        found: list[tuple[str, Tensor]] = []
        with record_masks(layer, found), torch.autocast("cpu", dtype):               # which must not undo it
            layer.integrate(torch.zeros_like(q, dtype=dtype), q.to(dtype), k.to(dtype), k.to(dtype), control)
        for head in range(layer.heads):
            expected = independent_mask(*(tensor[1:, head].double().numpy() for tensor in (q, k)), layer.scale,
                                        (named, content, others, other_content), strength, 500 * 256 / 4096)
            errors.setdefault(len(expected), []).append(found[0][1][0, 0, head].double() - torch.tensor(expected))
    assert len(layers) == 10
    rms = {pixels: float(torch.stack(values).square().mean().sqrt()) for pixels, values in errors.items()}
    assert all(rms[pixels] < bound for pixels, bound in bounds.items()), rms


def build_unet(channel_mult: Sequence[int]) -> UNetModel:
    torch.manual_seed(12)
    network = UNetModel(image_size=4, in_channels=4, model_channels=16, out_channels=4, num_res_blocks=1,
                        attention_resolutions=[2, 1], channel_mult=channel_mult, num_heads=2, context_dim=CONTEXT,
                        group_channels=8)
    return randomize(network).requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    """Seven transformers at two resolutions."""
    return build_unet([1, 2])


@pytest.fixture
def denoise(unet) -> Callable[..., Tensor]:
    """Calls the network on one prompt's three rows."""
    rng = torch.Generator().manual_seed(13)
    x, context = torch.randn(3, 4, 4, 4, generator=rng), torch.randn(3, POSITIONS, CONTEXT, generator=rng)
    t = torch.full((3,), 500)
    return lambda control, network=unet: network(x, t, context, control)


def test_every_layer_integrates_or_only_the_last(unet, denoise):
    crossed = [name.removesuffix(".masks") for name, _ in unet.named_modules() if name.endswith("attn2.masks")]
    used = {}
    for last_only in (False, True):
        record: list[tuple[str, Tensor]] = []
        with record_masks(unet, record):
            denoise(make_control(0.5, SHARED, full_pixels=16, last_layer_only=last_only))
            denoise(None)
        used[last_only] = [name for name, _ in record]
        assert all(masks.shape[:3] == (2, 1, 2) and masks.dtype == torch.float32 for _, masks in record)
        assert {masks.shape[3] for _, masks in record} == ({16} if last_only else {16, 4})
    assert len(crossed) == 7 and set(used[False]) == set(crossed) and len(used[False]) == 7
    assert used[True] == ["output_blocks.3.1.transformer_blocks.0.attn2"] == used[False][-1:]


def test_recording_leaves_no_trace_even_after_an_error(unet, denoise):
    control = make_control(0.5, SHARED, full_pixels=16)
    before = denoise(control)
    record: list[tuple[str, Tensor]] = []
    with pytest.raises(KeyError), record_masks(unet, record):
        assert torch.equal(denoise(control), before)
        raise KeyError
    seen = len(record)
    assert seen == 7 and torch.equal(denoise(control), before) and len(record) == seen
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run on this Python")
@torch.no_grad()
def test_one_graph_with_control_one_without_and_no_more(denoise):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    network = build_unet([1])
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    on = [make_control(strength, SHARED, [prompt], full_pixels=16)
          for strength in (0.5, -2.0, 0.0) for prompt in (PAPER, MOON)]
    for control, graphs in [(None, 1), *((control, 2) for control in on), (None, 2)]:
        assert close(denoise(control, compiled), denoise(control, network), 1e-5)
        assert counter.frame_count == graphs
