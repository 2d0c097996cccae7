"""Numbers from feature vectors: text and image alignment on every scale in use, and KID; nothing is loaded here."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# One alignment, three customs: the paper and its release print the cosine, Custom Diffusion's evaluation CLIPScore
# (Hessel et al. 2021), torchmetrics per cent.
SCALES = {"cosine": lambda cosine: cosine,
          "2.5 max(cosine, 0)": lambda cosine: 2.5 * max(cosine, 0.0),
          "100 max(cosine, 0)": lambda cosine: 100.0 * max(cosine, 0.0)}
PER_IMAGE = ("2.5 max(cosine, 0)",)     # clipped before the mean; torchmetrics clips the mean
KID_LEAST = 50      # images on each side; below, the estimate is mostly noise


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine (N,) of each image's features (N, D) with its own text's (N, D)."""
    return F.cosine_similarity(images, texts, dim=1)


def image_alignment(images: Tensor, references: Tensor) -> Tensor:
    """Mean cosine (N,) of each image's features (N, D) with all references' (M, D) (paper section 4.1)."""
    return (F.normalize(images, dim=1) @ F.normalize(references, dim=1).T).mean(dim=1)


def kid(images: Tensor, references: Tensor) -> float:
    """Kernel distance of two sets of features (N, D), (M, D): unbiased squared MMD (Binkowski et al. 2018).

    The kernel is k(x, y) = (x y / D + 1)^3; being unbiased, the value can be a little below zero.
    """
    x, y = images.double(), references.double()
    n, m = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def unit(features: Tensor) -> Tensor:
    """Scales feature vectors (N, D) to length one."""
    return F.normalize(features.float(), dim=1)


def diversity(images: Tensor) -> float | None:
    """Mean of 1 - cosine over all pairs of features (N, D): 0 where all images are alike; None for one image."""
    if len(images) < 2:
        return None
    cosines = unit(images) @ unit(images).T                                         # (N, N)
    pairs = ~torch.eye(len(images), dtype=torch.bool)
    return float(1 - cosines[pairs].mean())
