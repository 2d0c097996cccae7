"""Stage 8: draws held-out captions with the packed model, and lets the judge say what came out."""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import from_pictures, save_sheet, to_pictures
from judge import HEADS, accuracies, targets
from omegaconf import OmegaConf
from small_world.world import NONE, SmallWorld
from world import WORLD

from ldm.base import build_model
from ldm.config import BaseConfig
from ldm.evaluation.judge import load_judge
from ldm.files import write_atomically
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion

FIRST_SEED = 60_000_000     # neither the generator's nor the judge's pictures
SHOWN = 12                  # pictures a row of the sheet


@torch.no_grad()
def draw(model: LatentDiffusion, captions: Sequence[str], steps: int, scale: float, batch: int = 20) -> np.ndarray:
    """Draws a picture (N, H, W, 3) uint8 per caption, each from a seed of its own."""
    parts = []
    for first in range(0, len(captions), batch):
        some = list(captions[first:first + batch])
        latents, _ = DDIMSampler(model).sample(
            steps, len(some), (model.channels, model.image_size, model.image_size),
            model.get_learned_conditioning(some), verbose=False, unconditional_guidance_scale=scale,
            unconditional_conditioning=model.get_learned_conditioning([""] * len(some)),
            generators=[torch.Generator().manual_seed(first + index) for index in range(len(some))])
        parts.append(to_pictures(model.decode_first_stage(latents)))
        print(f"drawn {first + len(some)} of {len(captions)}", flush=True)
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the assets folder of the npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--state", type=Path, default=Path("pretrain_state"), help="where the judge is and results go")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--model", type=Path, default=Path("configs/model/tiny.yaml"))
    parser.add_argument("--sampling", type=Path, default=Path("configs/sample/tiny.yaml"), help="steps and guidance")
    args = parser.parse_args()
    world = SmallWorld(args.assets, replace(WORLD, p_style=0.4, p_colour=0.45))
    asked = [world.draw(FIRST_SEED + index, relation=NONE) for index in range(args.samples)]
    judge = load_judge(args.state / "judge.safetensors")
    sampling = OmegaConf.load(args.sampling)
    model, _ = build_model(OmegaConf.load(args.model).model, BaseConfig())
    pictures = draw(model, [picture.caption for picture in asked], sampling.steps, sampling.scale)
    truth = targets([vars(picture.truth) for picture in asked], judge.classifier.labels)
    renders = from_pictures(np.stack([picture.image for picture in asked]))
    found = {"samples": accuracies(judge.classifier, from_pictures(pictures), truth),
             "renders of the same captions": accuracies(judge.classifier, renders, truth)}
    for what, shares in found.items():
        print(f"{what}: " + ", ".join(f"{head} {100 * shares[head]:.1f} %" for head in HEADS))
    write_atomically(args.state / "quality.json", lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    shown = pictures[:len(pictures) // SHOWN * SHOWN][:6 * SHOWN]
    save_sheet(list(shown.reshape(-1, SHOWN, *shown.shape[1:])), args.state / "quality.png")
    for row, picture in enumerate(asked[:6 * SHOWN]):
        print(f"{row // SHOWN + 1}.{row % SHOWN + 1} {picture.caption}")


if __name__ == "__main__":
    main()
