"""The seven picture styles of the small world: a photo, and six that paint over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from small_world.scenes import Rng, blend, noise, unit_grid


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Average a picture down to the given side."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def saturate(image: np.ndarray, strength: float) -> np.ndarray:
    """Push every pixel away from its own grey."""
    grey = image.mean(-1, keepdims=True)
    return grey + (image - grey) * strength


def style_photo(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Leave the picture as it is."""
    return shrink(image, side)


def style_oil(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Repaint the picture with coarse and then finer brush strokes."""
    large = image.shape[0]
    canvas = cv2.blur(image, (5, 5))
    source = np.ascontiguousarray(saturate(canvas, 1.3))
    turn = noise(rng, 3, 3, large, 1) * 2 * np.pi
    for count, length, width in ((240, 0.08, 0.045), (800, 0.042, 0.022)):
        places = rng.integers(0, large, (count, 2))
        for (x, y), light in zip(places.tolist(), rng.normal(1, 0.13, count), strict=True):
            step = np.array((np.cos(turn[y, x]), np.sin(turn[y, x]))) * length * large / 2
            ends = (int(x - step[0]), int(y - step[1])), (int(x + step[0]), int(y + step[1]))
            colour, thickness = (source[y, x] * light).tolist(), max(2, round(width * large))
            cv2.line(canvas, *ends, colour, thickness, cv2.LINE_AA)
    return shrink(canvas, side)


def style_watercolour(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Wash the colours out, darken their edges and leave a ragged paper margin."""
    large = image.shape[0]
    x, y = unit_grid(large)
    flat = cv2.bilateralFilter(image, 7, 0.25, 5)
    wash = 0.5 + 0.4 * noise(rng, 5, 5, large)
    edges = np.abs(cv2.Laplacian(flat.mean(-1), cv2.CV_32F))
    painted = 1 - (1 - flat) * wash[..., None] - 0.5 * cv2.blur(edges, (3, 3))[..., None]
    border = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    inside = ((border - 0.13 * noise(rng, 7, 7, large)) / 0.03).clip(0, 1)[..., None]
    return shrink((painted * inside + (1 - inside) * np.array((0.98, 0.97, 0.94))).astype(np.float32), side)


def style_pencil(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Keep outlines and hatch the shadows in grey."""
    large = image.shape[0]
    x, y = unit_grid(large)
    grey = image.mean(-1)
    lines = (grey / (cv2.GaussianBlur(grey, (0, 0), large / 36) + 0.03)).clip(0, 1) ** 2.2
    hatching = ((x + y) * 32 + 1.5 * noise(rng, 4, 4, large)) % 2 < 1
    drawn = lines - hatching * (0.55 - grey).clip(0, 0.4) * 0.9 + rng.normal(0, 0.02, grey.shape)
    return shrink((drawn[..., None] * np.array((0.97, 0.965, 0.94))).astype(np.float32), side)


def style_pixel_art(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Show the picture in cells of 4 x 4 pixels and few colours."""
    cells = np.round(saturate(shrink(image, side // 4), 1.25) * 6) / 6
    return cv2.resize(cells, (side, side), interpolation=cv2.INTER_NEAREST)


def style_stained_glass(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Fill about 80 irregular panes with their mean colour between dark lead lines."""
    large, columns = image.shape[0], 9
    spots = (np.stack(np.mgrid[0:columns, 0:columns], -1).reshape(-1, 2) + rng.uniform(0, 1, (columns**2, 2)))
    spots = (spots * large / columns).astype(int).clip(0, large - 1)
    seeds = np.ones((large, large), np.uint8)
    seeds[spots[:, 0], spots[:, 1]] = 0
    pane = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1]
    sizes = np.bincount(pane.ravel()).clip(1)
    means = [np.bincount(pane.ravel(), image[..., c].ravel(), len(sizes)) / sizes for c in range(3)]
    glass = saturate(np.stack(means, -1)[pane].astype(np.float32), 1.7) * 1.1
    lead = cv2.morphologyEx(pane.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return shrink(blend(glass, (14, 14, 18), lead), side)


def style_old_photograph(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Turn the picture brown and faded, with grain, dark corners and a pale border."""
    large = image.shape[0]
    x, y = unit_grid(large)
    grey = 0.08 + 0.85 * image.mean(-1) + rng.normal(0, 0.04, (large, large))
    grey = grey * (1.1 - 0.9 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))
    brown = grey[..., None] * np.array((1.06, 0.86, 0.6))
    border = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) < 0.045
    return shrink(blend(brown, (236, 222, 190), border).astype(np.float32), side)


@dataclass(frozen=True)
class Style:
    """A style's caption prefixes and the filter that gives a picture its look."""

    prefixes: tuple[str, ...]
    apply: Callable[[np.ndarray, Rng, int], np.ndarray]


STYLES: dict[str, Style] = {
    "photo": Style(("a photo of", "a photo of", "a picture of", ""), style_photo),
    "oil painting": Style(("an oil painting of",), style_oil),
    "watercolour": Style(("a watercolour painting of",), style_watercolour),
    "pencil sketch": Style(("a pencil sketch of", "a pencil drawing of"), style_pencil),
    "pixel art": Style(("a pixel art picture of", "pixel art of"), style_pixel_art),
    "stained glass": Style(("a stained glass picture of", "a stained glass window of"), style_stained_glass),
    "old photograph": Style(("an old photograph of",), style_old_photograph),
}
