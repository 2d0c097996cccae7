"""Tests of ldm/evaluation/{statistics,metrics}.py against numbers worked out by hand."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from experiments.areas import area, compare_areas, difference, frontier
from experiments.experiment import area_table

from ldm.evaluation import statistics
from ldm.evaluation.metrics import SCALES, diversity, image_alignment, kid, text_alignment, unit
from ldm.evaluation.report import summarize, table
from ldm.evaluation.statistics import Estimate, estimate, unit_means

ORIGIN = np.zeros(2)


# The area under a trade-off curve.

def test_only_undominated_points_make_the_curve() -> None:
    points = np.array([[2, 1.9], [1, 3], [3, 1], [1, 2], [2, 2], [1.5, 1], [0.5, 3]])
    assert frontier(points).tolist() == [[1, 3], [2, 2], [3, 1]]


@pytest.mark.parametrize(("points", "corner", "expected"), [
    ([[1, 3], [2, 2], [3, 1]], (0, 0), 1 * 3 + 2.5 + 1.5),       # a level part, two slopes, a straight fall
    ([[2, 3]], (0, 0), 6.0),
    ([[2, 3]], (1, 1), 2.0),
    ([[2, 3], [1, 1]], (0, 0), 6.0),                             # a dominated point adds nothing
    ([[1, 3], [2, 2], [3, 1]], (1, 1), 0 + 1.5 + 0.5),
    ([[1, 3], [2, 0.5]], (0, 1), 2 + 1.0)])                      # below the corner counts as on it
def test_area_under_a_curve(points: list, corner: tuple, expected: float) -> None:
    assert area(np.array(points, float), np.array(corner, float)) == pytest.approx(expected)
    assert area(np.array(points[::-1], float), np.array(corner, float)) == pytest.approx(expected)


def test_areas_are_shares_of_the_common_box() -> None:
    # Two curves of two points, the same for both units: no spread, so that the interval is the value.
    low = np.array([[[0.0, 0.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])             # (0, 2), (1, 1)
    high = np.array([[[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]])            # (1, 3), (2, 2)
    result = compare_areas({"low": low, "high": high}, [("high", "low")], range(2))
    assert result.corner == (0, 1) and result.box == (2, 2)
    # In units of the box: low (0, .5), (.5, 0) has 0.5 x 0.5 / 2; high (.5, 1), (1, .5) has 0.5 x 1 + 0.5 x 0.75.
    assert result.areas["low"].mean == pytest.approx(0.125) and result.areas["high"].mean == pytest.approx(0.875)
    gain = result.differences["high", "low"]
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.75, 0.75, 0.75)) and gain.excludes_zero


def test_areas_are_resampled_together() -> None:
    # Units differ wildly, but one curve is the other moved: the difference is nearly the same in every resampling.
    rng = np.random.default_rng(0)
    curve = rng.normal(0, 1, (3, 2, 40))
    result = compare_areas({"a": curve, "b": curve + 0.5}, [("b", "a")], range(40))
    gain = result.differences["b", "a"]
    assert gain.excludes_zero and gain.mean > 0 and gain.units == 40
    same = compare_areas({"a": curve, "b": curve}, [("b", "a")], range(40)).differences["b", "a"]
    assert (same.mean, same.low, same.high) == (0, 0, 0) and not same.excludes_zero


def test_what_all_curves_share_does_not_widen_areas() -> None:
    # Units differ wildly, and in the same way everywhere: every resampling moves both curves alike, and no area.
    shared = np.random.default_rng(0).normal(0, 100, (1, 1, 40))
    low, high = np.array([[[0.0], [1.0]], [[1.0], [0.0]]]), np.array([[[1.0], [2.0]], [[2.0], [1.0]]])
    result = compare_areas({"low": low + shared, "high": high + shared}, [("high", "low")], range(40))
    # In the box of 2 x 2: low (0, .5), (.5, 0) has 0.125; high (.5, 1), (1, .5) has 0.5 + 0.375.
    for found, expected in ((result.areas["low"], 0.125), (result.areas["high"], 0.875),
                            (result.differences["high", "low"], 0.75)):
        assert (found.mean, found.low, found.high) == pytest.approx((expected,) * 3)


def test_areas_of_one_unit_have_no_interval() -> None:
    low, high = np.array([[[0.0], [2.0]], [[1.0], [1.0]]]), np.array([[[1.0], [3.0]], [[2.0], [2.0]]])
    result = compare_areas({"low": low, "high": high}, [("high", "low")], range(1))
    gain = result.differences["high", "low"]
    assert gain == Estimate(0.75, units=1) and result.areas["low"] == Estimate(0.125, units=1)
    assert not gain.excludes_zero and "| high - low | 0.750 | |" in area_table(result).replace("  ", " ")


def test_curves_of_different_lengths_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_areas({"a": np.zeros((2, 2, 3)), "b": np.zeros((3, 2, 3))}, [], range(3))


# Bootstrap.

def test_bootstrap_intervals_by_hand() -> None:
    # Of the 27 resamplings of three units one has the mean 0 and one 5; three have 1/3 and three 11/3.
    values = np.array([0.0, 1.0, 5.0])
    result = estimate(dict(enumerate(values)), draws=20_000)
    assert (result.mean, result.units) == (2, 3)
    assert (result.low, result.high) == pytest.approx((0, 5))                       # 1/27 is more than 2.5 %
    drawn = statistics.resamplings(range(3), 20_000) @ values
    assert statistics.interval(drawn, 0.9) == pytest.approx((1 / 3, 11 / 3))        # and less than 5 %


def test_the_unit_is_the_prompt_not_the_image() -> None:
    means = unit_means([1.0, 3.0, 10.0, None], ["snow", "snow", "moon", "moon"])
    assert means == {"snow": 2.0, "moon": 10.0}
    assert estimate(means).mean == 6
    assert unit_means([None], ["snow"]) == {}


def test_one_unit_has_no_interval_and_none_is_an_error() -> None:
    assert estimate({"snow": 2.0}) == Estimate(2.0, units=1)
    assert str(Estimate(2.0)) == "2.000" and str(Estimate(2.0, 1.0, 3.0)) == "2.000 [1.000, 3.000]"
    assert not Estimate(2.0).excludes_zero and Estimate(-2.0, -3.0, -1.0).excludes_zero
    with pytest.raises(ValueError, match="nothing"):
        estimate({})


def test_differences_are_paired() -> None:
    first, second = {"a": 10.0, "b": 0.0, "c": 7.0}, {"b": -1.0, "a": 9.0, "d": 3.0}
    result = difference(first, second)
    assert (result.mean, result.low, result.high, result.units) == (1.0, 1.0, 1.0, 2)


def test_resamplings_are_the_same_every_time() -> None:
    weights = statistics.resamplings(range(5), 7, seed=3)
    assert np.array_equal(weights, statistics.resamplings(range(5), 7, seed=3)) and weights.shape == (7, 5)
    assert np.allclose(weights.sum(axis=1), 1)


def test_concepts_and_prompts_are_drawn_each_by_themselves() -> None:
    units = [(concept, prompt) for concept in "ab" for prompt in "xyz"]
    weights = statistics.resamplings(units, 20_000).reshape(-1, 2, 3)
    # Concept a is drawn twice, once or never of two: weights 1, 1/2, 0 in a quarter, a half, a quarter of the draws.
    of_a = weights[:, 0].sum(axis=1)
    assert [(np.isclose(of_a, share)).mean() for share in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    # A prompt is drawn for all concepts or for none, so that the table has rank one.
    assert np.allclose(weights, weights.sum(axis=2, keepdims=True) * weights.sum(axis=1, keepdims=True))
    # What differs between concepts only is as uncertain as two concepts are, however many prompts each has.
    means = {unit: 1.0 if unit[0] == "a" else 0.0 for unit in units}
    assert estimate(means) == Estimate(0.5, 0.0, 1.0, 6)
    # Where not every concept has every prompt, each draw still averages something.
    ragged = statistics.resamplings([("a", "x"), ("b", "y")], 1000)
    assert 0 < len(ragged) < 1000 and np.allclose(ragged.sum(axis=1), 1)


# Metrics.

def test_alignments() -> None:
    images, texts = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]])
    assert text_alignment(images, texts).tolist() == pytest.approx([0.0, 1.0])
    references = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert image_alignment(images, references).tolist() == pytest.approx([0.5, 0.5 ** 0.5])     # means of cosines


def test_negative_cosines_count_as_zero_one_by_one_or_in_the_mean() -> None:
    rows = [{"concept": "c", "prompt": prompt, "clip_t": value} for prompt, value in (("x", 0.4), ("y", -0.2))]
    found = table({"all": summarize(rows, ["clip_t"])}, {"clip_t": "CLIP-T"})
    means = [float(line.split("|")[2].split()[0]) for line in found.splitlines()[2:]]
    assert means == [0.1, 0.5, 10.0]          # cosine; CLIPScore clips each image's, torchmetrics the mean


def test_scales_by_name() -> None:
    values = {name: (change(0.3), change(-0.3)) for name, change in SCALES.items()}
    assert values == {"cosine": (0.3, -0.3), "2.5 max(cosine, 0)": (0.75, 0.0), "100 max(cosine, 0)": (30.0, 0.0)}


def test_kid_by_hand() -> None:
    # D = 1, so k(x, y) = (x y + 1)^3. x: k(0, 1) = 1. y: k(1, 2) = 27. Across: 1, 1, 8, 27, of which the mean is 9.25.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kid(x, y) == pytest.approx(1 + 27 - 2 * 9.25)


def test_kid_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 6, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.4))
    assert kid(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-6)
    assert kid(x, y[:13]) == pytest.approx(kid(y[:13], x))
    assert abs(kid(x[:10], x[10:])) < kid(x, y + 2)


def test_diversity() -> None:
    assert diversity(torch.tensor([[1.0, 0.0]])) is None
    assert diversity(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) == pytest.approx(0.0)
    assert diversity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])) == pytest.approx(2 / 3)
    assert unit(torch.tensor([[3.0, 4.0]])).tolist() == [pytest.approx([0.6, 0.8])]
