"""Draws docs/method.png: how DCI samples with two branches, and what it does to one image of a concept file.

    python scripts/experiments/method_figure.py --delta_ckpt logs/<run>/checkpoints/step-000240.safetensors

The concept file is one of the embedded model; matplotlib comes with the extra "evaluation".
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.files import write_atomically
from ldm.pipeline import Generator, Masks
from ldm.requests import ImageRequest
from ldm.sampling import load_generator, reference_images
from ldm.util import UserError

matplotlib.use("Agg")
CONFIG = "configs/sample-tiny.yaml"
CONCEPT, AUXILIARY, FUSION, LATER = "#1f6fb2", "#c8501e", "#3d7a3d", "#555555"
REFERENCE = 3        # which reference image stands in the figure
SIDE = 16            # px of the masks that are shown, the embedded model's finest resolution
EARLY = 0.35         # where in the joint phase they are read, as a share of it


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False)
    parser.add_argument("--delta_ckpt", type=Path, required=True, help="concept file of the embedded model")
    parser.add_argument("--prompt", default="a {} on the beach", help="what to draw")
    parser.add_argument("--strength", type=float, default=2.0, help="lambda")
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    parser.add_argument("--out", type=Path, default=Path("docs/method.png"), help="where the figure goes")
    return parser


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, color: str) -> None:
    """Draws a rounded box around a text; `corner` is its lower left."""
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=1.5", facecolor="white",
                                  edgecolor=color, linewidth=1.8))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", fontsize=10,
              color=color, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draws an arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, linewidth=1.8,
                                   shrinkA=0, shrinkB=0))


def draw_branches(axes: Axes, concept: str, auxiliary: str, class_noun: str) -> None:
    """Draws the two branches, from their prompts to the image: joint in the early steps, then the concept alone."""
    axes.set(xlim=(-1, 101), ylim=(0, 60))
    axes.axis("off")
    axes.add_patch(Rectangle((24, 2), 44, 50, color="#f1f1ec", zorder=0))
    axes.text(46, 54.5, r"early steps, $t/T > 1 - T_a$: both branches", ha="center", fontsize=11)
    axes.text(84.5, 54.5, "later steps: one branch", ha="center", fontsize=11)
    layer = "every cross-attention layer of the U-Net:\nattention maps $A^{0}$, output $O^{0}$"
    rows = ((40, "concept branch", concept, CONCEPT, "c"), (5, "auxiliary branch", auxiliary, AUXILIARY, "a"))
    for y, name, prompt, color, letter in rows:
        box(axes, (0, y - 1), (20, 12), f"{name}\n“{fill(prompt, 16)}”", color)
        box(axes, (27, y), (38, 10), layer.replace("0", letter), color)
        arrow(axes, (20.5, y + 5), (26.5, y + 5), color)
    axes.text(10, 27.5, f"V {class_noun} becomes\nan everyday noun;\nweights are shared,\nthe noise is its own",
              ha="center", va="center", fontsize=9.5, color=LATER)
    box(axes, (27, 20), (38, 15), "DBIM\n$A^c, A^a$ → masks, $M^c + M^a = 1$ (Eq 3, 4)\n"
        r"$O^c \leftarrow M^c O^c + M^a O^a$ (Eq 5)", FUSION)
    arrow(axes, (33, 39.5), (33, 35.5), CONCEPT)
    arrow(axes, (46, 15.5), (46, 19.5), AUXILIARY)
    arrow(axes, (59, 35.5), (59, 39.5), FUSION)
    axes.text(60.2, 37.5, "fused $O^c$", va="center", fontsize=9.5, color=FUSION)
    arrow(axes, (65.5, 45), (73.5, 45), CONCEPT)
    box(axes, (74, 40), (19, 10), "U-Net as usual,\nconcept prompt", LATER)
    arrow(axes, (93.5, 45), (99.5, 45), LATER)
    axes.text(96.8, 41.8, "image", ha="center", va="center", fontsize=10, color=LATER)
    arrow(axes, (65.5, 10), (73.5, 10), AUXILIARY)
    axes.text(74.5, 10, "ends here, its image is not used", va="center", fontsize=9.5, color=AUXILIARY)
    axes.text(70.5, 27.5, "λ decides how much of the\nauxiliary branch comes in\n(outside the concept above all)",
              va="center", fontsize=9.5, color=FUSION)


def early_mask(masks: Masks) -> tuple[np.ndarray, str]:
    """Returns M^c (h, w) at an early joint step, a mean of one resolution's layers and heads; and which step it is."""
    layers = len({name for name, _ in masks})
    steps = len(masks) // layers
    step = int(EARLY * steps)
    maps = []
    for _, values in masks[step * layers:(step + 1) * layers]:      # (2, 1, H, h, w) each
        if values.shape[-1] == SIDE:
            maps.append(values[0, 0].mean(dim=0))
    return torch.stack(maps).mean(dim=0).numpy(), f"joint step {step + 1} of {steps}"


def draw_images(figure: plt.Figure, generator: Generator, request: ImageRequest,
                references: Sequence[Image.Image]) -> None:
    """Draws a reference, the image without DCI and with it, and a mask, two by two."""
    with_dci, masks = generator.masks(request, merge(SampleConfig, [CONFIG]))
    plain = merge(SampleConfig, [CONFIG], ["dci.use=false", f"seed={request.seed}"])
    (without,) = generator.generate([request.prompt], plain)
    mask, step = early_mask(masks)
    panels = ((references[REFERENCE % len(references)], f"reference, one of {len(references)}"),
              (without.image, "fine-tuned, without DCI"),
              (mask, f"DBIM's mask $M^c$, {SIDE} x {SIDE},\n{step}"),
              (with_dci, f"same noise, with DCI,\nλ = {request.strength:g}"))
    for place, (image, title) in enumerate(panels):
        axes = figure.add_axes((0.672 + 0.165 * (place % 2), 0.58 - 0.49 * (place // 2), 0.155, 0.35))
        axes.imshow(image, cmap="gray", interpolation="nearest" if image is mask else "bilinear")
        axes.set_title(title, fontsize=9.5)
        axes.axis("off")
        if image is mask:
            note = f"white {mask.max():.2f}: here the concept\nkeeps its own; black {mask.min():.2f}"
            axes.text(0.5, -0.04, note, fontsize=9, ha="center", va="top", transform=axes.transAxes)


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    references = reference_images([options.delta_ckpt])
    if not references:
        raise UserError(f"there are no reference images beside '{options.delta_ckpt}'; give one in its run's folder.")
    settings = merge(SampleConfig, [CONFIG])
    generator = load_generator(settings, [options.delta_ckpt], prompts=[options.prompt])
    request = ImageRequest(options.prompt, options.seed, options.strength)
    _, auxiliary = generator.prompts.token_sets([options.prompt], settings.dci)
    class_noun = generator.concept.scheme.class_noun
    concept = options.prompt.replace("{}", f"V {class_noun}")
    figure = plt.figure(figsize=(12.6, 4.6), dpi=100)
    draw_branches(figure.add_axes((0.005, 0.0, 0.65, 1.0)), concept, auxiliary.prompts[0], class_noun)
    draw_images(figure, generator, request, references)
    write_atomically(options.out, lambda part: figure.savefig(part, format="png", pil_kwargs={"optimize": True}))
    print(f"figure: {options.out}")


if __name__ == "__main__":
    cli.run(main)
