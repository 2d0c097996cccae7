"""Stage 7: draws the example data that ships: albums of each concept, held-out images, and sets of the classes.

An album is five references. One kind shows three scenes, as albums mostly do; the others show one background, which
then gets into the words that are learned, or a brick wall of its own in each reference (docs/evidence.md).
"""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image
from small_world.world import CONCEPTS, NOUNS, Concept, SmallWorld, WorldConfig
from world import REFERENCE_SCENES, WORLD

from ldm.data.regularization import write_regularization
from ldm.sheets import save_png

# Of the images that fidelity is measured on; some references have a scene of these too.
HELD_OUT_SCENES = ("meadow", "room", "city street", "mountains", "sunset")
ONE_BACKGROUND = WorldConfig(backgrounds=1)
BACKGROUNDS = ("brick wall", "city street", "forest")


def known_concepts() -> dict[str, Concept]:
    """Returns the concepts whose nouns the model knows."""
    known = list(NOUNS)[:WORLD.nouns]
    return {name: concept for name, concept in CONCEPTS.items() if concept.noun in known}


def draw_albums(assets: Path, out: Path) -> None:
    """Draws every concept's references, in three scenes, before one background or before walls, and held-out images."""
    world, one = SmallWorld(assets), SmallWorld(assets, ONE_BACKGROUND)
    for name, concept in known_concepts().items():
        scenes = NOUNS[concept.noun].scenes
        for index, scene in enumerate(REFERENCE_SCENES):
            image = world.draw_concept(name, 1000 + index, scene=scenes[scene % len(scenes)]).image
            save_png(Image.fromarray(image), out / "concepts" / name / f"{index}.png")
            for background in BACKGROUNDS:
                image = one.draw_concept(name, 1000 + index, scene=background).image
                save_png(Image.fromarray(image), out / "albums" / background.replace(" ", "_") / name / f"{index}.png")
            own = world.draw_concept(name, 1000 + index, scene="brick wall").image
            save_png(Image.fromarray(own), out / "albums" / "brick_walls" / name / f"{index}.png")
            unseen = world.draw_concept(name, 2000 + index, scene=HELD_OUT_SCENES[index]).image
            save_png(Image.fromarray(unseen), out / "held_out" / name / f"{index}.png")


def draw_classes(assets: Path, regularization: Path, count: int) -> None:
    """Draws `count` regularization images of each concept's class."""
    world = SmallWorld(assets)
    for noun in sorted({concept.noun for concept in known_concepts().values()}):
        drawn = [world.draw(7000 + seed, noun=noun, style="photo", relation="") for seed in range(count)]
        folder = regularization / f"samples_{noun.replace(' ', '_')}"
        shutil.rmtree(folder, ignore_errors=True)      # numbers would go on from an earlier set's
        write_regularization(folder, noun, [(Image.fromarray(picture.image), picture.caption, "") for picture in drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the assets folder of the npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--out", type=Path, default=Path("ldm/tiny"))
    parser.add_argument("--regularization", type=Path, default=Path("real_reg/tiny"))
    parser.add_argument("--pictures", type=int, default=24)
    args = parser.parse_args()
    draw_albums(args.assets, args.out)
    draw_classes(args.assets, args.regularization, args.pictures)
    print(f"{len(known_concepts())} example concepts, regularization sets of {args.pictures} images each")


if __name__ == "__main__":
    main()
