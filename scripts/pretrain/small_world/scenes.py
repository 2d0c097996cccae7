"""The sixteen drawn scenes of the small world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

Rng = np.random.Generator
Rgb = tuple[float, float, float]
WHITE: Rgb = (255, 255, 255)


@lru_cache(maxsize=8)
def unit_grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and y coordinates, 0..1, of every pixel of a square picture."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return x, y


def noise(rng: Rng, rows: int, columns: int, side: int, octaves: int = 3) -> np.ndarray:
    """Return smooth noise in 0..1 whose coarsest octave has `rows` x `columns` cells."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        cells = rng.random((rows << octave, columns << octave)).astype(np.float32)
        total += cv2.resize(cells, (side, side), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return (total / (2 - 0.5 ** (octaves - 1))).clip(0, 1)


def tint(rng: Rng, rgb: Rgb, spread: float = 0.03) -> np.ndarray:
    """Return a slightly random version of a 0..255 colour as 0..1 floats."""
    return (np.array(rgb) / 255 + rng.normal(0, spread, 3)).clip(0, 1).astype(np.float32)


def gradient(first: np.ndarray, last: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Blend two colours along a position map that runs from 0 to 1."""
    return first + (last - first) * position.clip(0, 1)[..., None]


def blend(image: np.ndarray, colour: np.ndarray | Rgb, mask: np.ndarray) -> np.ndarray:
    """Lay a colour (0..255 tuple) or a float picture over an image where the mask is set."""
    if isinstance(colour, tuple):
        colour = np.array(colour, np.float32) / 255
    return image + (colour - image) * mask[..., None].astype(np.float32)


def edge(distance: np.ndarray, width: float = 0.01) -> np.ndarray:
    """Turn a signed distance into a soft mask that is 1 on the positive side."""
    return (distance / width).clip(-1, 1) * 0.5 + 0.5


def dots(rng: Rng, side: int, count: int, radius: tuple[float, float], rows: tuple[float, float] = (0, 1),
         ring: bool = False) -> np.ndarray:
    """Return a mask of random discs (or rings) with radii in parts of the side."""
    mask = np.zeros((side, side), np.float32)
    thickness = max(1, round(side / 110)) if ring else -1
    for _ in range(count):
        centre = int(rng.uniform(0, side)), int(rng.uniform(*rows) * side)
        size = max(1, round(rng.uniform(*radius) * side))
        cv2.circle(mask, centre, size, float(rng.uniform(0.65, 1)), thickness, cv2.LINE_AA)
    return mask


def floor_below(rng: Rng, image: np.ndarray, horizon: float, far: np.ndarray, near: np.ndarray,
                roughness: float, cells: tuple[int, int], waviness: float = 0.0) -> np.ndarray:
    """Cover the picture below a (wavy) horizon with textured ground."""
    side = image.shape[0]
    _, y = unit_grid(side)
    line = horizon + waviness * 2 * (noise(rng, 2, 4, side)[:1] - 0.5)
    texture = 1 + roughness * 2 * (noise(rng, *cells, side)[..., None] - 0.5)
    ground = gradient(far, near, (y - horizon) / (1 - horizon)) * texture
    return blend(image, ground, edge(y - line))


def sky(rng: Rng, side: int, top: Rgb, bottom: Rgb, horizon: float) -> np.ndarray:
    """Return a vertical sky gradient that ends at the horizon."""
    return gradient(tint(rng, top), tint(rng, bottom), unit_grid(side)[1] / horizon)


def aside(rng: Rng) -> float:
    """Return an x in the left or right third, where the subject seldom hides what stands there."""
    x = rng.uniform(0.16, 0.28)
    return x if rng.random() < 0.5 else 1 - x


def draw_beach(rng: Rng, side: int) -> np.ndarray:
    """Draw sky, sea, a line of foam and sand."""
    x, y = unit_grid(side)
    horizon = rng.uniform(0.27, 0.38)
    shore = horizon + rng.uniform(0.17, 0.25)
    image = sky(rng, side, (120, 195, 245), (210, 238, 252), horizon)
    sea = gradient(tint(rng, (15, 105, 190)), tint(rng, (60, 205, 215)), (y - horizon) / (shore - horizon))
    image = blend(image, sea, edge(y - horizon))
    line = shore + 0.025 * np.sin(x * rng.uniform(8, 18) + rng.uniform(0, 6))
    sand = tint(rng, (243, 216, 155), 0.015) * (1 + 0.16 * (noise(rng, 20, 20, side)[..., None] - 0.5))
    image = blend(image, sand, edge(y - line))
    return blend(image, WHITE, np.exp(-(((y - line) / 0.02) ** 2)))


def draw_snow(rng: Rng, side: int) -> np.ndarray:
    """Draw a white field with fir trees and falling flakes."""
    x, y = unit_grid(side)
    horizon = rng.uniform(0.42, 0.55)
    image = sky(rng, side, (150, 182, 215), (215, 228, 242), horizon)
    for _ in range(rng.integers(3, 6)):
        centre, height = aside(rng) + rng.normal(0, 0.05), rng.uniform(0.18, 0.32)
        down = (y - horizon + height) / height
        tier = 0.55 + 0.45 * ((down * 3) % 1)
        tree = edge(0.16 * height / 0.25 * down * tier - np.abs(x - centre)) * (down > 0) * (down < 1.05)
        image = blend(image, tint(rng, (45, 95, 85), 0.02), tree)
        image = blend(image, (240, 246, 255), tree * ((down * 3) % 1 < 0.3) * 0.8)
    white, shade = tint(rng, (242, 247, 255), 0.01), tint(rng, (212, 226, 248), 0.01)
    image = floor_below(rng, image, horizon, white, shade, 0.06, (4, 3), 0.03)
    return blend(image, WHITE, dots(rng, side, int(rng.integers(40, 70)), (0.007, 0.014)))


def draw_forest(rng: Rng, side: int) -> np.ndarray:
    """Draw trunks under a canopy of leaves."""
    x, y = unit_grid(side)
    backdrop = gradient(tint(rng, (105, 160, 95)), tint(rng, (60, 115, 60)), y)
    image = backdrop * (0.8 + 0.5 * noise(rng, 6, 6, side)[..., None])
    count = int(rng.integers(6, 9))
    for place in (np.arange(count) + rng.uniform(0.2, 0.8, count)) / count:
        trunk = edge(rng.uniform(0.018, 0.035) - np.abs(x - place - 0.015 * np.sin(y * 6 + place * 40)))
        brown = tint(rng, (78, 52, 33), 0.02) * rng.uniform(0.65, 1.1)
        image = blend(image, brown, trunk * (y < rng.uniform(0.68, 0.84)))
    leaves = tint(rng, (35, 105, 40)) * (0.6 + 0.8 * noise(rng, 20, 20, side)[..., None])
    image = blend(image, leaves, edge(noise(rng, 8, 8, side) * 0.9 - y * 1.7 + 0.05, 0.06))
    green, earth = tint(rng, (75, 105, 42)), tint(rng, (85, 75, 42))
    return floor_below(rng, image, rng.uniform(0.64, 0.72), green, earth, 0.35, (14, 12), 0.03)


def draw_desert(rng: Rng, side: int) -> np.ndarray:
    """Draw orange dunes under a hot sun."""
    x, y = unit_grid(side)
    horizon = rng.uniform(0.4, 0.52)
    image = sky(rng, side, (105, 170, 225), (250, 226, 180), horizon)
    image = blend(image, (255, 244, 170), edge(0.075 - np.hypot(x - aside(rng), y - 0.17)))
    for dune in range(3):
        wave = rng.uniform(0.03, 0.06) * np.sin(x * rng.uniform(4, 8) + rng.uniform(0, 6))
        top = horizon + dune * (1 - horizon) / 3 + wave
        light = 0.82 + 0.33 * ((y - top) / 0.3).clip(0, 1)
        sand = tint(rng, (228, 155, 75), 0.02) * (1 - 0.08 * dune)
        image = blend(image, sand * light[..., None], edge(y - top))
    return image


def draw_night(rng: Rng, side: int) -> np.ndarray:
    """Draw a dark blue sky with stars and a crescent."""
    x, y = unit_grid(side)
    image = gradient(tint(rng, (10, 12, 52), 0.02), tint(rng, (45, 50, 118), 0.02), y)
    stars = dots(rng, side, int(rng.integers(30, 55)), (0.003, 0.01), (0, 0.75))
    image = blend(image, (255, 255, 225), stars)
    moon_x, moon_y, radius = aside(rng), rng.uniform(0.15, 0.24), rng.uniform(0.08, 0.11)
    disc = edge(radius - np.hypot(x - moon_x, y - moon_y))
    bite = edge(radius - np.hypot(x - moon_x - radius * 0.5, y - moon_y + radius * 0.2))
    image = blend(image, (255, 243, 175), disc * (1 - bite))
    dark, darker = tint(rng, (16, 30, 42), 0.01), tint(rng, (9, 15, 28), 0.01)
    return floor_below(rng, image, rng.uniform(0.72, 0.8), dark, darker, 0.2, (8, 6), 0.05)


def draw_moon(rng: Rng, side: int) -> np.ndarray:
    """Draw grey ground with craters, a black sky and the earth."""
    x, y = unit_grid(side)
    horizon = rng.uniform(0.45, 0.56)
    image = np.full((side, side, 3), 0.02, np.float32)
    image = blend(image, WHITE, dots(rng, side, int(rng.integers(18, 35)), (0.003, 0.007)))
    earth_x, earth_y, radius = aside(rng), rng.uniform(0.17, 0.24), rng.uniform(0.1, 0.13)
    land = edge(noise(rng, 9, 9, side) - 0.52, 0.03)
    globe = blend(np.full_like(image, 0) + np.array((0.2, 0.45, 0.88), np.float32), (70, 160, 75), land)
    image = blend(image, globe, edge(radius - np.hypot(x - earth_x, y - earth_y)))
    light, dark = tint(rng, (185, 185, 188), 0.01), tint(rng, (130, 130, 135), 0.01)
    image = floor_below(rng, image, horizon, light, dark, 0.16, (9, 9), 0.03)
    for _ in range(rng.integers(7, 11)):
        centre, middle = rng.random(), rng.uniform(horizon + 0.07, 1)
        radius = rng.uniform(0.05, 0.12) * (0.45 + middle - horizon)
        distance = np.hypot(x - centre, (y - middle) * 2.2)
        image = blend(image, (88, 88, 93), edge(radius - distance) * 0.85)
        rim = np.exp(-(((distance - radius) / 0.01) ** 2)) * (y > middle)
        image = blend(image, (222, 222, 225), rim * 0.7)
    return image


def draw_underwater(rng: Rng, side: int) -> np.ndarray:
    """Draw blue water with light rays, weeds and bubbles."""
    x, y = unit_grid(side)
    image = gradient(tint(rng, (50, 185, 220)), tint(rng, (5, 60, 130)), y)
    for _ in range(4):
        ray = np.exp(-(((x - rng.random() - rng.uniform(-0.4, 0.4) * y) / 0.05) ** 2))
        image = blend(image, (190, 240, 250), ray * 0.35 * (1 - y))
    bed, deep = tint(rng, (150, 160, 130)), tint(rng, (120, 140, 110))
    image = floor_below(rng, image, rng.uniform(0.84, 0.9), bed, deep, 0.3, (8, 8), 0.03)
    for _ in range(rng.integers(4, 8)):
        stem = np.abs(x - aside(rng) - rng.normal(0, 0.06) - 0.02 * np.sin(y * 25 + rng.uniform(0, 6)))
        image = blend(image, tint(rng, (25, 140, 75)), edge(0.016 - stem) * (y > rng.uniform(0.4, 0.65)))
    bubbles = dots(rng, side, int(rng.integers(10, 18)), (0.015, 0.04), ring=True)
    return blend(image, (220, 248, 255), bubbles * 0.9)


def draw_meadow(rng: Rng, side: int) -> np.ndarray:
    """Draw green grass with flowers under a blue sky."""
    horizon = rng.uniform(0.4, 0.52)
    image = sky(rng, side, (105, 185, 245), (200, 232, 252), horizon)
    image = blend(image, WHITE, ((noise(rng, 3, 3, side) - 0.53) * 6).clip(0, 1) * 0.85)
    light, dark = tint(rng, (125, 208, 70)), tint(rng, (60, 155, 45))
    image = floor_below(rng, image, horizon, light, dark, 0.32, (12, 34), 0.03)
    for petal in ((255, 235, 90), WHITE, (250, 110, 150)):
        spots = dots(rng, side, int(rng.integers(6, 12)), (0.009, 0.017), (horizon + 0.06, 1))
        image = blend(image, petal, spots)
    return image


def draw_street(rng: Rng, side: int) -> np.ndarray:
    """Draw a row of houses with lit windows behind a marked road."""
    x, y = unit_grid(side)
    kerb = rng.uniform(0.58, 0.66)
    image = sky(rng, side, (150, 190, 228), (225, 232, 238), kerb)
    left = rng.uniform(-0.12, 0)
    walls = ((165, 95, 80), (110, 120, 145), (200, 180, 145), (85, 100, 125))
    while left < 1.02:
        width, top = rng.uniform(0.16, 0.25), rng.uniform(0.03, 0.3)
        house = (x > left) & (x < left + width - 0.008) & (y > top)
        across, down = ((x - left) / width * 3) % 1, ((y - top) * 8.5) % 1
        window = (across > 0.25) & (across < 0.75) & (down > 0.25) & (down < 0.8)
        glass = (255, 232, 140) if rng.random() < 0.5 else (50, 68, 100)
        front = blend(np.zeros_like(image) + tint(rng, walls[rng.integers(4)]), glass, window)
        image = blend(image, front, house)
        left += width
    image = blend(image, (188, 184, 178), edge(y - kerb + 0.06))
    asphalt = np.array((0.34, 0.34, 0.37), np.float32)
    image = floor_below(rng, image, kerb, asphalt, asphalt * 0.75, 0.12, (20, 20))
    dashes = (np.abs((y - kerb) / (1 - kerb) - 0.5) < 0.07) & ((x * 3.5 + rng.random()) % 1 < 0.55)
    return blend(image, (250, 244, 205), dashes)


def draw_brick_wall(rng: Rng, side: int) -> np.ndarray:
    """Draw rows of red bricks above a strip of pavement."""
    x, y = unit_grid(side)
    rows = int(rng.integers(8, 11))
    row = np.floor(y * rows).astype(int)
    along = x * rows / 2.3 + 0.5 * (row % 2)
    shade = rng.random((40, 40)).astype(np.float32)[row % 40, np.floor(along).astype(int) % 40]
    texture = (0.8 + 0.35 * shade) * (0.92 + 0.16 * noise(rng, 16, 16, side))
    image = tint(rng, (176, 70, 50)) * texture[..., None]
    image = blend(image, tint(rng, (214, 204, 192), 0.02), ((y * rows) % 1 < 0.17) | (along % 1 < 0.08))
    stone = tint(rng, (138, 134, 128), 0.02)
    return floor_below(rng, image, rng.uniform(0.84, 0.9), stone, stone * 0.85, 0.15, (10, 10))


def draw_wooden_table(rng: Rng, side: int) -> np.ndarray:
    """Draw brown planks in front of a pale wall."""
    _, y = unit_grid(side)
    back = rng.uniform(0.28, 0.4)
    image = gradient(tint(rng, (238, 229, 210)), tint(rng, (222, 208, 188)), y / back)
    depth = ((y - back) / (1 - back)).clip(0, 1) ** 0.8 * rng.integers(4, 6)
    plank = rng.uniform(0.85, 1.12, 12).astype(np.float32)[depth.astype(int)]
    wood = tint(rng, (170, 106, 56))
    boards = wood * (plank * (0.72 + 0.55 * noise(rng, 30, 3, side)))[..., None]
    boards = blend(boards, wood * 0.4, depth % 1 < 0.09)
    return blend(image, boards, edge(y - back))


def draw_room(rng: Rng, side: int) -> np.ndarray:
    """Draw a striped wall with a window, a floor and a rug."""
    x, y = unit_grid(side)
    floor = rng.uniform(0.64, 0.72)
    walls = ((240, 205, 170), (178, 208, 220), (220, 198, 228), (202, 222, 188))
    wall = tint(rng, walls[rng.integers(4)], 0.02)
    image = np.zeros((side, side, 3), np.float32) + wall
    image = blend(image, wall * 0.9, (x * rng.integers(6, 9)) % 1 < 0.5)
    left, top = rng.choice((0.09, 0.59)), rng.uniform(0.1, 0.14)
    across, down = np.abs(x - left - 0.16), np.abs(y - top - 0.17)
    image = blend(image, (252, 252, 252), (across < 0.17) & (down < 0.18))
    glass = gradient(np.array((0.45, 0.74, 0.97)), np.array((0.86, 0.94, 1)), y * 2).astype(np.float32)
    panes = (across < 0.145) & (down < 0.155) & (across > 0.012) & (down > 0.012)
    image = blend(image, glass, panes)
    image = blend(image, (250, 248, 244), y > floor - 0.04)
    boards = tint(rng, (196, 144, 96))
    image = floor_below(rng, image, floor, boards, boards * 0.82, 0.15, (4, 24))
    rugs = ((190, 45, 60), (55, 90, 165), (80, 135, 85))
    oval = 0.4 - np.hypot(x - 0.5, (y - 0.88) * 3.4)
    image = blend(image, tint(rng, rugs[rng.integers(3)]), edge(oval))
    return blend(image, (245, 230, 200), edge(oval - 0.03) * edge(0.055 - oval))


def draw_sunset(rng: Rng, side: int) -> np.ndarray:
    """Draw a red and orange sky with a low sun over dark water."""
    x, y = unit_grid(side)
    horizon = rng.uniform(0.58, 0.66)
    high, middle, low = tint(rng, (85, 45, 125)), tint(rng, (250, 95, 70)), tint(rng, (255, 200, 80))
    image = gradient(high, middle, y / horizon * 1.7)
    image = blend(image, np.zeros_like(image) + low, ((y / horizon - 0.55) * 2).clip(0, 1))
    image = blend(image, (255, 150, 125), ((noise(rng, 8, 2, side) - 0.58) * 5).clip(0, 1) * 0.6)
    sun_x = aside(rng)
    disc = edge(rng.uniform(0.11, 0.14) - np.hypot(x - sun_x, y - horizon + 0.03))
    image = blend(image, (255, 244, 175), disc)
    far, near = tint(rng, (125, 48, 70)), tint(rng, (48, 22, 52), 0.02)
    image = floor_below(rng, image, horizon, far, near, 0.2, (14, 4), 0.005)
    glitter = np.exp(-(((x - sun_x) / 0.07) ** 2)) * (y > horizon) * ((y * 26) % 1 < 0.5)
    return blend(image, (255, 195, 110), glitter * 0.7)


def draw_rain(rng: Rng, side: int) -> np.ndarray:
    """Draw slanted streaks, dark clouds and puddles in grey light."""
    x, y = unit_grid(side)
    image = gradient(tint(rng, (78, 88, 106), 0.02), tint(rng, (140, 150, 164), 0.02), y)
    image = image * (0.8 + 0.4 * noise(rng, 4, 3, side)[..., None])
    far, near = tint(rng, (92, 100, 110), 0.015), tint(rng, (66, 74, 86), 0.015)
    image = floor_below(rng, image, rng.uniform(0.66, 0.75), far, near, 0.2, (6, 3), 0.02)
    for _ in range(rng.integers(3, 6)):
        oval = rng.uniform(0.08, 0.16) - np.hypot(x - rng.random(), (y - rng.uniform(0.8, 0.96)) * 3.5)
        image = blend(image, (165, 180, 200), edge(oval) * 0.75)
    streaks = np.zeros((side, side), np.float32)
    slant = rng.uniform(-0.3, 0.3)
    for _ in range(rng.integers(55, 80)):
        left, top, length = rng.uniform(0, side), rng.uniform(-0.1, 1) * side, rng.uniform(0.07, 0.13) * side
        ends = (int(left), int(top)), (int(left + slant * length), int(top + length))
        cv2.line(streaks, *ends, float(rng.uniform(0.6, 1)), max(1, round(side / 110)), cv2.LINE_AA)
    return blend(image, (222, 234, 248), streaks * 0.85)


def draw_mountains(rng: Rng, side: int) -> np.ndarray:
    """Draw snow-capped peaks behind a green foreground."""
    x, y = unit_grid(side)
    image = sky(rng, side, (110, 175, 238), (218, 233, 248), 0.7)
    for centre in (rng.uniform(0.4, 0.6), rng.uniform(0.08, 0.25), rng.uniform(0.75, 0.92)):
        peak, steep = rng.uniform(0.09, 0.24), rng.uniform(1.1, 1.6)
        body = edge(y - peak - np.abs(x - centre) * steep + 0.05 * (noise(rng, 8, 8, side) - 0.5))
        lit = np.where(x > centre, 0.72, 1.0)[..., None].astype(np.float32)
        cap = edge(0.13 - (y - peak) + 0.1 * (noise(rng, 9, 9, side) - 0.5))
        image = blend(image, tint(rng, (108, 106, 132), 0.02) * lit, body)
        image = blend(image, np.array((0.98, 0.99, 1), np.float32) * (0.25 + 0.75 * lit), body * cap)
    light, dark = tint(rng, (110, 160, 90)), tint(rng, (70, 120, 60))
    return floor_below(rng, image, rng.uniform(0.66, 0.74), light, dark, 0.25, (8, 8), 0.04)


def draw_space(rng: Rng, side: int) -> np.ndarray:
    """Draw black space with coloured clouds, stars and a ringed planet."""
    x, y = unit_grid(side)
    image = np.zeros((side, side, 3), np.float32) + np.array((0.03, 0.02, 0.08), np.float32)
    for cloud in ((125, 30, 150), (20, 100, 140), (170, 40, 110)):
        image = blend(image, cloud, ((noise(rng, 4, 4, side) - 0.5) * 4).clip(0, 1) * 0.65)
    image = blend(image, WHITE, dots(rng, side, int(rng.integers(45, 70)), (0.003, 0.008)))
    centre, middle, radius = aside(rng), rng.choice((0.18, 0.82)), rng.uniform(0.09, 0.12)
    across, down = x - centre, y - middle
    paints = ((238, 115, 75), (225, 185, 110), (120, 195, 205))
    planet = tint(rng, paints[rng.integers(3)]) * (1 - 2.2 * (across + down).clip(-0.1, 0.25))[..., None]
    image = blend(image, planet, edge(radius - np.hypot(across, down)))
    ring = np.hypot((across + 0.35 * down) * 0.55, (down - 0.25 * across) * 2.3)
    front = 1 - (np.hypot(across, down) < radius) * (down - 0.25 * across < 0)
    return blend(image, (246, 222, 170), np.exp(-(((ring - radius) / 0.014) ** 2)) * front * 0.9)


@dataclass(frozen=True)
class Scene:
    """A scene's caption phrases, its painter, its light and whether things float in it."""

    phrases: tuple[str, ...]
    draw: Callable[[Rng, int], np.ndarray]
    light: Rgb = (1.0, 1.0, 1.0)
    floating: bool = False


SCENES: dict[str, Scene] = {
    "beach": Scene(("on the beach", "at the beach"), draw_beach),
    "snow": Scene(("in the snow", "on the snow"), draw_snow),
    "forest": Scene(("in the forest", "in a forest"), draw_forest, (0.94, 0.96, 0.9)),
    "desert": Scene(("in the desert", "in a desert"), draw_desert, (1.0, 0.97, 0.92)),
    "night": Scene(("at night", "under the night sky"), draw_night, (0.78, 0.82, 0.96)),
    "moon": Scene(("on the moon",), draw_moon),
    "underwater": Scene(("underwater", "under the sea"), draw_underwater, (0.86, 0.96, 1.0), True),
    "meadow": Scene(("in a meadow", "in the grass"), draw_meadow),
    "city street": Scene(("on a city street", "in the city"), draw_street),
    "brick wall": Scene(("in front of a brick wall",), draw_brick_wall),
    "wooden table": Scene(("on a wooden table", "on a table"), draw_wooden_table),
    "room": Scene(("in a room", "in a living room"), draw_room),
    "sunset": Scene(("at sunset", "in front of a sunset"), draw_sunset, (1.0, 0.88, 0.8)),
    "rain": Scene(("in the rain",), draw_rain, (0.88, 0.91, 0.96)),
    "mountains": Scene(("in the mountains", "in front of mountains"), draw_mountains),
    "space": Scene(("in space", "in outer space"), draw_space, (1.0, 1.0, 1.0), True),
}
