"""Concept files made smaller: each weight's difference to the base as a product of two narrow matrices.

Custom Diffusion stores concepts so (Kumari et al. 2023, section 3.2 and appendix). Here ranks are chosen over all
weights together, by what a number stored buys; its own rule, a share of each weight's singular values, is there too.
"""
from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.customization.delta import Concept
from ldm.util import UserError

BYTES = 2               # of a number in a file, as weights are stored
PER_TENSOR = 200        # bytes in a file's head for a tensor, at most


@dataclass(frozen=True)
class Spectrum:
    """A difference to the base (m, n), decomposed in float64: u diag(s) v, k = min(m, n)."""

    u: Tensor       # (m, k)
    s: Tensor       # (k,), falling
    v: Tensor       # (k, n)

    @property
    def step(self) -> int:
        """How many numbers one more rank stores."""
        return len(self.u) + self.v.shape[1]

    @property
    def whole(self) -> int:
        """How many numbers the difference itself has."""
        return len(self.u) * self.v.shape[1]

    def cost(self, rank: int) -> int:
        """How many numbers a rank stores; never more than the whole difference does."""
        return min(rank * self.step, self.whole)


@dataclass(frozen=True)
class Layer:
    """What became of a weight: its rank, of how many, and ||left out|| / ||difference||."""

    rank: int
    of: int
    error: float


@dataclass(frozen=True)
class Compressed:
    """A concept made smaller, what became of each weight, and the error over all of them together."""

    concept: Concept
    layers: Mapping[str, Layer]
    error: float


def differences(concept: Concept, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns each changed weight's difference to the base, in float64.

    Args:
        base: the U-Net's weights by their names inside it; those alone are read that the concept stores in full.

    Raises:
        UserError: a weight is not the base's.
    """
    found = {name: value.double() for name, value in concept.differences.items()}
    for name, (u, v) in concept.factors.items():
        found[name] = u.double() @ v.double()
    for name, value in concept.weights.items():
        if name not in base or base[name].shape != value.shape:
            raise UserError(f"the concept changes '{name}', which the base does not have in this shape; give the base "
                            "it was made for with --ckpt.")
        found[name] = value.double() - base[name].double()
    return found


def spectra(concept: Concept, base: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """Decomposes the differences of all changed matrices.

    Raises:
        UserError: a weight is no matrix or not the base's, or none is changed at all.
    """
    found = {}
    for name, difference in sorted(differences(concept, base).items()):
        if difference.ndim != 2:
            raise UserError(f"'{name}' is no matrix, and has no ranks; only a concept of K/V can be compressed.")
        found[name] = Spectrum(*torch.linalg.svd(difference, full_matrices=False))
    if not found:
        raise UserError("the concept changes no weights; there is nothing to compress.")
    return found


def by_rank(found: Mapping[str, Spectrum], rank: int) -> dict[str, int]:
    """Gives every weight the same rank."""
    return {name: min(rank, len(spectrum.s)) for name, spectrum in found.items()}


def by_share(found: Mapping[str, Spectrum], share: float) -> dict[str, int]:
    """Custom Diffusion's rule: as many singular values as have at most `share` of their sum.

    Its release stops before the value whose sum exceeds the share, so a weight may keep none.
    """
    ranks = {}
    for name, spectrum in found.items():
        reached = spectrum.s.cumsum(0) > share * spectrum.s.sum()                      # (k,)
        ranks[name] = int(reached.to(torch.int8).argmax()) if bool(reached.any()) else len(spectrum.s)
    return ranks


def by_error(found: Mapping[str, Spectrum], error: float) -> dict[str, int]:
    """The fewest numbers whose ||left out|| / ||difference||, over all weights together, is at most `error`."""
    worths = _worths(found)
    # A higher bar leaves out more; of the bars that are low enough the highest.
    place = bisect.bisect_left(worths, True, key=lambda worth: total_error(found, _ranks(found, worth)) <= error)
    return _ranks(found, worths[place]) if place < len(worths) else by_rank(found, _LARGEST)


def by_size(found: Mapping[str, Spectrum], numbers: int) -> dict[str, int]:
    """The least error with at most so many numbers."""
    worths = _worths(found)
    place = bisect.bisect_right(worths, False, key=lambda worth: numbers_of(found, _ranks(found, worth)) > numbers)
    return _ranks(found, worths[place - 1]) if place else by_rank(found, 0)


RULES = {"rank": by_rank, "share": by_share, "error": by_error, "size": by_size}
_LARGEST = 1 << 30


def _worths(found: Mapping[str, Spectrum]) -> list[float]:
    """What one more rank takes off the squared error for each number it stores, of all ranks, falling."""
    worths = torch.cat([spectrum.s.square() / spectrum.step for spectrum in found.values()])
    return sorted(worths.tolist(), reverse=True)


def _ranks(found: Mapping[str, Spectrum], worth: float) -> dict[str, int]:
    """Keeps every rank that is worth at least so much; a weight that costs as much as in full is kept in full."""
    ranks = {}
    for name, spectrum in found.items():
        rank = int((spectrum.s.square() / spectrum.step >= worth).sum())
        ranks[name] = rank if rank * spectrum.step < spectrum.whole else len(spectrum.s)
    return ranks


def numbers_of(found: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> int:
    """Returns how many numbers these ranks store."""
    return sum(spectrum.cost(ranks[name]) for name, spectrum in found.items())


def layer_error(spectrum: Spectrum, rank: int) -> float:
    """Returns ||left out|| / ||difference|| of a weight; 0 where nothing was learned."""
    size = spectrum.s.square().sum()
    return math.sqrt(float(spectrum.s[rank:].square().sum() / size)) if size else 0.0


def total_error(found: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Returns the same of all weights together."""
    left = sum(float(spectrum.s[ranks[name]:].square().sum()) for name, spectrum in found.items())
    size = sum(float(spectrum.s.square().sum()) for spectrum in found.values())
    return math.sqrt(left / size) if size else 0.0


def budget(concept: Concept, megabytes: float) -> int:
    """Returns how many numbers of weights a file of so many MB holds beside a concept's words.

    Raises:
        UserError: the words alone take more.
    """
    tensors = len(concept.words) + 2 * (len(concept.weights) + len(concept.differences) + len(concept.factors))
    words = sum(4 * len(vector) for vector in concept.words.values())
    beside = words + len(repr(concept.info)) + len(repr(concept.schemes)) + PER_TENSOR * tensors
    if beside > megabytes * 1e6:
        raise UserError(f"{megabytes:g} MB are too little: words and names alone take {beside / 1e6:.2g} MB.")
    return int((megabytes * 1e6 - beside) / BYTES)


def compress(concept: Concept, found: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> Compressed:
    """Returns the concept with each difference in that rank, or in full where that takes no more room.

    A weight of rank 0 is the base's. The two factors share the singular values evenly, so that half precision, whose
    relative error both have, keeps them best.
    """
    whole, factors, layers = {}, {}, {}
    for name, spectrum in found.items():
        rank = ranks[name]
        layers[name] = Layer(rank, len(spectrum.s), layer_error(spectrum, rank))
        root = spectrum.s[:rank].sqrt()                                                 # (r,)
        u, v = spectrum.u[:, :rank] * root, root[:, None] * spectrum.v[:rank]           # (m, r), (r, n)
        if rank and rank * spectrum.step >= spectrum.whole:
            whole[name] = (u @ v).float()
        elif rank:
            factors[name] = u.float(), v.float()
    made = replace(concept, weights={}, differences=whole, factors=factors)
    return Compressed(made, layers, total_error(found, ranks))
