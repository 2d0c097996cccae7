"""DCI: a concept and an auxiliary branch denoise together in the early steps, then the concept continues alone.

Paper section 3.3. Inside the network DBIM fuses the auxiliary branch into the concept branch (`ldm/modules/dbim.py`);
here is what surrounds it: which rows the network sees, how each branch is guided, and when the joint phase ends.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Generators, Guidance, NoisePredictor, draw_noise, guide
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.util import UserError


def in_joint_phase(t: float, T: int, T_a: float) -> bool:
    """Says whether time step `t` of `T` lies in the early share `T_a` that has two branches: t/T > 1 - T_a."""
    return t > T * (1.0 - T_a) + 1e-6      # 1000 * (1 - 0.3) is not 700 exactly, and step 700 is outside


@dataclass(frozen=True, eq=False)
class DualBranch:
    """The auxiliary branch of a DCI run and how long it lives (paper section 3.3).

    Args:
        auxiliary: text features (B, T, D) of the auxiliary prompts.
        control: token masks and strength; its layout says whether guidance is shared or separate.
        agg_time: T_a, the early share of the schedule that has two branches.
        generators: one per row, for the auxiliary branch's own noise.
        common_noise: starts both branches from the same latents and gives both the same noise.
        own_weights: opens a context in which the network reads the auxiliary rows through weights of their own; None:
            both branches share all weights, as in the paper.
    """

    auxiliary: Tensor
    control: DBIMControl
    agg_time: float
    generators: Generators | None = None
    common_noise: bool = False
    own_weights: Callable[[], AbstractContextManager] | None = None

    def guidance(self, model: NoisePredictor, conditioning: Tensor, unconditional: Tensor | None, scale: float,
                 generators: Generators | None) -> DualBranchGuidance:
        """Builds the guidance of both branches, for a sampler."""
        return DualBranchGuidance(model, conditioning, unconditional, scale, generators, self)


class DualBranchGuidance(Guidance):
    """Two branches as rows of one batch: the state is [concept; auxiliary] while the joint phase lasts.

    What the network sees then is the layout's: SHARED [u(x_c), c(x_c), a(x_a)] guides both branches by the concept's
    unconditional prediction, as the release does; SEPARATE adds u(x_a), which is classifier-free guidance of each.

    Args:
        dual: the auxiliary branch; the others are those of `Guidance`, text features (B, T, D) as conditioning.

    Raises:
        UserError: the layout and the scale contradict each other about guidance.
    """

    def __init__(self, model: NoisePredictor, conditioning: Tensor, unconditional: Tensor | None, scale: float,
                 generators: Generators | None, dual: DualBranch):
        super().__init__(model, conditioning, unconditional, scale, generators)
        self.dual, self.layout, self.batch = dual, dual.control.layout, len(conditioning)
        guided = self.unconditional is not None
        if guided == (self.layout is BranchLayout.UNGUIDED):
            raise UserError("DCI's branch layout does not fit the guidance scale: UNGUIDED belongs to scale 1.")
        text = {"unconditional": self.unconditional, "concept": conditioning, "auxiliary": dual.auxiliary}
        rows = torch.cat([text[name] for name in self.layout.value])             # (n*B, T, D)
        self._joint_cond = {"c_crossattn": [rows], "control": dual.control}

    def start(self, x: Tensor) -> Tensor:
        """Returns [x; x'], where x' is the auxiliary branch's own noise, or `x` again."""
        if self.dual.common_noise:
            return torch.cat([x, x])
        return torch.cat([x, draw_noise(x, self.dual.generators)])               # (2B, C, H, W)

    def end_joint_phase(self, t: float, *states: Tensor) -> tuple[Tensor, ...]:
        """Returns `states` without the auxiliary branch's rows once t/T <= 1 - T_a."""
        if in_joint_phase(t, self.model.num_timesteps, self.dual.agg_time):
            return states
        return tuple(state[: self.batch] for state in states)                    # the auxiliary branch is done

    def noise(self, x: Tensor) -> Tensor:
        """Draws the noise of a stochastic step, the concept's first: it is the same with and without DCI."""
        concept = draw_noise(x[: self.batch], self.generators)
        if len(x) == self.batch:
            return concept
        if self.dual.common_noise:
            return torch.cat([concept, concept])
        return torch.cat([concept, draw_noise(x[self.batch:], self.dual.generators)])

    def eps(self, x: Tensor, t: float) -> Tensor:
        """Predicts each branch's guided noise, (2B, C, H, W) in the joint phase and (B, C, H, W) after it."""
        if len(x) == self.batch:
            return super().eps(x, t)
        branches = x.chunk(2)                                                    # x_c and x_a, (B, C, H, W) each
        rows = torch.cat([branches[index] for index in self.layout.latents])     # (n*B, C, H, W)
        own_weights = self.dual.own_weights or nullcontext
        with own_weights():
            eps = self.predict(rows, t, self._joint_cond)
        if self.layout is BranchLayout.UNGUIDED:
            return eps
        if self.layout is BranchLayout.SHARED:
            eps_u, eps_c, eps_a = eps.chunk(3)
            eps_u_a = eps_u
        else:
            eps_u, eps_c, eps_u_a, eps_a = eps.chunk(4)
        return torch.cat([guide(eps_u, eps_c, self.scale), guide(eps_u_a, eps_a, self.scale)])
