"""Tests of ICO: the fine-tuning prompts of Eq 2, worked out by hand, and the rates of what learns in them."""
from __future__ import annotations

import pytest
from torch import nn

from ldm.customization.ico import PromptScheme, learning_rate_groups


@pytest.mark.parametrize(("prefix", "suffix", "caption"), [
    (3, 1, "<ctx-0-2-0> <ctx-0-2-1> <ctx-0-2-2> <new1> <new2> cat <ctx-0-2-3>"),
    (1, 0, "<ctx-0-2-0> <new1> <new2> cat"), (0, 0, "<new1> <new2> cat")])
def test_a_caption_is_contexts_words_noun_contexts(prefix: int, suffix: int, caption: str) -> None:
    """P_i = [I]_i,1..p [T]_1..n [E] [I]_i,p+1..p+s, here of image 2."""
    assert PromptScheme(("<new1>", "<new2>"), "cat", prefix, suffix).caption(2) == caption


def test_every_image_and_concept_has_contexts_of_its_own() -> None:
    schemes = [PromptScheme((f"<new{index}>",), "cat", 2, 1, index=index) for index in range(2)]
    names = [name for scheme in schemes for image in range(3) for name in scheme.context_words(image)]
    assert len(set(names)) == len(names) == 2 * 3 * 3


def test_the_manual_baseline_is_a_template() -> None:
    assert PromptScheme(("<new1>",), "cat", template="photo of a {}").caption(0) == "photo of a <new1> cat"


def test_every_kind_has_its_rate_and_weights_alone_decay() -> None:
    weight, word, context = (nn.Parameter() for _ in range(3))
    groups = learning_rate_groups([weight], [word], [context], 6e-5, 0.5, 10.0, 0.01)
    assert [(group["params"], group["lr"], group["weight_decay"]) for group in groups] == [
        ([weight], 3e-5, 0.01), ([word], 6e-5, 0.0), ([context], pytest.approx(6e-4), 0.0)]
    assert [group["params"] for group in learning_rate_groups([], [word], [], 6e-5, 1.0, 10.0, 0.01)] == [[word]]
