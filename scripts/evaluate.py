"""Measures images, of a folder or drawn with a concept file: JSON rows, CSV, a table with intervals, a sheet."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.flags import Flag, read_flags, set_keys
from ldm.util import UserError

EMBEDDED = ("configs/sample-tiny.yaml",)
PROMPTS = "configs/prompts/evaluation.txt"
FLAGS = (Flag("n_samples", "n_samples", int, "images per prompt, by seeds"), Flag("seed", "seed", int))


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, schema=SampleConfig, shipped={"": EMBEDDED})
    parser.add_argument("--images", "--pictures", type=Path, help="folder of images, any known layout")
    parser.add_argument("--prompts", type=Path, help="their prompts: JSON {name: prompt}, or a line per image")
    parser.add_argument("--delta_ckpt", type=Path, help="concept file to draw and measure instead")
    parser.add_argument("--from-file", "--from_file", type=Path, help="what to draw with it, a prompt per line; "
                        f"CustomConcept101's files fit; default: {PROMPTS}")
    parser.add_base()
    parser.add_flags(FLAGS)
    parser.add_argument("--references", type=Path, help="the concept's images; default: beside the concept file")
    parser.add_argument("--class_noun", default="", help="what the thing is, where images do not say it")
    parser.add_argument("--kid_references", type=Path, help="real images for KID; default: the references")
    parser.add_argument("--metrics", nargs="+", help="small_clip efficientnet clip_b32 clip_l14 dino judge kid; "
                        "default: all that can be loaded")
    parser.add_argument("--metric_weights", nargs="+", default=[], metavar="METRIC=FILE",
                        help="weights that do not ship: clip_b32, clip_l14, dino")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/evaluation"), help="where results go")
    return parser


def draw(options, config: SampleConfig) -> list:
    """Draws with the concept file into the output folder and returns the images."""
    from ldm.evaluation.evaluate import claim
    from ldm.evaluation.image_sets import read_prompts, sampled_images
    from ldm.sampling import chooser_for, load_generator, sample_run
    prompts = read_prompts(options.from_file or Path(PROMPTS))
    chooser = chooser_for(config, [options.delta_ckpt])
    generator = load_generator(config, [options.delta_ckpt], class_noun=options.class_noun, prompts=prompts)
    claim(options.outdir)       # measuring comes last, and drawing takes hours
    return sampled_images(sample_run(generator, config, prompts, options.outdir, grid=False, chooser=chooser).files)


def check(options) -> None:
    """Refuses options that would be ignored, and folders that hold no images, before any work."""
    if (options.images is None) == (options.delta_ckpt is None):
        raise UserError("give either --images FOLDER or --delta_ckpt FILE.")
    drawing = {"--from_file": options.from_file, "--ckpt": options.ckpt, "--vae": options.vae,
               "--any_base": options.any_base, "--n_samples": options.n_samples,
               "--seed": options.seed, "-b": options.base, **{item: item for item in options.overrides}}
    unused = [name for name, value in drawing.items() if value is not None]
    if options.images and unused:
        raise UserError(f"'{unused[0]}' changes how images are drawn, but --images are drawn already.")
    if options.delta_ckpt and options.prompts:
        raise UserError("--prompts belongs to --images; name the file of what to draw with --from_file.")
    if options.kid_references and options.metrics and "kid" not in options.metrics:
        raise UserError("--kid_references is given, but --metrics leaves kid out; name kid too.")
    from ldm.data.captions import captioned
    for folder in filter(None, (options.references, options.kid_references)):
        for item in captioned(folder, captions=False).skipped:
            print(f"skipped {item}")


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    check(options)
    from ldm.device import choose_device
    from ldm.evaluation.evaluate import evaluate  # torch loads only when there is work for it
    from ldm.evaluation.image_sets import read_images
    from ldm.evaluation.scoring import load_scorer, read_weights
    found = read_images(options.images, options.prompts) if options.images else []
    flags = set_keys(read_flags(options, FLAGS))
    config = merge(SampleConfig, options.base or EMBEDDED, options.overrides, flags)
    scorer = load_scorer(options.metrics, read_weights(options.metric_weights), choose_device(config.device))
    found = found or draw(options, config)
    beside = options.delta_ckpt.parent.parent / "images" / "references" if options.delta_ckpt else None
    references = options.references or (beside if beside and beside.is_dir() else None)
    result = evaluate(found, scorer, options.outdir, references, options.class_noun, options.kid_references)
    print(result.table)
    for note in result.notes:
        print(note)
    print(f"rows, table and sheet: {result.folder}")


if __name__ == "__main__":
    cli.run(main)
