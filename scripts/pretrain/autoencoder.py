"""Stage 2: trains the autoencoder on the drawn pictures, patterns and all."""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import from_pictures, launch, save_sheet, stage_parser, to_pictures, train
from omegaconf import OmegaConf
from torch import nn

from ldm.util import instantiate_from_config


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4.0 / error)).mean())


def main() -> None:
    parser = stage_parser(__doc__, minutes=30)
    parser.add_argument("--config", default="configs/model/tiny.yaml")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step, all processes together")
    launch(work, parser.parse_args())


def work(rank: int, args: argparse.Namespace) -> None:
    """Trains in process `rank`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = OmegaConf.load(args.config).model.params.first_stage_config
    model = instantiate_from_config(config).to(args.device)
    pictures = np.load(args.state / "pictures.npy", mmap_mode="r")
    concepts = from_pictures(np.load(args.state / "concepts.npy"))
    held_out, pool = from_pictures(pictures[:64]), pictures[64:]
    forward = torch.compile(model) if args.compile else model

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng(step)                  # a resumed run goes on as if it had never stopped
        mine = rng.integers(len(pool), size=args.batch)[rank::args.workers]               # this process's share
        x = from_pictures(pool[np.sort(mine)]).to(args.device)
        reconstructions, posterior = forward(x)
        return model.loss(x, reconstructions, posterior)

    @torch.no_grad()
    def sheet(averaged: nn.Module, path: Path) -> str:
        scores, rows = [], []
        for x in (held_out, concepts):
            y = averaged(x.to(args.device), sample_posterior=False)[0].cpu()
            scores.append(psnr(x, y))
            rows += [to_pictures(x[:12]), to_pictures(y[:12])]
        save_sheet(rows, path)
        return f"{scores[0]:.2f} dB on held-out pictures, {scores[1]:.2f} dB on the concept references"

    train("autoencoder", model, loss_of, args, peak_lr=2e-3, sheet=sheet, weight_decay=0.0)


if __name__ == "__main__":
    main()
