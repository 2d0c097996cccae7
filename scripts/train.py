"""Trains a model on one or several concepts: parse, build, fine-tune, say where the files are."""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm import cli
from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.familiar import ONE_CONCEPT, caption_to_method, check_list, listed_concepts
from ldm.text import literal
from ldm.util import UserError, from_here

EMBEDDED = ("configs/tiny.yaml",)
SHIPPED = {"": EMBEDDED, "SD v1": ("configs/sd-v1.yaml",)}


def parser() -> cli.Parser:
    """Makes the parser; the familiar flags are short forms of configuration keys."""
    parser = cli.Parser(__doc__, schema=TrainConfig, shipped=SHIPPED)
    parser.add_base()
    parser.add_argument("--datapath", help="folder of reference photos (concepts.0.images)")
    parser.add_argument("--reg_datapath", help="real_reg folder or any folder of the class (concepts.0.regularization)")
    parser.add_argument("--reg_mode", help="folder, generate or none (data.reg.mode)")
    parser.add_argument("--concepts_list", type=Path, help="concept_list.json, dataset.json, or a folder of subjects")
    parser.add_argument("--subject", nargs="+", default=[], help="which of --concepts_list to learn, together")
    parser.add_argument("--reg_caption", help="of class images, or a file (concepts.0.regularization_caption)")
    parser.add_argument("--caption", help="caption of the references with words and noun, e.g. 'photo of a <new1> cat'")
    parser.add_argument("--class_noun", help="what the thing is, e.g. 'tortoise plushy' (concepts.0.class_noun)")
    parser.add_argument("--modifier_token", help="concept words joined by +, e.g. '<new1>+<new2>' (method.words)")
    parser.add_argument("--init_ctx", help="words the prefix contexts start from (method.prefix)")
    parser.add_argument("--ctx_end_init", help="words the suffix contexts start from (method.suffix)")
    parser.add_argument("-n", "--name", help="of the run; left out, the first concept's (name)")
    parser.add_argument("-r", "--resume", type=Path, help="run folder (or its last.ckpt) to go on with")
    parser.add_argument("--insist", action="store_true", help="with -r: although base, concepts or images are others")
    parser.add_argument("-l", "--logdir", help="where run folders go (trainer.logdir)")
    parser.add_argument("-s", "--seed", type=int, help="(trainer.seed)")
    parser.add_argument("--gpus", help="GPUs, as '0,' or '0,1,' or their number")
    parser.add_argument("--inspect", nargs="?", const=Path("outputs/inspect"), type=Path, metavar="FOLDER",
                        help="write what the network would see, and a table of all files, and stop")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    return parser


def options_to_config(options, files: Sequence[str]):
    """Turns flags into configuration; --datapath and --class_noun change the first configured concept."""
    flags = cli.set_options(
        **cli.base_options(options), name=options.name, trainer__logdir=options.logdir, trainer__seed=options.seed,
        data__reg__mode=options.reg_mode, method__prefix=options.init_ctx, method__suffix=options.ctx_end_init,
        method__words=options.modifier_token.split("+") if options.modifier_token else None)
    if options.gpus:
        OmegaConf.update(flags, "trainer", {"accelerator": "gpu", "devices": cli.count_gpus(options.gpus)}, merge=True)
    given = {flag: value for flag in ONE_CONCEPT if (value := getattr(options, flag)) is not None}
    check_list(options.concepts_list, options.subject, list(given))
    concept = literal({ONE_CONCEPT[flag]: value for flag, value in given.items()})
    configured = merge(TrainConfig, files, data=bool(options.resume)).concepts
    if options.concepts_list:
        flags.concepts = listed_concepts(options.concepts_list, options.subject)
    elif concept and (options.datapath or not configured):
        concept.setdefault("name", literal((options.class_noun or "concept").replace(" ", "_")))
        flags.concepts = [concept]
    elif concept:
        flags.concepts = [OmegaConf.merge(configured[0], concept), *configured[1:]]
    if options.caption:
        nouns = [entry.get("class_noun", "") for entry in flags.get("concepts") or configured]
        method = caption_to_method(options.caption, nouns[0] if nouns else "")
        if options.modifier_token and options.modifier_token.split("+") != method["words"]:
            raise UserError(f"--modifier_token '{options.modifier_token}' contradicts --caption '{options.caption}'.")
        flags = OmegaConf.merge(flags, {"method": literal(method)})
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    folder = options.resume.parent.parent if options.resume and options.resume.is_file() else options.resume
    if folder and not (folder / "checkpoints" / "last.ckpt").is_file():
        raise UserError(f"'{folder}' holds no run to resume (no checkpoints/last.ckpt); give a folder under logs/.")
    if folder and options.base:
        raise UserError("-r goes on as its run was configured, so -b has no place beside it; give key=value.")
    files = [folder / "configs" / "project.yaml"] if folder else (options.base or EMBEDDED)
    config = merge(TrainConfig, files, options.overrides, options_to_config(options, files), data=bool(folder))
    if options.print_config:
        return print(OmegaConf.to_yaml(config, resolve=True), end="")
    if options.inspect:
        from ldm.training.inspection import inspect_run
        return inspect_run(config, options.inspect)
    from ldm.training.run import fine_tune  # Lightning and the model code load only when there is work
    run = fine_tune(config, folder, options.insist)
    print(f"concept file: {run.concept}\nimages:     {run.preview or run.folder / 'images'}")
    base = f"CKPT={shlex.quote(config.base.ckpt)} " if config.base.ckpt else ""
    print(f"next:         {base}CONCEPT={shlex.quote(str(run.concept))} bash {from_here('inference.sh')}")


if __name__ == "__main__":
    cli.run(main)
