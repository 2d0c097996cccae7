"""Draws prompts with a concept, plain and with DCI: parse, build, draw, save images and a labeled sheet."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.flags import SAMPLING_FLAGS, sampling_settings
from ldm.text import read_lines
from ldm.util import UserError, shipped

EMBEDDED = ("configs/sample-tiny.yaml",)
SHIPPED = {"": EMBEDDED, "SD v1": ("configs/sample-sd-v1.yaml",)}


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, schema=SampleConfig, shipped=SHIPPED)
    parser.add_argument("--config", action="append", default=[], help="one more configuration file")
    parser.add_base()
    parser.add_argument("--delta_ckpt", type=Path, nargs="+", default=[], help="concept file, also of other tools; "
                        "several stand side by side, and a prompt may name them all")
    parser.add_foreign()
    parser.add_argument("--prompt", action="append", help="what to draw; {} stands for the concept; may be repeated")
    parser.add_argument("--from-file", "--from_file", type=shipped, help="a file with one prompt per line")
    parser.add_argument("--outdir", type=Path, default=Path("outputs"), help="where images go")
    parser.add_flags(SAMPLING_FLAGS)
    parser.add_argument("--plms", action="store_true", help="sample with PLMS")
    parser.add_argument("--dpm_solver", action="store_true", help="sample with DPM-Solver++(2M)")
    parser.add_argument("--preview_lambda", type=float, nargs="+", help="show early what these strengths will make: "
                        "what is predicted where the joint phase ends (dci.agg_lambda, dci.preview)")
    parser.add_argument("--skip_grid", action="store_true", help="write no sheet")
    parser.add_argument("--save_masks", action="store_true", help="draw DBIM's masks of each prompt's first image")
    parser.add_argument("--show_tokens", action="store_true", help="print tokens, ids and roles, and stop")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    return parser


def read_prompts(options) -> list[str]:
    """Returns the prompts of --prompt and --from-file."""
    prompts = list(options.prompt or [])
    if options.from_file:
        prompts += [line for line in read_lines(options.from_file, "prompt file") if line]
    if not prompts:
        raise UserError("there is nothing to draw; give --prompt 'a {} in the snow' or --from-file FILE.")
    return prompts


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    config = merge(SampleConfig, [*(options.base or EMBEDDED), *options.config], options.overrides,
                   sampling_settings(options))
    if options.print_config:
        print(OmegaConf.to_yaml(config, resolve=True), end="")
        return
    prompts = read_prompts(options)
    from ldm.sampling import (  # torch loads only when there is work for it
        chooser_for,
        load_generator,
        sample_run,
        token_table,
    )
    words = tuple(options.modifier_token)
    run = config, options.delta_ckpt, words, options.class_noun, prompts
    if options.show_tokens:
        return print(token_table(*run))
    chooser = chooser_for(config, options.delta_ckpt)       # before the base, which may take a minute to read
    generator = load_generator(*run, masks=options.save_masks)
    written = sample_run(generator, config, prompts, options.outdir, options.delta_ckpt,
                         grid=not options.skip_grid, masks=options.save_masks, chooser=chooser)
    print(f"images: {written.images} in {written.folder / 'samples'}")
    for path in written.sheets:
        print(f"sheet:    {path}")


if __name__ == "__main__":
    cli.run(main)
