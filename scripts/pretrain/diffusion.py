"""Stage 4: trains the U-Net on cached latents and text features."""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import from_pictures, launch, save_sheet, stage_parser, to_pictures, train
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoint import load_file, weights_hash
from ldm.files import write_atomically
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config

SHEET_CAPTIONS = ["a photo of a cat in the snow", "a dog on the beach", "a red car on a city street",
                  "a teapot on a wooden table", "a blue backpack in the forest", "a penguin on the moon",
                  "a striped blue and pink cat at night", "an oil painting of a house in the mountains",
                  "a pencil sketch of a boat", "a mug in the desert", "a green fish underwater",
                  "a teddy bear in space"]

OBJECT_WEIGHT = 3.0     # of an error in the object's box against one outside: scenes are learned long before nouns


def records(state: Path) -> list[dict]:
    """Return the truth of every picture of the world, as `world.py` wrote it into the state folder."""
    with open(state / "captions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def denoiser_of(packed: Path) -> dict[str, Tensor]:
    """Return the U-Net's weights, by its own names, out of a packed model."""
    prefix = "model.diffusion_model."
    return {key.removeprefix(prefix): value.float() for key, value in load_file(packed).items()
            if key.startswith(prefix)}


def coverage(boxes: Tensor, size: int) -> Tensor:
    """Return which part of each latent pixel (B, 1, size, size) the boxes (B, 4; x0, y0, x1, y1 in 0..1) cover."""
    edges = torch.arange(size + 1, device=boxes.device) / size
    first, last = boxes[:, :2, None], boxes[:, 2:, None]                                   # (B, 2, 1)
    inside = (torch.minimum(edges[1:], last) - torch.maximum(edges[:-1], first)).clamp(min=0) * size
    return inside[:, 1, :, None].mul(inside[:, 0, None, :]).unsqueeze(1)


def mirrored(boxes: Tensor) -> Tensor:
    """Return where the boxes (B, 4) are in the mirrored pictures."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([1 - x1, y0, 1 - x0, y1], dim=1)


@torch.no_grad()
def cache(model: LatentDiffusion, state: Path, rank: int = 0, workers: int = 1, batch: int = 64) -> dict[str, Any]:
    """Encodes all pictures (and their mirror images) and all distinct captions once; kept in `latents.pt`.

    What other encoders made, or of another number of pictures, is made anew. Each process encodes a share; the first
    one joins them.
    """
    path = state / "latents.pt"
    pictures = np.load(state / "pictures.npy", mmap_mode="r")
    source = " ".join([weights_hash(model.first_stage_model.state_dict()),
                       weights_hash(model.cond_stage_model.state_dict()), str(len(pictures))])
    if path.exists():
        kept = load_file(path)
        if kept.get("source") == source:
            return kept
    captions = [record["caption"] for record in records(state)]
    distinct = ["", *sorted(set(captions))]

    def share(count: int) -> list[slice]:
        edges = [count * place // workers for place in (rank, rank + 1)]
        return [slice(first, min(first + batch, edges[1])) for first in range(edges[0], edges[1], batch)]

    def encode(rows: np.ndarray) -> Tensor:
        x = from_pictures(rows).to(model.device)
        return torch.stack([model.encode_first_stage(y).mode() for y in (x, x.flip(3))], dim=1).half().cpu()

    encoded = {"latents": torch.cat([encode(pictures[rows]) for rows in share(len(pictures))]),
               "features": torch.cat([model.get_learned_conditioning(distinct[rows]).half().cpu()
                                      for rows in share(len(distinct))])}
    number = {caption: index for index, caption in enumerate(distinct)}
    parts = [encoded]
    if workers > 1:
        torch.save(encoded, state / f"latents-{rank}.part")
        dist.barrier()
        parts = [load_file(state / f"latents-{place}.part") for place in range(workers)]
    cached = {"source": source, **{name: torch.cat([part[name] for part in parts]) for name in encoded}}
    cached["caption"] = torch.tensor([number[caption] for caption in captions])
    if rank == 0:
        write_atomically(path, lambda part: torch.save(cached, part))
    if workers > 1:
        dist.barrier()
        (state / f"latents-{rank}.part").unlink()
    return cached


def main() -> None:
    parser = stage_parser(__doc__, minutes=90)
    parser.add_argument("--config", default="configs/model/tiny.yaml")
    parser.add_argument("--batch", type=int, default=48, help="pictures a step, all processes together")
    parser.add_argument("--start", type=Path, help="a packed model to go on from, where nothing was saved yet")
    launch(work, parser.parse_args())


def work(rank: int, args: argparse.Namespace) -> None:
    """Trains in process `rank`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = instantiate_from_config(OmegaConf.load(args.config).model)
    model.first_stage_model.load_state_dict(load_file(args.state / "autoencoder.pt")["averaged"])
    text = {key.removeprefix("text."): value for key, value in
            load_file(args.state / "text_encoder.pt")["averaged"].items() if key.startswith("text.")}
    model.cond_stage_model.transformer.load_state_dict(text)
    model = model.to(args.device).eval()
    data = cache(model, args.state, rank, args.workers)
    model.scale_factor = 1.0 / float(data["latents"][:4000].float().std())
    boxes = torch.tensor([record["box"] for record in records(args.state)])
    boxes = torch.stack([boxes, mirrored(boxes)], dim=1)                                  # (N, 2, 4), as the latents
    network = model.model.diffusion_model.train()
    if args.start:
        network.load_state_dict(denoiser_of(args.start))
    forward = torch.compile(network) if args.compile else network

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)          # a resumed run goes on as if it had never stopped
        count, mine = args.batch, slice(rank, None, args.workers)                         # this process's share
        rows = torch.randint(0, len(data["caption"]), (count,), generator=rng)[mine]
        side = torch.randint(0, 2, (count,), generator=rng)[mine]
        x = data["latents"][rows, side].float().to(args.device) * model.scale_factor      # (B, 4, 16, 16)
        dropped = torch.rand(count, generator=rng)[mine] < 0.1                            # empty captions
        context = data["features"][data["caption"][rows].masked_fill(dropped, 0)].float().to(args.device)
        # Spread evenly over the schedule, so that the loss of a batch hangs less on chance (Kingma et al. 2021, I.1).
        even = (torch.rand((), generator=rng) + torch.arange(count) / count) % 1.0
        t = (even * model.num_timesteps).long()[mine].to(args.device)
        noise = torch.randn((count, *x.shape[1:]), generator=rng)[mine].to(args.device)
        covered = coverage(boxes[rows, side].to(args.device), x.shape[-1])                # (B, 1, 16, 16)
        weight = 1 + (OBJECT_WEIGHT - 1) * covered
        error = (forward(model.q_sample(x, t, noise), t, context) - noise).square()       # (B, 4, 16, 16)
        error = (error * weight).mean(dim=(1, 2, 3)) / weight.mean()
        snr = model.alphas_cumprod[t] / (1 - model.alphas_cumprod[t])
        return (error * snr.clamp(max=5.0) / snr).mean()                                  # min-SNR (Hang et al. 2023)

    @torch.no_grad()
    def sheet(averaged: nn.Module, path: Path) -> str:
        model.model.diffusion_model = averaged
        count = len(SHEET_CAPTIONS)
        generators = [torch.Generator().manual_seed(index) for index in range(count)]
        latents, _ = DDIMSampler(model).sample(
            25, count, (4, 16, 16), model.get_learned_conditioning(SHEET_CAPTIONS), verbose=False,
            generators=generators, unconditional_guidance_scale=4.0,
            unconditional_conditioning=model.get_learned_conditioning([""] * count))
        save_sheet(list(to_pictures(model.decode_first_stage(latents)).reshape(2, count // 2, 64, 64, 3)), path, 3)
        model.model.diffusion_model = network
        return f"{count} samples in {path.name}"

    train("diffusion", network, loss_of, args, peak_lr=1.5e-3, sheet=sheet, weight_decay=0.01, decay=0.999,
          save_seconds=420)


if __name__ == "__main__":
    main()
