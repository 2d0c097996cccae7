"""The small world: captioned pictures of emoji sprites in drawn scenes, and concepts kept out of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ldm.words import article
from small_world.scenes import SCENES, Rng, edge
from small_world.sprites import (
    COLOURS,
    Canvas,
    Sprite,
    checks,
    colour_of,
    load_sprite,
    shade,
    spots,
    star,
    stripes,
    two_tone,
    zigzags,
)
from small_world.styles import STYLES, shrink


@dataclass(frozen=True)
class Noun:
    """A noun's sprite files (by code points) and the scenes it is mostly found in."""

    sprites: tuple[str, ...]
    scenes: tuple[str, ...]


_TABLE = """
cat | 1f408 1f63a | room, city street, brick wall
dog | 1f415 1f436 1f9ae | meadow, beach, city street
car | 1f697 1f698 | city street, desert, night
backpack | 1f392 | room, wooden table, mountains
teddy bear | 1f9f8 | room, wooden table
house | 1f3e0 1f3e1 | meadow, mountains, night
fish | 1f41f | underwater, wooden table
penguin | 1f427 | snow, underwater
boat | 26f5 1f6a4 | beach, sunset, rain
mug | 2615 1f37a | wooden table, room
teapot | 1fad6 | wooden table, room
robot | 1f916 | space, moon, city street
snowman | 26c4 2603-fe0f | snow, mountains
sneaker | 1f45f | city street, brick wall, room
umbrella | 2602-fe0f 1f302 | rain, beach
guitar | 1f3b8 | brick wall, room, sunset
rocket | 1f680 | space, moon, night
rabbit | 1f407 1f430 | meadow, forest, snow
pumpkin | 1f383 | night, meadow, wooden table
balloon | 1f388 | sunset, meadow, mountains
elephant | 1f418 | desert, sunset, meadow
cactus | 1f335 | desert, room
chair | 1fa91 | room, brick wall, beach
duck | 1f986 | meadow, rain, beach
lion | 1f981 | desert, sunset
whale | 1f433 1f40b | underwater, beach
octopus | 1f419 | underwater, beach
frog | 1f438 | rain, forest, meadow
turtle | 1f422 | beach, underwater
owl | 1f989 | night, forest
flamingo | 1f9a9 | beach, sunset
dinosaur | 1f995 1f996 | forest, desert, mountains
cow | 1f404 1f42e | meadow, mountains
pig | 1f416 1f437 | meadow, rain
panda | 1f43c | forest, mountains
fox | 1f98a | forest, snow, night
camel | 1f42b 1f42a | desert, sunset
crab | 1f980 | beach, underwater
butterfly | 1f98b | meadow, forest
sunflower | 1f33b | meadow, sunset, room
mushroom | 1f344 | forest, rain
apple | 1f34e 1f34f | wooden table, meadow
cake | 1f382 | wooden table, room
castle | 1f3f0 | mountains, night, sunset
train | 1f682 1f686 | mountains, desert, city street
bicycle | 1f6b2 | city street, brick wall, forest
ghost | 1f47b | night, forest, room
alien | 1f47d | space, moon, desert
"""


def _read_table(table: str) -> dict[str, Noun]:
    """Parse the noun table's `noun | sprites | scenes` lines."""
    rows = [[part.strip() for part in line.split("|")] for line in table.strip().splitlines()]
    return {noun: Noun(tuple(codes.split()), tuple(scenes.split(", "))) for noun, codes, scenes in rows}


NOUNS: dict[str, Noun] = _read_table(_TABLE)
HATS: dict[str, tuple[str, ...]] = {"hat": ("1f452", "1f3a9"), "crown": ("1f451",), "cap": ("1f9e2",)}
PATTERNS: dict[str, str] = {"striped": "stripes", "spotted": "spots", "two-coloured": "", "checked": "checks",
                            "zigzag": "zigzags"}
NEXT_TO, WEARING = "next to", "wearing"
NONE = ""

# Top of the head (x, y) and its width in the sprite's box, where the head is not in the top middle.
_HEADS: dict[str, tuple[float, float, float]] = {
    "1f408": (0.20, 0.14, 0.36), "1f415": (0.18, 0.06, 0.38), "1f9ae": (0.18, 0.06, 0.38),
    "1f407": (0.22, 0.30, 0.40), "1f430": (0.50, 0.36, 0.55), "1f418": (0.24, 0.06, 0.40),
    "1f986": (0.20, 0.03, 0.40), "1f404": (0.18, 0.08, 0.36), "1f416": (0.20, 0.16, 0.40),
    "1f995": (0.17, 0.02, 0.32), "1f996": (0.24, 0.03, 0.42), "1f42b": (0.10, 0.06, 0.30),
    "1f42a": (0.10, 0.06, 0.30), "1f9a9": (0.28, 0.03, 0.36),
}
_TOP_HEAD = (0.5, 0.06, 0.55)
_WEARERS = frozenset(
    "cat, dog, teddy bear, penguin, robot, rabbit, elephant, duck, lion, octopus, frog, owl, flamingo, "
    "dinosaur, cow, pig, panda, fox, camel, ghost, alien".split(", "))


@dataclass(frozen=True)
class WorldConfig:
    """How large the pictures are, how many nouns and patterns the world has, how often each thing happens."""

    size: int = 64
    nouns: int = 48
    typical: float = 0.85
    p_style: float = 0.2
    p_colour: float = 0.3
    p_pattern: float = 0.15
    patterns: int = 3
    p_pair: float = 0.1
    p_wearing: float = 0.4
    p_no_scene_phrase: float = 0.08
    object_side: tuple[float, float] = (0.46, 0.8)
    backgrounds: int = 64


@dataclass(frozen=True)
class Truth:
    """What a picture shows: `box` is the main object's x0, y0, x1, y1 in 0..1, `mask` its pixels."""

    noun: str
    scene: str
    style: str
    colours: tuple[str, ...] = ()
    pattern: str | None = None
    relation: str | None = None
    second: str | None = None
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture (height, width, 3; uint8), its caption and its truth."""

    image: np.ndarray
    caption: str
    truth: Truth


def _paint_star_bear(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint a green and a white half with a red star on the belly."""
    badge = star(x, y - 0.13, 0.2)[..., None]
    return two_tone("green", "white", edge(x)) * (1 - badge) + colour_of("red") * badge


def _paint_checkers(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint large red and white squares."""
    squares = np.cos(np.pi * (x * 4.4 + 0.5)) * np.cos(np.pi * (y * 4.4 + 0.5))
    return two_tone("red", "white", edge(squares, 0.12))


def _paint_stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint slanting pink stripes on blue."""
    return two_tone("blue", "pink", stripes(x + 0.5 * y, 3.4))


def _paint_dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint large blue dots on yellow."""
    return two_tone("yellow", "blue", spots(x, y, 0.29, 0.09))


def _paint_rings(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint level green rings on white."""
    return two_tone("white", "green", stripes(y, 3.6, 0.5))


def _paint_quarters(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint four quarters in purple and yellow."""
    right, lower = edge(x), edge(y)
    return two_tone("purple", "yellow", right + lower - 2 * right * lower)


def _paint_zigzag(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint purple bands that run up and down across orange."""
    climb = 0.2 * np.abs((x * 3.2) % 1 - 0.5)
    return two_tone("orange", "purple", stripes(y + climb, 3.6))


@dataclass(frozen=True)
class Concept:
    """A thing the training world never shows: its class noun, its sprite and its paint."""

    noun: str
    sprite: str
    paint: Callable[[np.ndarray, np.ndarray], np.ndarray]


# Cat, car and fish have sprites the world never uses; for the others the paint is the novelty.
CONCEPTS: dict[str, Concept] = {
    "striped_cat": Concept("cat", "1f408-200d-2b1b", _paint_stripes),
    "dotted_backpack": Concept("backpack", "1f392", _paint_dots),
    "star_bear": Concept("teddy bear", "1f9f8", _paint_star_bear),
    "checkered_car": Concept("car", "1f699", _paint_checkers),
    "ringed_teapot": Concept("teapot", "1fad6", _paint_rings),
    "zigzag_sneaker": Concept("sneaker", "1f45f", _paint_zigzag),
    "quartered_fish": Concept("fish", "1f420", _paint_quarters),
}


def with_article(words: str) -> str:
    """Put the right indefinite article before the words."""
    return f"{article(words)} {words}"


def object_phrase(noun: str, colours: tuple[str, ...], pattern: str | None, variant: int = 0) -> str:
    """Name an object with its colours and pattern; `variant` picks one of two wordings."""
    if pattern is None:
        return with_article(" ".join((*colours, noun)))
    if len(colours) == 1:
        return f"{with_article(noun)} with {colours[0]} {PATTERNS[pattern]}"
    if variant and PATTERNS[pattern]:
        return f"{with_article(f'{colours[0]} {noun}')} with {colours[1]} {PATTERNS[pattern]}"
    return with_article(f"{pattern} {colours[0]} and {colours[1]} {noun}")


def all_caption_words() -> list[str]:
    """Return every word (run of letters) that any caption can contain, sorted."""
    phrases = [phrase for scene in SCENES.values() for phrase in scene.phrases]
    phrases += [prefix for style in STYLES.values() for prefix in style.prefixes]
    phrases += [*NOUNS, *HATS, *COLOURS, *PATTERNS, *PATTERNS.values(), NEXT_TO, WEARING, "a an and with"]
    return sorted(set(re.findall("[a-z]+", " ".join(phrases))))


class SmallWorld:
    """Draws the pictures; `assets` is the folder with the sprite package's webp files."""

    def __init__(self, assets: Path, config: WorldConfig = WorldConfig()) -> None:
        """Check the sprite folder and take the settings."""
        self.config = config
        self.nouns = list(NOUNS)[:config.nouns]
        self._assets = Path(assets)
        if not (self._assets / "1f408.webp").is_file():
            raise FileNotFoundError(f"no sprites (1f408.webp ...) in {self._assets}")
        self._large = 2 * config.size
        self._sprites: dict[str, Sprite] = {}
        self._backgrounds: dict[tuple[str, int], np.ndarray] = {}

    def draw(self, seed: int, *, noun: str | None = None, scene: str | None = None, style: str | None = None,
             colour: str | tuple[str, ...] | None = None, pattern: str | None = None,
             relation: str | None = None, second: str | None = None) -> Picture:
        """Draw a seed's picture; None leaves a choice to chance, NONE ("") rules the thing out."""
        rng = np.random.default_rng((seed, 0))
        noun_here, scene_here, style_here = self._choose_frame(rng, noun, scene, style)
        colours, pattern_here = self._choose_paint(rng, colour, pattern)
        relation_here, second_here = self._choose_pair(rng, noun_here, relation, second)
        truth = Truth(noun_here, scene_here, style_here, colours, pattern_here, relation_here, second_here)
        codes = NOUNS[noun_here].sprites
        code = codes[rng.integers(6) % len(codes)]
        caption = self._caption(np.random.default_rng((seed, 3)), truth)
        layer = self._paint(rng, self._sprite(code), truth)
        image, box, mask = self._render(rng, truth, layer, code)
        return Picture(image, caption, _with_place(truth, box, mask))

    def draw_concept(self, name: str, seed: int, *, scene: str | None = None,
                     style: str = "photo") -> Picture:
        """Draw one of CONCEPTS, captioned with its class noun and the scene's first phrase."""
        concept = CONCEPTS[name]
        rng = np.random.default_rng((seed, 1))
        noun, scene, style = self._choose_frame(rng, concept.noun, scene, style)
        sprite = self._sprite(concept.sprite)
        layer = sprite.premultiplied(shade(concept.paint(*sprite.grid()), sprite, 0.75))
        truth = Truth(noun, scene, style)
        image, box, mask = self._render(rng, truth, layer, concept.sprite)
        caption = f"{STYLES[style].prefixes[0]} {with_article(noun)} {SCENES[scene].phrases[0]}"
        return Picture(image, caption, _with_place(truth, box, mask))

    def _sprite(self, code: str) -> Sprite:
        """Return one sprite at about the size in which it is placed."""
        if code not in self._sprites:
            self._sprites[code] = load_sprite(self._assets / f"{code}.webp", round(self._large * 0.75))
        return self._sprites[code]

    def _background(self, scene: str, entry: int) -> np.ndarray:
        """Return one numbered background of a scene, a little larger than the picture."""
        if (scene, entry) not in self._backgrounds:
            rng = np.random.default_rng((list(SCENES).index(scene), entry, 2))
            drawn = SCENES[scene].draw(rng, round(self._large * 1.12))
            self._backgrounds[scene, entry] = (drawn.clip(0, 1) * 255).astype(np.uint8)
        return self._backgrounds[scene, entry]

    # A chooser draws the same numbers whatever was asked, so that one wish leaves the rest of a seed alone.
    def _choose_frame(self, rng: Rng, noun: str | None, scene: str | None,
                      style: str | None) -> tuple[str, str, str]:
        """Choose the noun, the scene (mostly a typical one) and the style."""
        picks, place, other = rng.integers(1 << 30, size=3), rng.random(), rng.random()
        noun = noun or self.nouns[picks[0] % len(self.nouns)]
        scenes = NOUNS[noun].scenes if place < self.config.typical else tuple(SCENES)
        painted = list(STYLES)[1:]
        chance = painted[picks[2] % len(painted)] if other < self.config.p_style else "photo"
        return noun, scene or scenes[picks[1] % len(scenes)], style or chance

    def _choose_paint(self, rng: Rng, colour: str | tuple[str, ...] | None,
                      pattern: str | None) -> tuple[tuple[str, ...], str | None]:
        """Choose the colours and the pattern."""
        first, second = rng.choice(list(COLOURS), 2, replace=False).tolist()
        chance, single, which = rng.random(), rng.random(), list(PATTERNS)[rng.integers(self.config.patterns)]
        given = (colour,) if isinstance(colour, str) else colour
        asked = None if given is None else tuple(filter(None, given))
        if pattern is None and (asked is None or len(asked) == 2):
            pattern = which if asked or chance < self.config.p_pattern else NONE
        if not pattern:
            alone = (first,) if single < self.config.p_colour else ()
            return (alone if asked is None else asked[:1]), None
        return asked or ((first,) if single < 0.35 and PATTERNS[pattern] else (first, second)), pattern

    def _choose_pair(self, rng: Rng, noun: str, relation: str | None,
                     second: str | None) -> tuple[str | None, str | None]:
        """Choose whether something stands beside the object or is worn by it."""
        pair, wears, picks = rng.random(), rng.random(), rng.integers(1 << 30, size=2)
        hats, others = list(HATS), [other for other in self.nouns if other != noun]
        if relation is None and second:
            relation = WEARING if second in HATS else NEXT_TO
        if relation is None and second is None and pair < self.config.p_pair:
            relation = WEARING if wears < self.config.p_wearing and noun in _WEARERS else NEXT_TO
        if not relation:
            return None, None
        chance = hats[picks[0] % 3] if relation == WEARING else others[picks[1] % len(others)]
        return relation, second or chance

    def _caption(self, rng: Rng, truth: Truth) -> str:
        """Word a caption for what the picture shows."""
        prefixes, phrases = STYLES[truth.style].prefixes, SCENES[truth.scene].phrases
        parts = [prefixes[rng.integers(len(prefixes))],
                 object_phrase(truth.noun, truth.colours, truth.pattern, int(rng.integers(2)))]
        if truth.second:
            parts += [str(truth.relation), with_article(truth.second)]
        # The first phrase is the canonical one, so it is worded more often.
        phrase, silent = phrases[max(0, int(rng.integers(3)) - 1) % len(phrases)], rng.random()
        if truth.style != "photo" or silent >= self.config.p_no_scene_phrase:
            parts.append(phrase)
        return " ".join(part for part in parts if part)

    def _paint(self, rng: Rng, sprite: Sprite, truth: Truth) -> np.ndarray:
        """Return the object's sprite in its colours and pattern as premultiplied RGBA."""
        turn, flip = rng.uniform(0, np.pi), rng.integers(2)
        phase, scale = rng.random(), rng.uniform(0.85, 1.15)
        if not truth.colours:
            return sprite.premultiplied()
        main = shade(colour_of(truth.colours[0]), sprite)
        if truth.pattern is None:
            return sprite.premultiplied(main * 0.9 + sprite.rgb * 0.1)
        x, y = sprite.grid()
        if truth.pattern == "striped":
            mask = stripes(x * math.cos(turn) + y * math.sin(turn), 3.6 * scale, phase)     # stays float32
        elif truth.pattern == "spotted":
            mask = spots(x + 0.25 * phase, y, 0.29 * scale, 0.088 * scale)
        elif truth.pattern == "checked":
            mask = checks(x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn),
                          3.6 * scale, phase)
        elif truth.pattern == "zigzag":
            mask = zigzags(x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn),
                           3.6 * scale, phase)
        else:
            mask = edge((x, y, x + y, x - y)[int(turn / np.pi * 4) % 4] * (1 if flip else -1))
        under, over = (sprite.rgb, main) if len(truth.colours) == 1 else (main, None)
        over = shade(colour_of(truth.colours[1]), sprite, 0.75) if over is None else over
        return sprite.premultiplied(under + (over - under) * mask[..., None])

    def _render(self, rng: Rng, truth: Truth, layer: np.ndarray,
                code: str) -> tuple[np.ndarray, tuple[float, float, float, float], np.ndarray]:
        """Place the objects on a background, apply the style and measure the main object."""
        scene, size = SCENES[truth.scene], self.config.size
        canvas = Canvas(self._take_background(rng, truth.scene), scene.light, not scene.floating)
        low, high = self.config.object_side
        side, spread = rng.uniform(low, high), rng.normal(0, 1, 2)
        tilt, mirror = rng.normal(0, 7), bool(rng.integers(2))
        if truth.relation == NEXT_TO:
            codes = NOUNS[str(truth.second)].sprites
            other = self._sprite(codes[rng.integers(6) % len(codes)]).premultiplied()
            way = 1 if rng.integers(2) else -1
            first, second = rng.uniform(0.42, 0.52, 2)
            canvas.place(other, (0.5 + way * 0.25, 0.62 + 0.03 * spread[0]), second, tilt / 2, not mirror)
            alpha, _ = canvas.place(layer, (0.5 - way * 0.25, 0.63 + 0.03 * spread[1]), first, tilt, mirror)
        elif truth.relation == WEARING:
            side = 0.42 + 0.5 * (side - 0.42)
            alpha, move = canvas.place(layer, (0.5 + 0.05 * spread[0], 0.63), side, tilt / 2, mirror)
            self._put_on(rng, canvas, str(truth.second), code, layer, move, side)
        else:
            reach = side * 0.47
            x = np.clip(0.5 + 0.09 * spread[0], reach, 1 - reach)
            y = np.clip(0.57 + 0.05 * spread[1], reach, 1 - reach)
            alpha, _ = canvas.place(layer, (x, y), side, tilt, mirror)
        image = STYLES[truth.style].apply(canvas.image.clip(0, 1), rng, size)
        mask = shrink(alpha, size) > 0.5
        return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), _box(mask), mask

    def _put_on(self, rng: Rng, canvas: Canvas, hat: str, code: str, wearer: np.ndarray,
                move: np.ndarray, side: float) -> None:
        """Put a hat on the head of an object that was placed with the affine map `move`."""
        codes = HATS[hat]
        layer = self._sprite(codes[rng.integers(6) % len(codes)]).premultiplied()
        across, down, width = _HEADS.get(code, _TOP_HEAD)
        point = move @ np.array((across * wearer.shape[1], down * wearer.shape[0], 1))
        hat_side = max(0.24, width * side * 1.05)
        hat_height = hat_side * layer.shape[0] / max(layer.shape[:2])
        centre = point[0] / self._large, point[1] / self._large - 0.3 * hat_height
        canvas.place(layer, centre, hat_side, rng.normal(0, 5), bool(rng.integers(2)), shadow=False)

    def _take_background(self, rng: Rng, scene: str) -> np.ndarray:
        """Take a random crop of a random background, mirrored or not, a little lighter or darker."""
        whole = self._background(scene, int(rng.integers(self.config.backgrounds)))
        side = int(rng.integers(self._large, whole.shape[0] + 1))
        top, left = rng.integers(0, whole.shape[0] - side + 1, 2)
        part = whole[top:top + side, left:left + side]
        part = part[:, ::-1] if rng.integers(2) else part
        if side != self._large:
            part = shrink(np.ascontiguousarray(part), self._large)
        return part.astype(np.float32) * np.float32(rng.uniform(0.92, 1.08) / 255)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box around a mask in parts of its sides."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0, 0.0, 1.0, 1.0
    side = float(mask.shape[0])
    return columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side


def _with_place(truth: Truth, box: tuple[float, float, float, float], mask: np.ndarray) -> Truth:
    """Return the truth completed with where the main object is."""
    return replace(truth, box=box, mask=mask)
