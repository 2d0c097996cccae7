"""Stage 1b: cuts CLIP's byte-pair file to what the small world's captions need."""
from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from small_world.world import all_caption_words

from ldm.files import write_atomically
from ldm.modules.encoders.tokenizer import clip_merges_path, read_merges

# Words people write in prompts beside the captions' own, and the rare tokens concepts start from.
EXTRA_WORDS = """photo of a an the . , and with in on at under near next to by wearing picture painting drawing
sketch style red green blue yellow dog cat man woman car toy bag ktn pll ucd plushy small big happy""".split()


def merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """Returns the merges byte-pair encoding applies to one word."""
    pieces, used = [*word[:-1], word[-1] + "</w>"], set()
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        merged, index = [], 0
        while index < len(pieces):
            joined = tuple(pieces[index:index + 2]) == best
            merged.append("".join(best) if joined else pieces[index])
            index += 2 if joined else 1
        pieces = merged
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ldm/tiny/vocabulary.txt"))
    parser.add_argument("--first", type=int, default=500, help="how many of CLIP's commonest merges to keep")
    args = parser.parse_args()
    merges = read_merges(clip_merges_path())
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    kept = set(merges[: args.first])
    for word in {*all_caption_words(), *EXTRA_WORDS}:
        kept |= merges_of(word, ranks)
    lines = ["#version: a cut of CLIP's byte-pair merges", *(" ".join(pair) for pair in merges if pair in kept)]
    write_atomically(args.out, lambda part: part.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    print(f"{len(lines) - 1} merges in {args.out}")


if __name__ == "__main__":
    main()
