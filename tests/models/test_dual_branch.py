"""Tests of guidance for one branch and two: what the network is handed, and what is made of its answers."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dual_branch import DualBranch, DualBranchGuidance, in_joint_phase
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import schedule_buffers
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.util import UserError

SHARED, SEPARATE, UNGUIDED = BranchLayout.SHARED, BranchLayout.SEPARATE, BranchLayout.UNGUIDED
SHAPE = (4, 8, 8)
RUNS = [(DDIMSampler, 0.0), (DDIMSampler, 1.0), (PLMSSampler, 0.0), (DPMSolverSampler, 0.0)]


@dataclass(frozen=True, eq=False)
class Call:
    """What the network was handed once."""

    x: Tensor
    t: int
    text: list[float]                    # one number a row
    control: DBIMControl | None


class LinearModel:
    """Predicts (a row's text) * (its state); under a control, adds `mixing` * auxiliary state to the concept."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, mixing: float = 0.0):
        self.mixing = mixing
        self.alphas_cumprod = schedule_buffers()["alphas_cumprod"]
        self.calls: list[Call] = []

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert t.shape == (len(x),) and (t == t[0]).all()
        control = None
        if isinstance(cond, Mapping):
            control = cond.get("control")
            (cond,) = cond["c_crossattn"]
        assert len(cond) == len(x)
        text = cond[:, 0, 0]                                                     # (rows,)
        self.calls.append(Call(x, int(t[0]), [round(float(value), 4) for value in text], control))
        eps = text[:, None, None, None] * x
        if control is not None:
            control.layout.block(eps, "concept").add_(self.mixing * control.layout.block(x, "auxiliary"))
        return eps

    @property
    def joint(self) -> list[Call]:
        return [call for call in self.calls if call.control is not None]


def features(*values: float) -> Tensor:
    """Text features (B, T, D) that say one number a row."""
    return torch.tensor(values)[:, None, None].expand(-1, 3, 2).contiguous()


def states(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, *SHAPE).contiguous()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def dual_branch(layout: BranchLayout, agg_time: float = 0.3, common_noise: bool = False) -> DualBranch:
    """Two rows, whose auxiliary prompts say 0.7 and 0.8 and whose auxiliary noise has seeds 20 and 21."""
    tokens = torch.tensor([[False, True, False]] * 2)
    control = DBIMControl(tokens, tokens, tokens, tokens, strength=torch.tensor(1.0), layout=layout, full_pixels=64)
    return DualBranch(features(0.7, 0.8), control, agg_time, generators(20, 21), common_noise)


UNCONDITIONAL, CONCEPT = features(0.1, 0.2), features(0.5, 0.4)


def sample(sampler: type[Sampler], model: LinearModel, dual: DualBranch | None, steps: int = 10, eta: float = 0.0,
           scale: float = 3.0, **options: Any) -> Tensor:
    return sampler(model).sample(
        steps, 2, SHAPE, conditioning=CONCEPT, unconditional_conditioning=UNCONDITIONAL, eta=eta, verbose=False,
        unconditional_guidance_scale=scale, generators=generators(10, 11), dual=dual, **options)[0]


def per_row(x: Tensor) -> list[float]:
    """The number every value of a row is."""
    assert (x == x[:, :1, :1, :1]).all()
    return [round(float(row[0, 0, 0]), 5) for row in x]


# ---- one branch ----

def test_single_branch_moves_from_the_unconditional_prediction() -> None:
    model = LinearModel()
    eps = Guidance(model, CONCEPT, UNCONDITIONAL, 3.0).eps(states(2.0, 1.0), 500)
    assert per_row(eps) == [2.6, 0.8]                      # 0.2 + 3 * (1.0 - 0.2) and 0.2 + 3 * (0.4 - 0.2)
    (call,) = model.calls
    assert call.text == [0.1, 0.2, 0.5, 0.4] and per_row(call.x) == [2.0, 1.0, 2.0, 1.0] and call.t == 500


@pytest.mark.parametrize("unconditional, scale", [(UNCONDITIONAL, 1.0), (None, 3.0)])
def test_single_branch_without_guidance_predicts_once(unconditional: Tensor | None, scale: float) -> None:
    model = LinearModel()
    eps = Guidance(model, CONCEPT, unconditional, scale).eps(states(2.0, 1.0), 500)
    assert per_row(eps) == [1.0, 0.4]
    assert [call.text for call in model.calls] == [[0.5, 0.4]]


def test_conditionings_of_every_form_are_stacked_alike() -> None:
    x = states(2.0, 1.0)
    expected = Guidance(LinearModel(), CONCEPT, UNCONDITIONAL, 3.0).eps(x, 500)
    mapping = Guidance(LinearModel(), {"c_crossattn": [CONCEPT]}, {"c_crossattn": [UNCONDITIONAL]}, 3.0)
    assert torch.equal(mapping.eps(x, 500), expected)


# ---- two branches: what is stacked and what comes out ----

# State: concept rows 2 and 1, auxiliary rows 3 and 5. By hand, with scale 3, row 0:
#   u(x_c) = 0.1 * 2 = 0.2, c(x_c) = 0.5 * 2 = 1.0, a(x_a) = 0.7 * 3 = 2.1, u(x_a) = 0.1 * 3 = 0.3
#   concept 0.2 + 3 * 0.8 = 2.6; auxiliary, SHARED 0.2 + 3 * 1.9 = 5.9, SEPARATE 0.3 + 3 * 1.8 = 5.7
# and row 1:
#   u(x_c) = 0.2 * 1 = 0.2, c(x_c) = 0.4 * 1 = 0.4, a(x_a) = 0.8 * 5 = 4.0, u(x_a) = 0.2 * 5 = 1.0
#   concept 0.2 + 3 * 0.2 = 0.8; auxiliary, SHARED 0.2 + 3 * 3.8 = 11.6, SEPARATE 1.0 + 3 * 3.0 = 10.0
@pytest.mark.parametrize("layout, scale, text, latents, expected", [
    (SHARED, 3.0, [0.1, 0.2, 0.5, 0.4, 0.7, 0.8], [2, 1, 2, 1, 3, 5], [2.6, 0.8, 5.9, 11.6]),
    (SEPARATE, 3.0, [0.1, 0.2, 0.5, 0.4, 0.1, 0.2, 0.7, 0.8], [2, 1, 2, 1, 3, 5, 3, 5], [2.6, 0.8, 5.7, 10.0]),
    (UNGUIDED, 1.0, [0.5, 0.4, 0.7, 0.8], [2, 1, 3, 5], [1.0, 0.4, 2.1, 4.0]),
])
def test_each_layout_stacks_and_guides_as_worked_out_by_hand(layout: BranchLayout, scale: float, text: list[float],
                                                             latents: list[float], expected: list[float]) -> None:
    model, dual = LinearModel(), dual_branch(layout)
    guidance = dual.guidance(model, CONCEPT, UNCONDITIONAL, scale, None)
    assert per_row(guidance.eps(states(2.0, 1.0, 3.0, 5.0), 900)) == expected
    (call,) = model.calls
    assert call.text == text and per_row(call.x) == latents and call.control is dual.control and call.t == 900


@pytest.mark.parametrize("layout, scale", [(SHARED, 3.0), (SEPARATE, 3.0), (UNGUIDED, 1.0)])
def test_after_the_phase_a_single_branch_is_predicted(layout: BranchLayout, scale: float) -> None:
    model, x = LinearModel(mixing=1.0), states(2.0, 1.0)
    eps = DualBranchGuidance(model, CONCEPT, UNCONDITIONAL, scale, None, dual_branch(layout)).eps(x, 600)
    assert torch.equal(eps, Guidance(LinearModel(), CONCEPT, UNCONDITIONAL, scale).eps(x, 600))
    assert not model.joint


@pytest.mark.parametrize("layout, scale", [(SHARED, 1.0), (SEPARATE, 1.0), (UNGUIDED, 3.0)])
def test_layout_that_does_not_fit_the_scale_is_refused(layout: BranchLayout, scale: float) -> None:
    with pytest.raises(UserError, match="layout"):
        DualBranchGuidance(LinearModel(), CONCEPT, UNCONDITIONAL, scale, None, dual_branch(layout))


# ---- the phase ----

@pytest.mark.parametrize("sampler, again", [(DDIMSampler, 0), (PLMSSampler, 1), (DPMSolverSampler, 0)])
@pytest.mark.parametrize("steps, agg_time, joint", [(200, 0.3, 60), (50, 0.3, 15), (100, 0.3, 30),
                                                    (200, 0.2, 40), (50, 0.2, 10), (100, 0.2, 20)])
def test_number_of_joint_steps(sampler: type[Sampler], again: int, steps: int, agg_time: float, joint: int) -> None:
    model = LinearModel()
    sample(sampler, model, dual_branch(SHARED, agg_time), steps)
    assert len(model.calls) == steps + again                  # PLMS's first step predicts twice
    assert len(model.joint) == joint + again
    assert model.calls[: joint + again] == model.joint        # they come first
    assert all(call.t > 1000 * (1 - agg_time) for call in model.joint)
    assert all(call.text == [0.1, 0.2, 0.5, 0.4, 0.7, 0.8] for call in model.joint)
    assert all(call.text == [0.1, 0.2, 0.5, 0.4] for call in model.calls[joint + again:])


def test_phase_is_decided_once_a_step() -> None:
    model = LinearModel()
    sample(PLMSSampler, model, dual_branch(SHARED, agg_time=0.15), 10)
    # the first step's second prediction, at 801, lies after the phase but belongs to a joint step
    assert [(call.t, len(call.x)) for call in model.calls[:4]] == [(901, 6), (801, 6), (801, 4), (701, 4)]


@pytest.mark.parametrize("sampler, eta", RUNS)
@pytest.mark.parametrize("layout, scale", [(SHARED, 3.0), (SEPARATE, 3.0), (UNGUIDED, 1.0)])
def test_no_aggregation_time_is_a_single_branch_to_the_bit(sampler: type[Sampler], eta: float, layout: BranchLayout,
                                                           scale: float) -> None:
    single = sample(sampler, LinearModel(), None, eta=eta, scale=scale)
    model = LinearModel(mixing=0.5)
    assert torch.equal(sample(sampler, model, dual_branch(layout, 0.0), eta=eta, scale=scale), single)
    assert not model.joint
    assert not torch.equal(sample(sampler, model, dual_branch(layout, 0.3), eta=eta, scale=scale), single)


@pytest.mark.parametrize("sampler, eta", RUNS)
@pytest.mark.parametrize("agg_time", [0.3, 0.65, 1.0])
@pytest.mark.parametrize("common_noise", [False, True])
def test_a_concept_that_ignores_its_auxiliary_branch_is_a_single_branch_to_the_bit(
        sampler: type[Sampler], eta: float, agg_time: float, common_noise: bool) -> None:
    # so the concept's own stream of noise is the same, and states and history lose the right rows together
    single = sample(sampler, LinearModel(), None, eta=eta)
    model = LinearModel()
    assert torch.equal(sample(sampler, model, dual_branch(SHARED, agg_time, common_noise), eta=eta), single)
    assert model.joint


@pytest.mark.parametrize("sampler, eta", RUNS)
def test_auxiliary_branch_is_a_single_branch_of_its_own(sampler: type[Sampler], eta: float) -> None:
    model = LinearModel()
    sample(sampler, model, dual_branch(SEPARATE, 1.0), eta=eta)
    alone = LinearModel()
    sampler(alone).sample(10, 2, SHAPE, conditioning=features(0.7, 0.8), unconditional_conditioning=UNCONDITIONAL,
                          eta=eta, verbose=False, unconditional_guidance_scale=3.0, generators=generators(20, 21))
    for joint, single in zip(model.calls, alone.calls, strict=True):
        assert joint.t == single.t
        assert torch.equal(joint.x[-2:], single.x[-2:])


# ---- noise ----

def test_branches_start_from_their_own_noise_or_from_the_same() -> None:
    x = states(2.0, 1.0)
    guidance = DualBranchGuidance(LinearModel(), CONCEPT, UNCONDITIONAL, 3.0, generators(10, 11), dual_branch(SHARED))
    drawn = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators(20, 21)])
    assert torch.equal(guidance.start(x), torch.cat([x, drawn]))
    both = dual_branch(SHARED, common_noise=True)
    common = DualBranchGuidance(LinearModel(), CONCEPT, UNCONDITIONAL, 3.0, None, both)
    assert torch.equal(common.start(x), torch.cat([x, x]))


def test_common_noise_gives_both_branches_every_noise() -> None:
    guidance = DualBranchGuidance(LinearModel(), CONCEPT, UNCONDITIONAL, 3.0, generators(10, 11),
                             dual_branch(SHARED, common_noise=True))
    expected = torch.stack([torch.randn(SHAPE, generator=generator) for generator in generators(10, 11)])
    assert torch.equal(guidance.noise(torch.zeros(4, *SHAPE)), torch.cat([expected, expected]))


def test_branches_draw_from_their_own_streams() -> None:
    guidance = DualBranchGuidance(LinearModel(), CONCEPT, UNCONDITIONAL, 3.0, generators(10, 11), dual_branch(SHARED))
    own, other = generators(10, 11), generators(20, 21)
    for rows in (4, 4, 2):
        expected = [torch.randn(SHAPE, generator=generator) for generator in (own + other)[:rows]]
        assert torch.equal(guidance.noise(torch.zeros(rows, *SHAPE)), torch.stack(expected))


@pytest.mark.parametrize("sampler, eta", RUNS)
def test_common_noise_samples_start_alike(sampler: type[Sampler], eta: float) -> None:
    model = LinearModel()
    sample(sampler, model, dual_branch(SHARED, common_noise=True), eta=eta)
    first = model.calls[0].x
    assert torch.equal(first[:2], first[4:])
    model.calls.clear()
    sample(sampler, model, dual_branch(SHARED), eta=eta)
    assert not torch.equal(model.calls[0].x[:2], model.calls[0].x[4:])


@pytest.mark.parametrize("sampler, eta", RUNS)
def test_only_the_concept_branch_is_returned_and_shown(sampler: type[Sampler], eta: float) -> None:
    shown: list[Tensor] = []
    found, record = sampler(LinearModel()).sample(
        10, 2, SHAPE, conditioning=CONCEPT, unconditional_conditioning=UNCONDITIONAL, eta=eta, verbose=False,
        unconditional_guidance_scale=3.0, generators=generators(10, 11), dual=dual_branch(SHARED, 1.0),
        log_every_t=1, img_callback=lambda image, _: shown.append(image))
    for image in (found, *shown, *record["x_inter"], *record["pred_x0"]):
        assert image.shape == (2, *SHAPE)
    assert torch.equal(record["x_inter"][-1], found)


def test_mask_keeps_the_image_in_both_branches() -> None:
    model = LinearModel()
    model.q_sample = lambda x0, t, noise: x0 + t.reshape(-1, 1, 1, 1) / 1000
    image = states(4.0, 6.0)
    sample(DDIMSampler, model, dual_branch(SEPARATE), mask=torch.ones(2, 1, 8, 8), x0=image)
    for call in model.calls:
        known = image + call.t / 1000
        assert torch.equal(call.x, torch.cat([known] * (len(call.x) // 2)))


@pytest.mark.parametrize(("t", "share", "joint"), [
    (999, 0.3, True), (701, 0.3, True), (700, 0.3, False), (1, 0.3, False), (999, 0.0, False), (1, 1.0, True),
    (0, 1.0, False), (899.1, 0.1, False), (900.1, 0.1, True)])
def test_the_joint_phase_is_the_early_share_of_the_schedule(t: float, share: float, joint: bool) -> None:
    """t/T > 1 - T_a, with T = 1000."""
    assert in_joint_phase(t, 1000, share) is joint
