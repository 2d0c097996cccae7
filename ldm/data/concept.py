"""Training rows: which reference and regularisation pictures a step sees, decided by seed and step alone."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Pictures with a caption for each.

    Attributes:
        images: (N, H, W, 3) uint8.
        captions: N texts.
        masks: (N, H, W) uint8, 255 where a pixel counts in the loss; None where all do.
        groups: the number of the concept each picture belongs to; None where there is one concept.
    """

    images: Tensor
    captions: Sequence[str]
    masks: Tensor | None = None
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.images)


class Picture(NamedTuple):
    """Which picture a row shows: of the references (0) or the regularisation set (1), which one, mirrored or not."""

    source: int
    item: int
    flipped: bool


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """One device's share of one batch.

    Attributes:
        images: (n, H, W, 3) float32 in [-1, 1], flips applied.
        captions: n texts.
        weights: (n,) the rows' weights in the loss.
        full: how many rows a share has where every reference has a class picture, or none has; the loss is divided by
            it, so that a reference weighs the same whatever stands beside it.
        seeds: n numbers from which all further randomness of a row comes (time step, noise).
        concept_images: indices of the reference pictures in the whole batch, all devices together.
        masks: (n, H, W) float32 in [0, 1], what counts in the loss, flips applied; None where everything does.
        pictures: which n pictures these are.
    """

    images: Tensor
    captions: list[str]
    weights: Tensor
    full: int
    seeds: list[int]
    concept_images: frozenset[int]
    masks: Tensor | None = None
    pictures: Sequence[Picture] = ()


def lap_order(count: int, lap: int, seed: int) -> np.ndarray:
    """Returns the order (count,) in which a round of an endless sequence runs through `count` items."""
    return np.random.default_rng([seed, lap]).permutation(count)


def shuffled(count: int, position: int, seed: int) -> int:
    """Returns the item at `position` of an endless sequence that runs through `count` items in shuffled rounds."""
    lap, place = divmod(position, count)
    return int(lap_order(count, lap, seed)[place])


class TrainingPlan(IterableDataset):
    """Endless batches, half reference pictures and half regularisation pictures (none where there is no such set).

    Beside each reference picture comes a picture of its own concept's class, whatever the sizes of the sets. The rows
    of an optimizer step are the same however they are divided over devices and micro-steps, and a run that starts at
    a later micro-step goes on as the first would have.

    Args:
        batch_size: reference pictures per device and micro-step; as many regularisation pictures come with them.
        flip: mirrors each picture with probability one half.
        first: the micro-step to start at.
        rank, world_size: this device's share.
    """

    def __init__(self, concept: CaptionedImages, regularization: CaptionedImages | None, *, batch_size: int,
                 prior_weight: float = 1.0, flip: bool = True, seed: int = 23, first: int = 0, rank: int = 0,
                 world_size: int = 1):
        self.concept, self.regularization = concept, regularization
        self.batch_size, self.prior_weight, self.flip = batch_size, prior_weight, flip
        self.seed, self.first, self.rank, self.world_size = seed, first, rank, world_size
        self._groups = np.asarray(concept.groups if concept.groups is not None else [0] * len(concept))     # (N,)
        self._members: dict[int, list[int]] = {}     # regularisation pictures of each concept
        for item, group in enumerate(regularization.groups or [0] * len(regularization) if regularization else ()):
            self._members.setdefault(group, []).append(item)
        self._masked = any(source is not None and source.masks is not None for source in (concept, regularization))

    def __iter__(self) -> Iterator[TrainingRows]:
        micro_step = self.first
        while True:
            yield self.rows(micro_step)
            micro_step += 1

    def rows(self, micro_step: int) -> TrainingRows:
        """Returns this device's rows of a micro-step."""
        total = self.batch_size * self.world_size
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        start = micro_step * total
        picks = [shuffled(len(self.concept), start + row, self.seed) for row in range(total)]
        images, captions, weights, seeds, masks = [], [], [], [], []
        pictures: list[Picture] = []

        def take(source: CaptionedImages, item: int, weight: float, row_seed: int) -> None:
            flipped = self.flip and bool(np.random.default_rng(row_seed).integers(2))
            pictures.append(Picture(int(source is self.regularization), item, flipped))
            images.append(self.image(pictures[-1]))
            mask = torch.full(images[-1].shape[:2], 255) if source.masks is None else source.masks[item]
            masks.append((mask.flip(1) if flipped else mask).float() / 255)
            captions.append(source.captions[item])
            weights.append(weight)
            seeds.append(row_seed)

        for row in mine:
            take(self.concept, picks[row], 1.0, self.row_seed(start + row, 0))
        for row in mine:
            item = self.class_picture(start + row, picks[row])
            if item is not None:
                take(self.regularization, item, self.prior_weight, self.row_seed(start + row, 1))
        full = self.batch_size * (2 if self._members else 1)
        return TrainingRows(torch.stack(images), captions, torch.tensor(weights), full, seeds, frozenset(picks),
                            torch.stack(masks) if self._masked else None, pictures)

    def class_picture(self, position: int, pick: int) -> int | None:
        """Returns the regularisation picture beside the reference `pick` at `position`; None where its class has none.

        The pictures of each class are run through in shuffled rounds of their own.
        """
        group = int(self._groups[pick])
        members = self._members.get(group)
        if not members:
            return None
        lap, place = divmod(position, len(self.concept))
        before = self._groups[lap_order(len(self.concept), lap, self.seed)[:place]]
        turn = lap * int((self._groups == group).sum()) + int((before == group).sum())
        return members[shuffled(len(members), turn, self.seed + 1 + group)]

    def image(self, picture: Picture) -> Tensor:
        """Returns a picture (H, W, 3) float32 in [-1, 1]."""
        image = (self.concept, self.regularization)[picture.source].images[picture.item]
        return (image.flip(1) if picture.flipped else image).float() / 127.5 - 1.0

    def pictures(self) -> list[Picture]:
        """Lists every picture the plan can show, mirrored ones apart."""
        return [Picture(source, item, flipped) for source, images in enumerate((self.concept, self.regularization))
                for item in range(len(images) if images is not None else 0)
                for flipped in ((False, True) if self.flip else (False,))]

    def row_seed(self, position: int, kind: int) -> int:
        """Returns the number all randomness of a row comes from: its place in the endless sequence, its kind."""
        return int(np.random.SeedSequence([self.seed, position, kind]).generate_state(1, np.uint64)[0]) >> 1
