"""ReconstructionKL: what the small autoencoder is trained on: pixels, coarse color, divergence."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionKL(nn.Module):
    """Weighted sum of pixel errors, of the error after 4x down-sampling, and of the KL divergence.

    Args:
        kl_weight: weight of the divergence per latent value.
        coarse_weight: weight of the down-sampled squared error, which holds large areas to their color.
    """

    def __init__(self, kl_weight: float = 1e-6, coarse_weight: float = 1.0):
        super().__init__()
        self.kl_weight, self.coarse_weight = kl_weight, coarse_weight

    def forward(self, inputs: Tensor, reconstructions: Tensor, posterior: DiagonalGaussianDistribution) -> Tensor:
        """Returns the mean loss () for images (B, 3, H, W) in [-1, 1]."""
        fine = F.mse_loss(reconstructions, inputs) + 0.1 * F.l1_loss(reconstructions, inputs)
        coarse = F.mse_loss(F.avg_pool2d(reconstructions, 4), F.avg_pool2d(inputs, 4))
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return fine + self.coarse_weight * coarse + self.kl_weight * divergence
