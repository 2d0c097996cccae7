"""Stage 3: trains a small CLIP, whose text tower conditions the diffusion model."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import from_pictures, save_sheet, stage_parser, train
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.evaluation.small_clip import SmallCLIP
from ldm.util import instantiate_from_config


def main() -> None:
    parser = stage_parser(__doc__, minutes=10, shared=False)
    parser.add_argument("--config", default="configs/model/tiny.yaml")
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = OmegaConf.load(args.config).model.params.cond_stage_config
    embedder = instantiate_from_config(config)
    model = SmallCLIP(embedder, config.params.width).to(args.device)
    pictures = np.load(args.state / "pictures.npy", mmap_mode="r")
    with open(args.state / "captions.jsonl", encoding="utf-8") as file:      # as `world.py` wrote it
        captions = [json.loads(line)["caption"] for line in file]
    ids = embedder.tokenize(captions)                                               # (M, 77)
    end = (ids == embedder.tokenizer.eos_token_id).int().argmax(dim=1)              # (M,)
    held_out = 512

    def features(rows: np.ndarray, net: SmallCLIP) -> tuple[Tensor, Tensor]:
        length = int(end[rows].max()) + 1       # causal: what stands behind the end token changes nothing before it
        texts = net.encode_text(ids[rows, :length].to(args.device), end[rows].to(args.device))
        return texts, net.encode_image(from_pictures(pictures[rows]).to(args.device))

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng(step)                  # a resumed run goes on as if it had never stopped
        rows = np.sort(rng.choice(len(captions) - held_out, args.batch, replace=False) + held_out)
        texts, images = features(rows, model)
        logits = model.log_scale.exp().clamp(max=50) * texts @ images.T             # (B, B)
        # Pictures of the same caption are equally right answers.
        same = torch.tensor([[captions[i] == captions[j] for j in rows] for i in rows], dtype=torch.float32)
        target = (same / same.sum(1, keepdim=True)).to(args.device)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

    @torch.no_grad()
    def sheet(averaged: nn.Module, path: Path) -> str:
        texts, images = features(np.arange(held_out), averaged)
        best = (texts @ images.T).argmax(dim=0).cpu()
        hits = sum(captions[row] == captions[int(best[row])] for row in range(held_out)) / held_out
        save_sheet([pictures[:12]], path)
        return f"caption of {held_out} found for {100 * hits:.1f} % of the held-out pictures"

    train("text_encoder", model, loss_of, args, peak_lr=5e-4, sheet=sheet, weight_decay=0.05, betas=(0.9, 0.98),
          decay=0.99)


if __name__ == "__main__":
    main()
