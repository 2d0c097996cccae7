"""Guidance: turns a conditioned network into a noise predictor, for one branch or for DCI's two."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import Conditioning, LatentDiffusion

Generators = Sequence[torch.Generator]
Aside = Callable[[], AbstractContextManager]


def stack_conditionings(*parts: Conditioning) -> Conditioning:
    """Stacks conditionings of one form (features, a list of them, or a mapping of lists) along the batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: stack_conditionings(*(part[key] for part in parts)) for key in first}
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def draw_noise(like: Tensor, generators: Generators | None) -> Tensor:
    """Draws standard normal noise in the shape of `like` (B, C, H, W).

    With one generator a row, on the CPU, a row's noise depends neither on the batch nor on the device.
    """
    if generators is None:
        return torch.randn_like(like)
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(like)                                            # (B, C, H, W)


def has_two_branches(t: float, num_timesteps: int, agg_time: float) -> bool:
    """Says whether time step `t` lies in the early share of the schedule that has two branches."""
    return t > num_timesteps * (1.0 - agg_time) + 1e-6


class Rows:
    """The rows the network is asked about in each step of a run: blocks of conditioning over blocks of latents.

    What is constant over the steps is done here, once, where the model offers it (`prepare_conditioning`); blocks of
    rows that share their latents then share the network's work up to the text. Other models get every row in full.

    Args:
        model: predicts noise through `apply_model(x, t, cond)`.
        blocks: conditionings of B rows each.
        latents: which block of the latents each of them denoises.
        control: integrates two of the blocks (DBIM).
        aside: opens a context in which the model has other weights for the auxiliary branch's keys and values.
    """

    def __init__(self, model: LatentDiffusion, blocks: Sequence[Conditioning], latents: tuple[int, ...],
                 control: DBIMControl | None = None, aside: Aside | None = None):
        self.model, self.latents = model, latents
        cond = blocks[0] if len(blocks) == 1 else stack_conditionings(*blocks)
        if control is not None:
            cond = {"c_crossattn": [cond], "control": control}
        prepare = getattr(model, "prepare_conditioning", None)
        arguments = (cond, latents) if aside is None else (cond, latents, aside)
        prepared = prepare(*arguments) if prepare and cond is not None else None
        self.prepared, self.cond = prepared is not None, cond if prepared is None else prepared
        if aside is not None and not self.prepared:
            raise UserError("the auxiliary branch can have weights of its own only in a network whose layers nobody "
                            "replaced or hooked; take the patch off, or choose another dci.ablation.")

    def predict(self, x: Tensor, t: int | float, steps: Mapping[int, Any]) -> Tensor:
        """Predicts noise (rows, C, H, W) for latents `x` at `t`; `steps` holds time steps embedded before."""
        if not self.prepared and len(self.latents) > 1:
            blocks = x.chunk(max(self.latents) + 1)
            x = torch.cat([blocks[index] for index in self.latents])
        time = steps[t] if t in steps else torch.full((1 if self.prepared else len(x),), t, device=x.device)
        return self.model.apply_model(x, time, self.cond)


class Guidance:
    """Classifier-free guidance of a single branch (Ho & Salimans 2022).

    Args:
        model: predicts noise through `apply_model(x, t, cond)`.
        conditioning: of B rows.
        unconditional: of B rows; None, or `scale` 1, samples without guidance.
        scale: how far to move from the unconditional prediction; 1 is the conditional one.
        generators: one per row, for the noise a sampler adds; None draws from torch's global state.
    """

    def __init__(self, model: LatentDiffusion, conditioning: Conditioning, unconditional: Conditioning | None = None,
                 scale: float = 1.0, generators: Generators | None = None):
        self.model, self.scale, self.generators = model, scale, generators
        self.conditioning = conditioning
        self.unconditional = None if scale == 1.0 else unconditional
        self._steps: dict[int, Any] = {}
        blocks = [conditioning] if self.unconditional is None else [self.unconditional, conditioning]
        self._rows = Rows(model, blocks, latents=(0,) * len(blocks))

    def start(self, x: Tensor) -> Tensor:
        """Returns the first state for initial latents `x` (B, C, H, W)."""
        return x

    def plan(self, timesteps: Sequence[float]) -> None:
        """Learns which time steps a run will ask for, so that the model can embed them at once."""
        prepare = getattr(self.model, "prepare_steps", None)
        if prepare is not None:
            timesteps = sorted(set(timesteps))
            prepared = prepare(timesteps)
            self._steps = {} if prepared is None else dict(zip(timesteps, prepared, strict=True))

    def narrow(self, t: int, *states: Tensor) -> tuple[Tensor, ...]:
        """Returns `states`, without the rows that take no part at time step `t`."""
        return states

    def noise(self, x: Tensor) -> Tensor:
        """Draws the noise a stochastic step adds to state `x`."""
        return draw_noise(x, self.generators)

    def eps(self, x: Tensor, t: int | float) -> Tensor:
        """Predicts the guided noise of state `x` (rows, C, H, W) at time step `t`."""
        eps = self._rows.predict(x, t, self._steps)
        if self.unconditional is None:
            return eps
        eps_u, eps_c = eps.chunk(2)                                              # (B, C, H, W) each
        return eps_u + self.scale * (eps_c - eps_u)


@dataclass(frozen=True, eq=False)
class DualBranch:
    """The auxiliary branch of a DCI run and how long it lives (paper section 3.3).

    Args:
        auxiliary: text features (B, T, D) of the auxiliary prompts.
        control: token masks and strength; its layout says whether guidance is shared or separate.
        agg_time: the early share of the schedule that has two branches, t/T > 1 - agg_time.
        generators: one per row, for the auxiliary branch's own noise.
        common_noise: starts both branches from the same latents and gives both the same noise.
        aside: opens a context in which the model has the weights of the auxiliary branch's keys and values; None: both
            branches share all weights, as in the paper.
    """

    auxiliary: Tensor
    control: DBIMControl
    agg_time: float
    generators: Generators | None = None
    common_noise: bool = False
    aside: Aside | None = None


class DualBranchGuidance(Guidance):
    """Two branches as rows of one batch: the state is [concept; auxiliary] while the phase lasts.

    Layouts of what the network sees: SHARED [u(x_c), c(x_c), a(x_a)] guides both branches by the concept's
    unconditional prediction, as the release does; SEPARATE adds u(x_a), which is classifier-free guidance of each.
    """

    def __init__(self, model: LatentDiffusion, conditioning: Tensor, unconditional: Tensor | None, scale: float,
                 generators: Generators | None, dual: DualBranch):
        super().__init__(model, conditioning, unconditional, scale, generators)
        guided = self.unconditional is not None
        if guided == (dual.control.layout is BranchLayout.UNGUIDED):
            raise UserError("DCI's branch layout does not fit the guidance scale: UNGUIDED belongs to scale 1.")
        self.dual, self.batch = dual, len(conditioning)
        branches = {"unconditional": self.unconditional, "concept": conditioning, "auxiliary": dual.auxiliary}
        names = dual.control.layout.value
        self._joint = Rows(model, [branches[name] for name in names], dual.control.layout.latents, dual.control,
                           dual.aside)

    def start(self, x: Tensor) -> Tensor:
        if self.dual.common_noise:
            return torch.cat([x, x])
        return torch.cat([x, draw_noise(x, self.dual.generators)])               # (2B, C, H, W)

    def narrow(self, t: int, *states: Tensor) -> tuple[Tensor, ...]:
        if has_two_branches(t, self.model.num_timesteps, self.dual.agg_time):
            return states
        return tuple(state[: self.batch] for state in states)                    # the auxiliary branch is done

    def noise(self, x: Tensor) -> Tensor:
        concept = draw_noise(x[: self.batch], self.generators)
        if len(x) == self.batch:
            return concept
        if self.dual.common_noise:
            return torch.cat([concept, concept])
        return torch.cat([concept, draw_noise(x[self.batch:], self.dual.generators)])

    def eps(self, x: Tensor, t: int | float) -> Tensor:
        if len(x) == self.batch:
            return super().eps(x, t)
        eps = self._joint.predict(x, t, self._steps)
        layout = self.dual.control.layout
        if layout is BranchLayout.UNGUIDED:
            return eps
        if layout is BranchLayout.SHARED:
            eps_u, eps_c, eps_a = eps.chunk(3)
            eps_u_a = eps_u
        else:
            eps_u, eps_c, eps_u_a, eps_a = eps.chunk(4)
        return torch.cat([eps_u + self.scale * (eps_c - eps_u), eps_u_a + self.scale * (eps_a - eps_u_a)])


def make_guidance(model: LatentDiffusion, conditioning: Conditioning, unconditional: Conditioning | None,
                  scale: float, generators: Generators | None, dual: DualBranch | None) -> Guidance:
    """Builds the guidance of one branch, or of two where `dual` is given."""
    if dual is None:
        return Guidance(model, conditioning, unconditional, scale, generators)
    return DualBranchGuidance(model, conditioning, unconditional, scale, generators, dual)
