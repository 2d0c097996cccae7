"""Makes concept files smaller: what K/V learned, in matrices of low rank, by size, by error, by rank or by share."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.flags import BASE_FLAGS, read_flags, set_keys
from ldm.util import UserError

EMBEDDED = ("configs/sample-tiny.yaml",)


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, schema=SampleConfig, shipped={"": EMBEDDED, "SD v1": ("configs/sample-sd-v1.yaml",)})
    parser.add_argument("concept", type=Path, help="concept file; also the release's or Custom Diffusion's")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--size", type=float, nargs="+", metavar="MB", help="at most so large, with the least error")
    rule.add_argument("--error", type=float, nargs="+", help="as small as it can be with at most this share of what "
                      "was learned left out (Frobenius norm, all weights together)")
    rule.add_argument("--rank", type=int, nargs="+", help="the same rank for every weight")
    rule.add_argument("--share", type=float, nargs="+", help="of each weight's sum of singular values, as Custom "
                      "Diffusion compresses: 0.6")
    parser.add_foreign()
    parser.add_base()
    parser.add_argument("--outdir", type=Path, help="where files go; by default beside the concept file")
    return parser


def check(options) -> None:
    """Refuses values that no file can have."""
    for value in [*(options.size or ()), *(options.rank or ())]:
        if value <= 0:
            raise UserError(f"{value:g} is out of range; give more than 0.")
    for value in [*(options.error or ()), *(options.share or ())]:
        if not 0 <= value <= 1:
            raise UserError(f"{value:g} is out of range; give a share, from 0 to 1.")


def plan(options, concept) -> list[tuple[Path, str, float]]:
    """Returns what to write: the file, the rule that chooses ranks, and its value."""
    from ldm.customization.low_rank import budget
    folder, asked = options.outdir or options.concept.parent, []
    for size in options.size or ():
        asked.append((f"{size:g}mb", "size", budget(concept, size)))
    for rule in ("error", "rank", "share"):
        for value in getattr(options, rule) or ():
            asked.append((f"{rule}{value:g}", rule, value))
    files = []
    for end, rule, value in asked:
        path = folder / f"{options.concept.stem}-{end}.safetensors"
        if path.exists():
            raise UserError(f"'{path}' exists already; remove it first, or choose another folder with --outdir.")
        files.append((path, rule, value))
    return files


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    check(options)
    from ldm.base import build_model  # torch loads only when there is work for it
    from ldm.customization.delta import check_base, load_concept
    from ldm.customization.low_rank import RULES, compress, spectra
    words = tuple(options.modifier_token)
    concept = replace(load_concept(options.concept, words, options.class_noun), contexts={})   # sampling needs none
    files = plan(options, concept)
    base = {}
    if concept.weights:     # in full: what was learned is what differs from the base
        config = merge(SampleConfig, options.base or EMBEDDED, options.overrides,
                       set_keys(read_flags(options, BASE_FLAGS)))
        model, identity = build_model(config.model, config.base)
        check_base(concept, identity, config.base.any_base)
        base = model.model.diffusion_model.state_dict()
        concept = replace(concept, base=identity)
    found = spectra(concept, base)
    for path, rule, value in files:
        made = compress(concept, found, RULES[rule](found, value))
        made.concept.save(path)
        ranks = [layer.rank for layer in made.layers.values()]
        print(f"{path}: {path.stat().st_size / 1e6:.3f} MB, ranks {min(ranks)} to {max(ranks)}, "
              f"{100 * made.error:.2f} % of what was learned is left out")
        for layer, result in made.layers.items():
            print(f"    {layer}: rank {result.rank} of {result.of}, error {100 * result.error:.2f} %")


if __name__ == "__main__":
    cli.run(main)
