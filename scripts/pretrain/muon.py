"""Muon: momentum made orthogonal, for the matrices and convolutions of a network that is trained from nothing."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Quintic Newton-Schulz iteration: drives all singular values of a matrix of norm 1 to about 1 (Jordan et al. 2024).
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Returns the matrix (m, n) with its singular values moved to between about 0.7 and 1.2."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = LINEAR * x + (CUBIC * gram + QUINTIC * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for weights of two or more dimensions (convolutions as (out, in * kernel)).

    torch.optim.Muon takes no convolutions and iterates in bfloat16, slow on CPUs without it. Updates are scaled by
    0.2 sqrt(max(m, n)), so that learning rates mean what they mean for AdamW (Liu et al. 2025). Where several
    processes train together, each one orthogonalizes its share of the matrices.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every weight from its gradient."""
        workers, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            directions = []
            for index, weight in enumerate(group["params"]):
                average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1.0 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"]).flatten(1)               # Nesterov
                directions.append(orthogonalize(ahead) if index % workers == rank else torch.zeros_like(ahead))
            if workers > 1:                                                                    # everyone's share
                flat = torch.cat([direction.flatten() for direction in directions])
                dist.all_reduce(flat)
                directions = flat.split([direction.numel() for direction in directions])
            for weight, direction in zip(group["params"], directions, strict=True):
                scale = 0.2 * math.sqrt(max(weight.shape[0], weight[0].numel()))
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.add_(direction.view_as(weight), alpha=-group["lr"] * scale)


def optimizers_for(module: nn.Module, lr: float, betas: tuple[float, float],
                   weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices of at least 16 x 16, AdamW for embeddings, vectors and narrow first and last layers."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    matrices, rest = [], []
    for weight in module.parameters():
        small = weight.ndim < 2 or min(weight.shape[0], weight[0].numel()) < 16
        (rest if small or id(weight) in tables else matrices).append(weight)
    return [Muon(matrices, lr, weight_decay), torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay)]
