"""A CLIP small enough to write down: it sees an image's mean color, and reads the words red, green and blue."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

NAME, WIDTH, SIDE = "colors", 16, 32
COLORS = {"red": (2, -1, -1), "green": (-1, 2, -1), "blue": (-1, -1, 2)}
ARCHITECTURE = {"embed_dim": WIDTH, "quick_gelu": False,
                "vision_cfg": {"image_size": SIDE, "layers": 1, "width": WIDTH, "head_width": WIDTH,
                               "patch_size": SIDE // 2, "pool_type": "avg"},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 1, "layers": 1}}


@torch.no_grad()
def write_clip(folder: Path) -> tuple[Path, Path]:
    """Writes the architecture as JSON and the weights, and returns both paths."""
    architecture, weights = folder / f"{NAME}.json", folder / "colors.safetensors"
    architecture.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(architecture)
    model = open_clip.create_model(NAME)
    for name, parameter in model.named_parameters():
        if "ln_" not in name and name != "logit_scale":
            parameter.zero_()
    for channel in range(3):              # a color and its opposite, so that LayerNorm changes the length alone
        model.visual.conv1.weight[channel, channel] = 1.0
        model.visual.conv1.weight[channel + 3, channel] = -1.0
    model.visual.proj.copy_(torch.eye(WIDTH))
    model.text_projection.copy_(torch.eye(WIDTH))
    attention = model.transformer.resblocks[0].attn
    attention.in_proj_weight[2 * WIDTH:] = torch.eye(WIDTH)        # the mean of all words, without queries and keys
    attention.out_proj.weight.copy_(torch.eye(WIDTH))
    tokenizer = open_clip.get_tokenizer(NAME)
    for word, color in COLORS.items():
        token = int(tokenizer([word])[0, 1])
        model.token_embedding.weight[token, :6] = torch.tensor([*color, *(-value for value in color)]).float()
    model.token_embedding.weight[int(tokenizer([""])[0, 1]), 6:8] = torch.tensor([0.3, -0.3])    # the end's own mark
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    return architecture, weights


def colored(name: str, seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Draws an image of patches that are on average of a color; no two are alike."""
    base = np.where(np.array(COLORS[name]) > 0, 190, 60)
    patches = base + np.random.default_rng(seed).integers(-55, 56, (4, 4, 3))
    return Image.fromarray(patches.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
