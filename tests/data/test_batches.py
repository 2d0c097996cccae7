"""Tests of the training plan: the same rows however a step is divided, the same run wherever it goes on."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data.batches import CaptionedImages, TrainingBatch, TrainingPlan, shuffled

Row = tuple[bytes, str, float, int]


def images(count: int, name: str) -> CaptionedImages:
    """Makes images that differ from each other and from their mirror images."""
    images = torch.arange(count * 2 * 3 * 3, dtype=torch.uint8).view(count, 2, 3, 3)
    return CaptionedImages(images, [f"{name} {index}" for index in range(count)])


CONCEPT, REGULARIZATION = images(3, "<new1> cat"), images(5, "cat")


def plan(batch_size: int, *, regularization: CaptionedImages | None = REGULARIZATION,
         **options: object) -> TrainingPlan:
    return TrainingPlan(CONCEPT, regularization, batch_size=batch_size, prior_weight=0.25, **options)


def halves(parts: Sequence[TrainingBatch]) -> tuple[list[Row], list[Row]]:
    """Returns the parts' reference rows, then their regularization rows, to the bit."""
    concept, regularization = [], []
    for part in parts:
        rows = [(image.numpy().tobytes(), caption, weight, seed) for image, caption, weight, seed in
                zip(part.images, part.captions, part.weights.tolist(), part.seeds, strict=True)]
        concept += rows[: len(rows) // 2]
        regularization += rows[len(rows) // 2:]
    return concept, regularization


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_step_is_the_same_however_it_is_divided(step):
    """One device of 4; two devices of 2; one device of 2 that takes two micro-steps; four of 1."""
    whole = plan(4).batch(step)
    devices = [plan(2, rank=rank, world_size=2).batch(step) for rank in range(2)]
    micro_steps = [plan(2).batch(2 * step + part) for part in range(2)]
    both = [plan(1, rank=rank, world_size=2).batch(2 * step + part) for part in range(2) for rank in range(2)]
    assert len(whole.captions) == 8
    for parts in (devices, micro_steps, both):
        assert halves(parts) == halves([whole])
        assert frozenset().union(*(part.concept_images for part in parts)) == whole.concept_images


def test_every_device_knows_the_images_of_all():
    """A context is at rest only if its image was on no device."""
    parts = [plan(2, rank=rank, world_size=2).batch(5) for rank in range(2)]
    seen = {int(caption.split()[-1]) for caption in (row[1] for row in halves(parts)[0])}
    assert parts[0].concept_images == parts[1].concept_images == seen


def test_a_later_start_goes_on_as_the_first_would_have():
    through = list(islice(iter(plan(2)), 9))
    resumed = list(islice(iter(plan(2, first=4)), 5))
    assert [halves([rows]) for rows in resumed] == [halves([rows]) for rows in through[4:]]
    assert halves(through) != halves(list(islice(iter(plan(2, seed=24)), 9)))


def test_every_image_is_seen_equally_often():
    """15 micro-steps of 2 are 30 rows a half: 10 rounds of 3 reference images, 6 of 5 regularization images."""
    concept, regularization = halves(list(islice(iter(plan(2)), 15)))
    assert Counter(caption for _, caption, _, _ in concept) == {f"<new1> cat {index}": 10 for index in range(3)}
    assert Counter(caption for _, caption, _, _ in regularization) == {f"cat {index}": 6 for index in range(5)}
    for start in range(0, 30, 3):
        assert len({caption for _, caption, _, _ in concept[start:start + 3]}) == 3
    assert len({tuple(shuffled(5, 5 * lap + place, 23) for place in range(5)) for lap in range(20)}) > 10


def test_weights_say_which_half_a_row_belongs_to():
    rows = plan(3).batch(0)
    assert rows.weights.tolist() == [1.0] * 3 + [0.25] * 3
    assert [caption.startswith("<new1>") for caption in rows.captions] == [True] * 3 + [False] * 3
    alone = plan(3, regularization=None).batch(0)
    assert alone.weights.tolist() == [1.0] * 3 and alone.images.shape == (3, 2, 3, 3)


def source(caption: str) -> Tensor:
    """Returns the image (H, W, 3) a caption belongs to, its 256 values spread over [-1, 1]."""
    images = CONCEPT if caption.startswith("<new1>") else REGULARIZATION
    return images.images[int(caption.split()[-1])].float() / 127.5 - 1.0


def test_flips_follow_a_rows_seed():
    flips, seeds = [], []
    for rows in islice(iter(plan(2)), 100):
        for image, caption, seed in zip(rows.images, rows.captions, rows.seeds, strict=True):
            flipped = bool(np.random.default_rng(seed).integers(2))
            whole = source(caption)                                           # (H, W, 3)
            assert torch.allclose(image, torch.flip(whole, dims=[1]) if flipped else whole, atol=1e-6)
            flips.append(flipped)
            seeds.append(seed)
    assert 150 < sum(flips) < 250 and len(set(seeds)) == 400      # four standard deviations of a fair coin are 40
    assert all(0 <= seed < 2**63 for seed in seeds)               # what torch.Generator takes


def test_flips_can_be_off():
    for rows in islice(iter(plan(2, flip=False)), 20):
        assert all(torch.allclose(image, source(caption), atol=1e-6)
                   for image, caption in zip(rows.images, rows.captions, strict=True))


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_plan_knows_the_images_it_will_show(rank: int, world_size: int) -> None:
    share = plan(1, first=3, rank=rank, world_size=world_size)
    shown = {image for micro_step in (3, 4) for image in share.batch(micro_step).seen}
    found = share.seen_images(5)
    assert set(found) == shown and 2 <= len(found) == len(shown) <= 4
    assert share.seen_images(3) == [] and len(plan(3).seen_images(1)) == 6
    assert share.seen_images(10**9) == share.seen_images()       # it stops when it has all
    assert len(share.seen_images()) == 16
