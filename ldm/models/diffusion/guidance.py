"""Classifier-free guidance: turns a conditioned network into the noise predictor a sampler steps along."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# As CompVis's code hands it on: text features, a list of them, or keywords of the network's wrapper.
Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Any]
Generators = Sequence[torch.Generator]


class NoisePredictor(Protocol):
    """What guidance asks of a model: a `LatentDiffusion`, or what somebody put around one."""

    num_timesteps: int

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Predicts noise (R, C, H, W) at time steps `t` (R,)."""
        ...


class SecondBranch(Protocol):
    """What a sampler needs of a second branch: a guidance of both."""

    def guidance(self, model: NoisePredictor, conditioning: Tensor, unconditional: Tensor | None, scale: float,
                 generators: Generators | None) -> Guidance:
        """Builds it; the arguments are those of `Guidance`."""
        ...


def stack_conditionings(first: Conditioning, second: Conditioning) -> Conditioning:
    """Stacks two conditionings of one form (features, a list of them, or a mapping of lists) along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: stack_conditionings(first[key], second[key]) for key in first}
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]


def draw_noise(like: Tensor, generators: Generators | None) -> Tensor:
    """Draws standard normal noise in the shape of `like` (B, C, H, W).

    With one generator a row, on the CPU, a row's noise depends neither on the batch nor on the device.
    """
    if generators is None:
        return torch.randn_like(like)
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
    return torch.stack(rows).to(like)                                            # (B, C, H, W)


def guide(eps_u: Tensor, eps_c: Tensor, scale: float) -> Tensor:
    """Moves from the unconditional prediction (B, C, H, W) through the conditional one (Ho & Salimans 2022, Eq 6)."""
    return eps_u + scale * (eps_c - eps_u)


class Guidance:
    """Classifier-free guidance of a single branch (Ho & Salimans 2022).

    Args:
        model: predicts noise through `apply_model(x, t, cond)`.
        conditioning: of B rows.
        unconditional: of B rows; None, or `scale` 1, samples without guidance.
        scale: how far to move from the unconditional prediction; 1 is the conditional one.
        generators: one per row, for the noise a sampler adds; None draws from torch's global state.
    """

    def __init__(self, model: NoisePredictor, conditioning: Conditioning, unconditional: Conditioning | None = None,
                 scale: float = 1.0, generators: Generators | None = None):
        self.model, self.scale, self.generators = model, scale, generators
        self.conditioning = conditioning
        # At scale 1 its prediction would be multiplied by 0.
        self.unconditional = None if scale == 1.0 else unconditional
        self._cond = conditioning
        if self.unconditional is not None:
            self._cond = stack_conditionings(self.unconditional, conditioning)

    def start(self, x: Tensor) -> Tensor:
        """Returns the first state for initial latents `x` (B, C, H, W)."""
        return x

    def end_joint_phase(self, t: float, *states: Tensor) -> tuple[Tensor, ...]:
        """Returns `states` without the rows that take no part from time step `t` on; here all do."""
        return states

    def noise(self, x: Tensor) -> Tensor:
        """Draws the noise a stochastic step adds to state `x`."""
        return draw_noise(x, self.generators)

    def predict(self, x: Tensor, t: float, cond: Conditioning) -> Tensor:
        """Asks the network for the noise in `x` (R, C, H, W), all rows at time step `t`."""
        return self.model.apply_model(x, torch.full((len(x),), t, device=x.device), cond)

    def eps(self, x: Tensor, t: float) -> Tensor:
        """Predicts the guided noise of state `x` (B, C, H, W) at time step `t`."""
        if self.unconditional is None:
            return self.predict(x, t, self._cond)
        eps_u, eps_c = self.predict(torch.cat([x, x]), t, self._cond).chunk(2)   # (B, C, H, W) each
        return guide(eps_u, eps_c, self.scale)
