"""Trains a model on one or several concepts: parse, build, fine-tune, say where the files are."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm import cli
from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.flags import CONCEPT_FLAGS, TRAINING_FLAGS, training_settings
from ldm.util import UserError, from_here

EMBEDDED = ("configs/tiny.yaml",)
SHIPPED = {"": EMBEDDED, "SD v1": ("configs/sd-v1.yaml",)}


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, schema=TrainConfig, shipped=SHIPPED)
    parser.add_base()
    parser.add_flags(CONCEPT_FLAGS)
    parser.add_argument("--concepts_list", type=Path, help="concept_list.json, dataset.json, or a folder of subjects")
    parser.add_argument("--subject", nargs="+", default=[], help="which of --concepts_list to learn, together")
    parser.add_argument("--caption", help="caption of the references with words and noun, e.g. 'photo of a <new1> cat'")
    parser.add_flags(TRAINING_FLAGS)
    parser.add_argument("-r", "--resume", type=Path, help="run folder (or its last.ckpt) to go on with")
    parser.add_argument("--insist", action="store_true", help="with -r: although base, concepts or images are others")
    parser.add_argument("--gpus", help="GPUs, as '0,' or '0,1,' or their number")
    parser.add_argument("--inspect", nargs="?", const=Path("outputs/inspect"), type=Path, metavar="FOLDER",
                        help="write what the network would see, and a table of all files, and stop")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    folder = options.resume
    if folder and folder.is_file():                  # checkpoints/last.ckpt
        folder = folder.parent.parent
    if folder and not (folder / "checkpoints" / "last.ckpt").is_file():
        raise UserError(f"'{folder}' holds no run to resume (no checkpoints/last.ckpt); give a folder under logs/.")
    if folder and options.base:
        raise UserError("-r goes on as its run was configured, so -b has no place beside it; give key=value.")
    files = [folder / "configs" / "project.yaml"] if folder else (options.base or EMBEDDED)
    config = merge(TrainConfig, files, options.overrides, training_settings(options, files), data=bool(folder))
    if options.print_config:
        return print(OmegaConf.to_yaml(config, resolve=True), end="")
    if options.inspect:
        from ldm.training.inspection import inspect_run
        return inspect_run(config, options.inspect)
    from ldm.training.run import fine_tune  # Lightning and the model code load only when there is work
    run = fine_tune(config, folder, options.insist)
    print(f"concept file: {run.concept}\nimages:     {run.preview or run.folder / 'images'}")
    again = f"CONCEPT={shlex.quote(str(run.concept))} bash {from_here('inference.sh')}"
    if config.base.ckpt:
        again = f"CKPT={shlex.quote(config.base.ckpt)} {again}"
    print(f"next:         {again}")


if __name__ == "__main__":
    cli.run(main)
