"""Draws docs/method.png: the two branches over time, and what DBIM's masks are on one image of a concept file.

    python -m experiments.method_figure FILE          (from scripts/; matplotlib is in the extra "evaluation")
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from omegaconf import DictConfig

from ldm import cli
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.files import write_atomically
from ldm.pipeline import Generator, Masks
from ldm.requests import ImageRequest
from ldm.sampling import load_generator

matplotlib.use("Agg")
CONFIG = "configs/sample-tiny.yaml"
CONCEPT, AUXILIARY, ALONE = "#1f6fb2", "#c8501e", "#555555"
SIDE = 16            # px of the masks that are shown, the embedded model's finest resolution
EARLY = 0.3          # where in the joint phase they are read, as a share of it


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False)
    parser.add_argument("delta_ckpt", type=Path, help="concept file of the embedded model")
    parser.add_argument("--prompt", default="a {} in the snow", help="what to draw")
    parser.add_argument("--strength", type=float, default=1.5, help="lambda")
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    parser.add_argument("--out", type=Path, default=Path("docs/method.png"), help="where the figure goes")
    return parser


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 0.15) -> None:
    """Draws a rounded box around a text; x and y are its left and middle."""
    axes.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0.008,rounding_size=0.03",
                                  facecolor="white", edgecolor=color, linewidth=1.6))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5, color=color)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draws an arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.4))


def draw_branches(axes: Axes, texts: tuple[str, str]) -> None:
    """Draws the two branches from noise to image: joint until T_a, then the concept alone."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    top, bottom = 0.72, 0.26
    axes.axvspan(0.0, 0.635, ymin=0.06, ymax=0.93, color="#f3f3f0", zorder=0)
    axes.text(0.318, 0.96, r"joint phase:  $t/T > 1 - T_a$", ha="center", fontsize=9.5)
    axes.text(0.83, 0.96, "then the concept alone", ha="center", fontsize=9.5)
    box(axes, 0.02, top, 0.27, f"concept branch\n“{texts[0]}”", CONCEPT, 0.2)
    box(axes, 0.02, bottom, 0.27, f"auxiliary branch\n“{texts[1]}”", AUXILIARY, 0.2)
    box(axes, 0.37, top, 0.22, "cross-attention\n" r"$O^c \leftarrow M^c O^c + M^a O^a$", CONCEPT, 0.2)
    box(axes, 0.37, bottom, 0.22, "cross-attention\n" r"$O^a$", AUXILIARY, 0.2)
    box(axes, 0.71, top, 0.22, "cross-attention\nas usual", ALONE, 0.2)
    for y, color in ((top, CONCEPT), (bottom, AUXILIARY)):
        arrow(axes, (0.30, y), (0.365, y), color)
    arrow(axes, (0.48, bottom + 0.105), (0.48, top - 0.105), AUXILIARY)
    axes.text(0.495, 0.49, "DBIM, in every layer: masks $M^c$, $M^a$\nfrom both branches’ attention (Eq 3–5);\n"
              "λ lets more of the auxiliary in", fontsize=8.2, va="center")
    arrow(axes, (0.60, top), (0.705, top), CONCEPT)
    arrow(axes, (0.60, bottom), (0.655, bottom), AUXILIARY)
    axes.text(0.665, bottom, "ends here", fontsize=8.5, va="center", color=AUXILIARY)
    arrow(axes, (0.94, top), (1.0, top), ALONE)


def early_mask(masks: Masks) -> np.ndarray:
    """Returns M^c (h, w) in [0, 1] at an early joint step, the mean of the layers of one resolution and their heads."""
    layers = len({name for name, _ in masks})
    step = int(EARLY * len(masks) / layers)
    of_step = masks[step * layers:(step + 1) * layers]
    maps = [values[0, 0].mean(dim=0) for _, values in of_step if values.shape[-1] == SIDE]      # (h, w) each
    return torch.stack(maps).mean(dim=0).numpy()


def draw_images(figure: plt.Figure, generator: Generator, settings: DictConfig, request: ImageRequest) -> None:
    """Draws the image without DCI and with it, and the mask between them."""
    with_dci, masks = generator.masks(request, settings)
    plain = next(generator.generate([request.prompt], merge(SampleConfig, [CONFIG], [
        "dci.use=false", f"seed={request.seed}"]))).image
    mask = early_mask(masks)
    panels = ((plain, "fine-tuned"), (mask, "$M^c$: where the concept\nkeeps its own (white)"),
              (with_dci, f"+ DCI, λ = {request.strength:g}"))
    for place, (image, title) in enumerate(panels):
        axes = figure.add_axes((0.625 + 0.126 * place, 0.12, 0.118, 0.62))
        axes.imshow(image, cmap="gray", vmin=0, vmax=1 if image is mask else None, interpolation="nearest")
        axes.set_title(title, fontsize=8.5)
        axes.axis("off")


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    settings = merge(SampleConfig, [CONFIG])
    generator = load_generator(settings, options.delta_ckpt, prompts=[options.prompt])
    request = ImageRequest(options.prompt, options.seed, options.strength)
    concept, auxiliary = generator.prompts.token_sets([options.prompt], settings.dci)
    noun = generator.concept.scheme.class_noun
    named = concept.prompts[0].replace(generator.concept.scheme.concept, f"V {noun}")
    figure = plt.figure(figsize=(12, 2.9), dpi=110)
    draw_branches(figure.add_axes((0.0, 0.0, 0.61, 1.0)), (named, auxiliary.prompts[0]))
    draw_images(figure, generator, settings, request)
    write_atomically(options.out, lambda part: figure.savefig(part, format="png"))
    print(f"figure: {options.out}")


if __name__ == "__main__":
    cli.run(main)
    sys.exit()
