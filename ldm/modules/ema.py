"""LitEma: an exponential moving average of a module's trainable weights, kept as buffers."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Keeps the average under the parameters' names with the dots removed, as SD's `model_ema.*` keys are.

    Raises:
        ValueError: `decay` is outside 0..1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError("Decay must be between 0 and 1")
        self.m_name2s_name = {name: name.replace(".", "") for name, parameter in model.named_parameters()
                              if parameter.requires_grad}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32, device="cpu"))
        # -1: the decay is the same from the start.
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int, device="cpu"))
        parameters = dict(model.named_parameters())
        for name, stored in self.m_name2s_name.items():
            self.register_buffer(stored, parameters[name].detach().clone())
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Moves the average towards the weights of `model`; early updates move further."""
        decay = float(self.decay)
        if self.num_updates >= 0:
            self.num_updates += 1
            # As CompVis's: the average forgets its start quickly.
            decay = min(decay, (1 + int(self.num_updates)) / (10 + int(self.num_updates)))
        averages = dict(self.named_buffers())
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                # average -= (1 - decay) * (average - parameter)
                averages[self.m_name2s_name[name]].lerp_(parameter, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into `model`."""
        averages = dict(self.named_buffers())
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                parameter.copy_(averages[self.m_name2s_name[name]])

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Remembers `parameters` until `restore`."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Writes the remembered values back."""
        for parameter, value in zip(parameters, self.collected_params, strict=True):
            parameter.copy_(value)
        self.collected_params = []
