"""Merges concepts that were trained apart into one concept file, in closed form, so that a prompt may name them all."""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge as merged_config
from ldm.files import write_atomically
from ldm.flags import BASE_FLAGS, read_flags, set_keys
from ldm.text import read_lines
from ldm.util import UserError, shipped

EMBEDDED = ("configs/sample-tiny.yaml",)
CAPTIONS = {True: "configs/captions/tiny.txt", False: "configs/captions/sd-v1.txt"}    # embedded or not


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False, schema=SampleConfig)
    parser.add_argument("-b", "--base", nargs="+", type=Path, default=EMBEDDED, help="the base's configuration files")
    parser.add_argument("concepts", type=Path, nargs="+", help="concept files of one base")
    parser.add_argument("--out", "-o", type=Path, required=True, help="the concept file to write")
    parser.add_argument("--class_noun", nargs="+", default=[],
                        help="class nouns, one for each concept file that does not say it, in their order")
    parser.add_argument("--captions", type=shipped, help="texts that shall stay as they are, one per line; default: "
                        "400 of our own, for SD v1 or for the embedded model")
    parser.add_argument("--ridge", type=float, default=1e-2, help="keeps weights from running away where no caption "
                        "has anything; more moves them less and changes captions more")
    parser.add_base()
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    if options.ridge < 0:
        raise UserError(f"--ridge {options.ridge:g} is out of range; give 0 or more.")
    if options.out.exists():
        raise UserError(f"'{options.out}' exists already; remove it first, or choose another name.")
    from ldm.base import build_model  # torch loads only when there is work for it
    from ldm.customization.delta import load_concepts
    from ldm.customization.merge import merge
    concepts = load_concepts(options.concepts, class_noun=options.class_noun)
    if len(concepts) == 1:
        write_atomically(options.out, lambda part: shutil.copyfile(options.concepts[0], part))
        return print(f"{options.out}: one concept, nothing to merge; it is '{options.concepts[0]}' as it is")
    config = merged_config(SampleConfig, options.base, extra=set_keys(read_flags(options, BASE_FLAGS)))
    captions = options.captions or shipped(CAPTIONS[config.base.ckpt is None])
    texts = [line for line in read_lines(captions, "file of captions") if line]
    model, identity = build_model(config.model, config.base)
    made = merge(model, identity, concepts, texts, options.ridge, config.base.any_base)
    path = made.concept.save(options.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print(f"what {made.targets} tokens of {len(made.concept.schemes)} concepts learned is kept, but for "
          f"{made.residual:.1e} of it")
    print(f"{made.rows} tokens of {len(texts)} captions (rank {made.rank}) change by {100 * made.change:.1f} %, "
          f"weights by {100 * made.moved:.1f} %")
    for scheme in made.concept.schemes:
        print(f"    in prompts: {scheme.concept}")


if __name__ == "__main__":
    cli.run(main)
