"""The diagonal Gaussian an autoencoder's encoder describes: sample, mode, divergence."""
from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian over latents with independent components.

    Args:
        parameters: (B, 2C, H, W) mean and log-variance, stacked over channels.
        deterministic: collapses the distribution onto its mean.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)                       # (B, C, H, W) each
        self.logvar = logvar.clamp(-30.0, 20.0)                              # exp stays finite in float32
        self.std = torch.zeros_like(self.mean) if deterministic else (0.5 * self.logvar).exp()
        self.var = self.std**2

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draws (B, C, H, W); `noise` replaces the standard normal draw where given."""
        if noise is None:
            noise = torch.randn_like(self.mean)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Returns the most likely value, the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Returns KL(self || other) in nats per image (B,); `other` None is the standard normal."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        shift = (self.mean - other.mean) ** 2 / other.var
        return 0.5 * (shift + self.var / other.var - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))
