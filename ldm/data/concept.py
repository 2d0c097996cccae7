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


class SeenImage(NamedTuple):
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
    pictures: Sequence[SeenImage] = ()


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
        shown = self.shown(micro_step)
        pictures = [picture for picture, _ in shown]
        sources = [(self.concept, self.regularization)[picture.source] for picture in pictures]
        captions = [source.captions[picture.item] for source, picture in zip(sources, pictures, strict=True)]
        weights = torch.tensor([self.prior_weight if picture.source else 1.0 for picture in pictures])
        masks = torch.stack([self.mask(picture) for picture in pictures]) if self._masked else None
        return TrainingRows(torch.stack([self.image(picture) for picture in pictures]), captions, weights,
                            self.batch_size * (2 if self._members else 1), [seed for _, seed in shown],
                            frozenset(self.picks(micro_step)), masks, pictures)

    def picks(self, micro_step: int) -> list[int]:
        """Returns the reference pictures of a micro-step, of all devices one after the other."""
        total = self.batch_size * self.world_size
        return [shuffled(len(self.concept), micro_step * total + row, self.seed) for row in range(total)]

    def shown(self, micro_step: int) -> list[tuple[SeenImage, int]]:
        """Returns this device's pictures of a micro-step, references first, each with its row's seed."""
        picks = self.picks(micro_step)
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        places = [(micro_step * len(picks) + row, picks[row]) for row in mine]
        classes = [(position, self.class_picture(position, pick)) for position, pick in places]

        def row(source: int, position: int, item: int) -> tuple[SeenImage, int]:
            seed = self.row_seed(position, source)
            return SeenImage(source, item, self.flip and bool(np.random.default_rng(seed).integers(2))), seed

        return [row(0, position, pick) for position, pick in places] + \
            [row(1, position, item) for position, item in classes if item is not None]

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

    def image(self, picture: SeenImage) -> Tensor:
        """Returns a picture (H, W, 3) float32 in [-1, 1]."""
        image = (self.concept, self.regularization)[picture.source].images[picture.item]
        return (image.flip(1) if picture.flipped else image).float() / 127.5 - 1.0

    def mask(self, picture: SeenImage) -> Tensor:
        """Returns what of a picture counts in the loss, (H, W) float32 in [0, 1]."""
        source = (self.concept, self.regularization)[picture.source]
        mask = torch.full(source.images.shape[1:3], 255) if source.masks is None else source.masks[picture.item]
        return (mask.flip(1) if picture.flipped else mask).float() / 255

    def pictures(self, last: int | None = None) -> list[SeenImage]:
        """Lists every picture the plan can show, mirrored ones apart, or those this device shows before step `last`."""
        every = [SeenImage(source, item, flipped) for source, images in enumerate((self.concept, self.regularization))
                 for item in range(len(images) if images is not None else 0)
                 for flipped in ((False, True) if self.flip else (False,))]
        if last is None:
            return every
        found: set[SeenImage] = set()
        for micro_step in range(self.first, last):
            found |= {picture for picture, _ in self.shown(micro_step)}
            if len(found) == len(every):
                break
        return [picture for picture in every if picture in found]

    def row_seed(self, position: int, kind: int) -> int:
        """Returns the number all randomness of a row comes from: its place in the endless sequence, its kind."""
        return int(np.random.SeedSequence([self.seed, position, kind]).generate_state(1, np.uint64)[0]) >> 1
