"""Tests of the drawn world on sprites of our own, where OpenCV is installed (the extra "pretrain")."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("cv2")

from small_world.sprites import checks, zigzags
from small_world.styles import STYLES
from small_world.world import NOUNS, PATTERNS, SmallWorld, WorldConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """A world of one noun, a disc."""
    folder = tmp_path_factory.mktemp("sprites")
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((8, 8, 56, 56), fill=(200, 120, 40, 255))
    for code in {*NOUNS["cat"].sprites, "1f408"}:
        disc.save(folder / f"{code}.webp", lossless=True)
    return SmallWorld(folder, WorldConfig(nouns=1))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_drawn_in_every_style(world: SmallWorld, pattern: str, style: str) -> None:
    """OpenCV's filters take no float64, which numpy 2 makes of float32 times a float64 scalar."""
    picture = world.draw(3, noun="cat", pattern=pattern, style=style, colour=("red", "white"), relation="")
    assert picture.image.shape == (64, 64, 3) and picture.image.dtype == np.uint8
    assert picture.truth.pattern == pattern and pattern.split("-")[0] in picture.caption


def test_checks_and_zigzags_by_hand() -> None:
    """At the middle of squares, and of bands one turn apart."""
    line = np.array([0.0, 0.2, 0.4])                       # half a turn of 4 / 1.6 = 2.5 a side is 0.2
    squares = checks(line[None, :], line[:, None], 4.0)
    assert np.array_equal(squares, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    across = np.array([0.0, 0.25, 0.5])                    # a period of 2 x 0.9: down, half way, up
    climb = 0.2 * np.abs(across * 1.8 % 1 - 0.5)
    for turns, expected in ((0.0, 1.0), (0.5, 0.0), (1.0, 1.0)):
        assert np.allclose(zigzags(across, turns / 2 - climb, 2.0), expected)
