"""Sprites of the small world: reading, recolouring, painting with patterns and laying them over a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ldm.data.images import read_image_file
from small_world.scenes import edge

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.09, 0.11), "orange": (0.99, 0.51, 0.06), "yellow": (0.98, 0.86, 0.12),
    "green": (0.13, 0.65, 0.22), "blue": (0.11, 0.35, 0.94), "purple": (0.50, 0.17, 0.78),
    "pink": (0.99, 0.53, 0.75), "black": (0.12, 0.12, 0.14), "white": (0.94, 0.94, 0.96),
    "brown": (0.47, 0.28, 0.14),
}


@dataclass(frozen=True, eq=False)
class Sprite:
    """A cropped sprite: plain colours, opacity and tone (0 dark, 0.5 usual, 1 light)."""

    rgb: np.ndarray
    alpha: np.ndarray
    tone: np.ndarray

    def premultiplied(self, rgb: np.ndarray | None = None) -> np.ndarray:
        """Return the sprite, or other colours in its outline, as premultiplied RGBA."""
        alpha = self.alpha[..., None]
        return np.concatenate([(self.rgb if rgb is None else rgb) * alpha, alpha], -1)

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y from the sprite's middle in parts of its longer side."""
        height, width = self.alpha.shape
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        return (x - width / 2) / max(height, width), (y - height / 2) / max(height, width)


def load_sprite(path: Path, side: int) -> Sprite:
    """Read a sprite file, cut it to its outline and scale its longer side to `side`."""
    pixels = np.asarray(read_image_file(path, lambda image: image.convert("RGBA"))).astype(np.float32) / 255
    rows, columns = np.where(pixels[..., 3] > 0.05)
    pixels = pixels[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    pixels[..., :3] *= pixels[..., 3:]
    scale = side / max(pixels.shape[:2])
    shape = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    pixels = cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA)
    alpha = pixels[..., 3]
    rgb = pixels[..., :3] / np.maximum(alpha, 1e-3)[..., None]
    grey = rgb @ np.array((0.35, 0.45, 0.2), np.float32)
    low, usual, high = np.percentile(grey[alpha > 0.5], (2, 50, 98))
    below, above = (grey - low) / max(usual - low, 0.08), (grey - usual) / max(high - usual, 0.08)
    tone = np.where(grey < usual, below / 2, 0.5 + above / 2).clip(0, 1).astype(np.float32)
    return Sprite(rgb, alpha, tone)


def shade(base: np.ndarray, sprite: Sprite, contrast: float = 1.0) -> np.ndarray:
    """Paint a sprite with a colour or a colour map, keeping its shading."""
    tone = (0.5 + (sprite.tone - 0.5) * contrast)[..., None]
    brightness = base.mean(-1, keepdims=True)
    light = base + (1 - base) * (0.25 + 0.5 * brightness)
    dark_part = base * (0.25 + 0.75 * np.sqrt((2 * tone).clip(0, 1)))
    return (dark_part + (light - base) * (2 * tone - 1).clip(0, 1) ** 1.5).astype(np.float32)


def colour_of(name: str) -> np.ndarray:
    """Return a named colour as floats."""
    return np.array(COLOURS[name], np.float32)


def stripes(across: np.ndarray, count: float, phase: float = 0.0) -> np.ndarray:
    """Return soft-edged stripes, `count` of them over the sprite's longer side."""
    return edge(np.cos(2 * np.pi * (across * count + phase)), 0.25)


def spots(x: np.ndarray, y: np.ndarray, gap: float, radius: float) -> np.ndarray:
    """Return discs on a staggered grid around the middle of the sprite."""
    row = np.round(y / (gap * 0.87))
    across = (x + gap / 2 * (row % 2)) / gap
    return edge(radius - np.hypot((across - np.round(across)) * gap, y - row * gap * 0.87), 0.015)


def checks(across: np.ndarray, down: np.ndarray, count: float, phase: float = 0.0) -> np.ndarray:
    """Return soft-edged squares, every other one set; 1.6 of `count` pairs a side."""
    return edge(np.cos(2 * np.pi * (across * count / 1.6 + phase)) * np.cos(2 * np.pi * down * count / 1.6), 0.12)


def zigzags(across: np.ndarray, down: np.ndarray, count: float, phase: float = 0.0) -> np.ndarray:
    """Return bands that run up and down, `count` of them over the sprite's longer side."""
    return stripes(down + 0.2 * np.abs((across * count * 0.9) % 1 - 0.5), count, phase)


def star(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return a five-pointed star around the origin."""
    angles = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.42, 1.0) * radius
    corners = np.stack([reach * np.sin(angles), -reach * np.cos(angles)], 1).astype(np.float32)
    step = float(x[0, 1] - x[0, 0])
    mask = np.zeros(x.shape, np.float32)
    sixteenths = np.round((corners - (x[0, 0], y[0, 0])) / step * 16).astype(np.int32)
    cv2.fillPoly(mask, [sixteenths], 1.0, cv2.LINE_8, 4)
    return cv2.GaussianBlur(mask, (0, 0), 0.6)


def two_tone(first: str, second: str, mask: np.ndarray) -> np.ndarray:
    """Return a colour map that is the second colour where the mask is set."""
    return colour_of(first) + (colour_of(second) - colour_of(first)) * mask[..., None]


class Canvas:
    """A picture under composition: sprites are laid over a background one by one."""

    def __init__(self, background: np.ndarray, light: tuple[float, float, float], shadows: bool) -> None:
        """Start from a background in the scene's light."""
        self.image = background
        self._light = np.array((*light, 1.0), np.float32)
        self._shadows = shadows

    def place(self, layer: np.ndarray, centre: tuple[float, float], side: float, tilt: float, mirror: bool,
              shadow: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Lay a sprite over the picture and return its opacity there and the affine map used."""
        large, (height, width) = self.image.shape[0], layer.shape[:2]
        scale, angle = side * large / max(height, width), np.deg2rad(tilt)
        turn = scale * np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
        if mirror:
            turn = turn @ np.diag((-1.0, 1.0))
        middle = np.array(centre) * large
        move = np.column_stack([turn, middle - turn @ (width / 2, height / 2)])
        if shadow and self._shadows:
            self._darken(middle[0], middle[1] + height * scale * 0.47, width * scale * 0.42)
        placed = cv2.warpAffine(layer * self._light, move, (large, large), flags=cv2.INTER_LINEAR)
        self.image = self.image * (1 - placed[..., 3:]) + placed[..., :3]
        return placed[..., 3], move

    def _darken(self, x: float, y: float, reach: float) -> None:
        """Put a soft oval shadow on the ground."""
        quarter = self.image.shape[0] // 4
        oval = np.zeros((quarter, quarter), np.float32)
        axes = max(1, int(reach / 4)), max(1, int(reach / 16))
        cv2.ellipse(oval, (int(x / 4), int(y / 4)), axes, 0, 0, 360, 1.0, -1)
        oval = cv2.GaussianBlur(oval, (0, 0), quarter / 28)
        self.image = self.image * (1 - 0.5 * cv2.resize(oval, None, fx=4, fy=4)[..., None])
