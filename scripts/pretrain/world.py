"""Stage 1: draws the small world's pictures, captions and truths, and the example concepts' references."""
from __future__ import annotations

import argparse
import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from small_world.world import CONCEPTS, SmallWorld, WorldConfig

from ldm.files import write_atomically

# Five references as an album has them: three on different backgrounds, two on the same one.
REFERENCE_SCENES = (0, 1, 2, 0, 0)
WORLD = WorldConfig(nouns=40, p_style=0.2, p_pattern=0.4, patterns=5, p_pair=0.06)     # what the generator learns from


def draw_range(job: tuple[Path, WorldConfig, int, int]) -> tuple[np.ndarray, list[str], list[dict]]:
    """Draws pictures `first` to `last` of the world."""
    assets, config, first, last = job
    world = SmallWorld(assets, config)
    drawn = [world.draw(seed) for seed in range(first, last)]
    truths = [{key: value for key, value in dataclasses.asdict(picture.truth).items() if key != "mask"}
              for picture in drawn]
    return np.stack([picture.image for picture in drawn]), [picture.caption for picture in drawn], truths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the assets folder of the npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--state", type=Path, default=Path("pretrain_state"))
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.state.mkdir(parents=True, exist_ok=True)
    drawn = args.state / "pictures.npy"
    if drawn.exists() and len(np.load(drawn, mmap_mode="r")) == args.pictures:
        return print(f"{args.pictures} pictures are there already")
    world = SmallWorld(args.assets, WORLD)
    references = np.stack([world.draw_concept(name, 1000 + index).image for name in CONCEPTS for index in range(5)])
    write_atomically(args.state / "concepts.npy", lambda part: _save(part, references))

    step = 500
    jobs = [(args.assets, WORLD, first, min(first + step, args.pictures))
            for first in range(0, args.pictures, step)]
    with ProcessPoolExecutor(args.workers) as pool:
        parts = list(pool.map(draw_range, jobs))
    pictures = np.concatenate([part[0] for part in parts])
    rows = [{"caption": caption, **truth} for part in parts for caption, truth in zip(part[1], part[2], strict=True)]
    write_atomically(args.state / "captions.jsonl",
                     lambda part: part.write_text("\n".join(json.dumps(row) for row in rows) + "\n"))
    write_atomically(drawn, lambda part: _save(part, pictures))
    print(f"{len(pictures)} pictures, {len({row['caption'] for row in rows})} distinct captions")


def _save(path: Path, array: np.ndarray) -> None:
    """Saves under exactly this name (numpy.save would add a suffix)."""
    with path.open("wb") as file:
        np.save(file, array)


if __name__ == "__main__":
    main()
