"""Shows what each part of a fine-tuning prompt draws by itself: the contexts, the words, both (paper section 3.2).

    python scripts/experiments/contexts.py --delta_ckpt logs/<run>/checkpoints/step-000240.safetensors

Writes a sheet, reference | "[I]_i noun" | "V noun" | "[I]_i V noun", a row for each reference image, and prints in how
many images the judge sees that reference's scene. The concept file is one of the embedded model.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.customization.delta import Concept, load_concept
from ldm.customization.ico import PromptScheme
from ldm.evaluation.judge import Judge, load_judge
from ldm.evaluation.small_clip import embedded
from ldm.pipeline import Generator
from ldm.sampling import load_generator, reference_images
from ldm.sheets import save_png, sheet
from ldm.util import UserError

CONFIG = "configs/sample-tiny.yaml"
CONTEXTS, WORDS, BOTH = "[I]_i noun", "V noun", "[I]_i V noun"


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False)
    parser.add_argument("--delta_ckpt", type=Path, required=True, help="concept file of the embedded model")
    parser.add_argument("--seeds", type=int, default=8, help="images of each prompt that are counted; one is shown")
    parser.add_argument("--out", type=Path, default=Path("outputs/contexts.png"), help="where the sheet goes")
    return parser


def prompts_of(scheme: PromptScheme, image: int) -> dict[str, str]:
    """Returns the prompts of a reference image's parts, as it was trained with them."""
    both = scheme.caption(image)
    return {CONTEXTS: both.replace(scheme.concept, scheme.class_noun), WORDS: scheme.concept, BOTH: both}


def tuned_generator(concept: Concept) -> Generator:
    """Returns a generator with the concept's weights that knows contexts as words, and takes any prompt."""
    widened = replace(concept, words={**concept.words, **concept.contexts})
    base = load_generator(merge(SampleConfig, [CONFIG]))
    base.load(widened)
    return Generator(base.model, base.identity, base.model.device)     # told of no concept: prompts are plain texts


@cache
def judge() -> Judge:
    """Returns the judge that ships, read once."""
    return load_judge(embedded("judge.safetensors"))


def scenes_seen(images: Sequence[Image.Image]) -> list[str]:
    """Returns the scene that the judge sees in each image."""
    return [labels["scene"][0] for labels in judge().classifier.ranked(images)]


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    concept, references = load_concept(options.delta_ckpt), reference_images([options.delta_ckpt])
    if not concept.contexts:
        raise UserError(f"'{options.delta_ckpt}' holds no contexts; give a concept file that was trained with ICO.")
    if not references:
        raise UserError(f"there are no reference images beside '{options.delta_ckpt}'; give one in its run's folder.")
    generator, settings = tuned_generator(concept), merge(SampleConfig, [CONFIG], [f"n_samples={options.seeds}"])
    rows, seen = [], {CONTEXTS: 0, WORDS: 0, BOTH: 0}
    for index, (reference, scene) in enumerate(zip(references, scenes_seen(references), strict=True)):
        cells = [reference]
        for part, prompt in prompts_of(concept.scheme, index).items():
            images = [sample.image for sample in generator.generate([prompt], settings)]
            seen[part] += scenes_seen(images).count(scene)
            cells.append(images[0])
        rows.append((f"reference {index + 1}: {scene}", cells))
    total = options.seeds * len(references)
    columns = [f"{part}: {count} of {total}" for part, count in seen.items()]
    print(f"images that show their reference's scene: {'; '.join(columns)}")
    print(f"sheet: {save_png(sheet(['reference', *columns], rows), options.out)}")


if __name__ == "__main__":
    cli.run(main)
