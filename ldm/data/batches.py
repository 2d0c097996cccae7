"""Training rows: which reference and regularization images a step sees, decided by seed and step alone."""
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
    """Images with a caption for each.

    Attributes:
        images: (N, H, W, 3) uint8.
        captions: N texts.
        masks: (N, H, W) uint8, 255 where a pixel counts in the loss; None where all do.
        groups: the number of the concept each image belongs to; None where there is one concept.
    """

    images: Tensor
    captions: Sequence[str]
    masks: Tensor | None = None
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def numbers(self) -> Sequence[int]:
        """Returns the number of the concept each image belongs to."""
        return [0] * len(self) if self.groups is None else self.groups


class SeenImage(NamedTuple):
    """Which image a row shows: of the references (0) or the regularization set (1), which one, mirrored or not."""

    source: int
    item: int
    flipped: bool


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """One device's share of one batch.

    Attributes:
        images: (n, H, W, 3) float32 in [-1, 1], flips applied.
        captions: n texts.
        weights: (n,) the rows' weights in the loss.
        full: how many rows a share has where every reference has a class image, or none has; the loss is divided by
            it, so that a reference weighs the same whatever stands beside it.
        seeds: n numbers from which all further randomness of a row comes (time step, noise).
        concept_images: indices of the reference images in the whole batch, all devices together.
        masks: (n, H, W) float32 in [0, 1], what counts in the loss, flips applied; None where everything does.
        seen: which n images these are.
    """

    images: Tensor
    captions: list[str]
    weights: Tensor
    full: int
    seeds: list[int]
    concept_images: frozenset[int]
    masks: Tensor | None = None
    seen: Sequence[SeenImage] = ()


def lap_order(count: int, lap: int, seed: int) -> np.ndarray:
    """Returns the order (count,) in which a round of an endless sequence runs through `count` items."""
    return np.random.default_rng([seed, lap]).permutation(count)


def shuffled(count: int, position: int, seed: int) -> int:
    """Returns the item at `position` of an endless sequence that runs through `count` items in shuffled rounds."""
    lap, place = divmod(position, count)
    return int(lap_order(count, lap, seed)[place])


class TrainingPlan(IterableDataset):
    """Endless batches, half reference images and half regularization images (none where there is no such set).

    Beside each reference image comes an image of its own concept's class, whatever the sizes of the sets. The rows
    of an optimizer step are the same however they are divided over devices and micro-steps, and a run that starts at
    a later micro-step goes on as the first would have.

    Args:
        batch_size: reference images per device and micro-step; as many regularization images come with them.
        flip: mirrors each image with probability one half.
        first: the micro-step to start at.
        rank, world_size: this device's share.
    """

    def __init__(self, concept: CaptionedImages, regularization: CaptionedImages | None, *, batch_size: int,
                 prior_weight: float = 1.0, flip: bool = True, seed: int = 23, first: int = 0, rank: int = 0,
                 world_size: int = 1):
        self.concept, self.regularization = concept, regularization
        self.batch_size, self.prior_weight, self.flip = batch_size, prior_weight, flip
        self.seed, self.first, self.rank, self.world_size = seed, first, rank, world_size
        self._groups = np.asarray(concept.numbers())                                                        # (N,)
        self._members: dict[int, list[int]] = {}     # regularization images of each concept
        self._masked = concept.masks is not None
        if regularization is not None:
            for item, group in enumerate(regularization.numbers()):
                self._members.setdefault(group, []).append(item)
            self._masked = self._masked or regularization.masks is not None

    def __iter__(self) -> Iterator[TrainingBatch]:
        micro_step = self.first
        while True:
            yield self.batch(micro_step)
            micro_step += 1

    def batch(self, micro_step: int) -> TrainingBatch:
        """Returns this device's rows of a micro-step."""
        shown = self.shown(micro_step)
        seen = [image for image, _ in shown]
        seeds = [seed for _, seed in shown]
        images = torch.stack([self.load(image) for image in seen])     # (n, H, W, 3)
        # A reference's caption names its image's contexts (Eq 2).
        captions = [self._source(image).captions[image.item] for image in seen]
        weights = torch.tensor([self._weight(image) for image in seen])     # (n,)
        masks = torch.stack([self.mask(image) for image in seen]) if self._masked else None     # (n, H, W)
        full = 2 * self.batch_size if self._members else self.batch_size
        return TrainingBatch(images, captions, weights, full, seeds, frozenset(self.picks(micro_step)), masks, seen)

    def picks(self, micro_step: int) -> list[int]:
        """Returns the reference images of a micro-step, of all devices one after the other."""
        total = self.batch_size * self.world_size     # rows of all devices
        return [shuffled(len(self.concept), micro_step * total + row, self.seed) for row in range(total)]

    def shown(self, micro_step: int) -> list[tuple[SeenImage, int]]:
        """Returns this device's images of a micro-step, references first, each with its row's seed."""
        picks = self.picks(micro_step)
        references, classes = [], []
        for place in range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size):
            position = micro_step * len(picks) + place                     # in the endless sequence of references
            references.append(self._shown(0, position, picks[place]))
            item = self.class_image(position, picks[place])
            if item is not None:
                classes.append(self._shown(1, position, item))
        return references + classes

    def _shown(self, source: int, position: int, item: int) -> tuple[SeenImage, int]:
        seed = self.row_seed(position, source)
        flipped = self.flip and bool(np.random.default_rng(seed).integers(2))
        return SeenImage(source, item, flipped), seed

    def class_image(self, position: int, pick: int) -> int | None:
        """Returns the regularization image beside the reference `pick` at `position`; None where its class has none.

        The images of each class are run through in shuffled rounds of their own.
        """
        group = int(self._groups[pick])
        members = self._members.get(group)
        if not members:
            return None
        lap, place = divmod(position, len(self.concept))
        before = self._groups[lap_order(len(self.concept), lap, self.seed)[:place]]
        # How many references of this class came before.
        turn = lap * int((self._groups == group).sum()) + int((before == group).sum())
        return members[shuffled(len(members), turn, self.seed + 1 + group)]

    def _weight(self, seen: SeenImage) -> float:
        return self.prior_weight if seen.source else 1.0

    def _source(self, seen: SeenImage) -> CaptionedImages:
        return self.regularization if seen.source else self.concept

    def load(self, seen: SeenImage) -> Tensor:
        """Returns an image (H, W, 3) float32 in [-1, 1]."""
        pixels = self._source(seen).images[seen.item]
        if seen.flipped:
            pixels = pixels.flip(1)
        return pixels.float() / 127.5 - 1.0

    def mask(self, seen: SeenImage) -> Tensor:
        """Returns what of an image counts in the loss, (H, W) float32 in [0, 1]."""
        source = self._source(seen)
        if source.masks is None:
            return torch.ones(source.images.shape[1:3])
        mask = source.masks[seen.item]
        if seen.flipped:
            mask = mask.flip(1)
        return mask.float() / 255

    def seen_images(self, last: int | None = None) -> list[SeenImage]:
        """Lists every image the plan can show, mirrored ones apart, or those this device shows before step `last`."""
        every = []
        for source, images in enumerate((self.concept, self.regularization)):
            for item in range(len(images or ())):
                every.append(SeenImage(source, item, False))
                if self.flip:
                    every.append(SeenImage(source, item, True))
        if last is None:
            return every
        found: set[SeenImage] = set()
        for micro_step in range(self.first, last):
            found.update(image for image, _ in self.shown(micro_step))
            if len(found) == len(every):      # of ten thousand steps, a few show everything
                break
        return [image for image in every if image in found]

    def row_seed(self, position: int, kind: int) -> int:
        """Returns the number all randomness of a row comes from: its place in the endless sequence, its kind."""
        # 63 bits: torch's generators take no more.
        return int(np.random.SeedSequence([self.seed, position, kind]).generate_state(1, np.uint64)[0]) >> 1
