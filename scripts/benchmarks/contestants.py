"""Builds what is compared, on the same random weights: our model, diffusers' networks, the release's way to compute."""
from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm.checkpoint import SCHEDULE_BUFFERS, load_weights
from ldm.convert.diffusers import unet_state, vae_state
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config

WIDE = 256      # channels from which our group norms have Stable Diffusion's 32 groups


def random_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Draws weights for a model without any: activations stay near 1, nothing is zero."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        if key not in SCHEDULE_BUFFERS:
            vector = value.ndim == 1                                 # scales and biases
            std = 0.1 if vector else value[0].numel() ** -0.5
            state[key] = float(vector) + std * torch.randn(value.shape, generator=rng)
    return state


def build_random(model_node: DictConfig) -> LatentDiffusion:
    """Builds our model with random weights, frozen."""
    with torch.device("meta"):              # without memory or time for values that are replaced at once
        model = instantiate_from_config(model_node)
    load_weights(model, random_state(model), "random weights", assign=True)
    params = model_node.params
    for part, width in ((model.model, params.unet_config.params.model_channels),
                        (model.first_stage_model, 2 * params.first_stage_config.params.ddconfig.ch)):
        _one_group_count(part, width)
    return model.to("cpu").eval().requires_grad_(False)      # Lightning has "meta" noted as its place


def _one_group_count(module: nn.Module, width: int) -> None:
    """Gives a small model's group norms one number of groups, as diffusers' networks have; SD's have it already."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm) and width < WIDE:
            part.num_groups = width // 8


def _spelled_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention (B, H, N, d) whose probabilities are formed for every row; no mask is expected."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@contextmanager
def as_the_release(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Computes at the release's cost: attention spelled out, and autocast in place of half precision.

    The release's weights stay in float32 under autocast; here they are in half already, so its casts cost nothing.
    """
    fused = F.scaled_dot_product_attention          # our modules look it up on each call, so replacing it is enough
    F.scaled_dot_product_attention = _spelled_out
    try:
        half = None if dtype == torch.float32 else dtype
        with torch.autocast(device.type, half, enabled=half is not None):
            yield
    finally:
        F.scaled_dot_product_attention = fused


def theirs(model: LatentDiffusion, model_node: DictConfig) -> tuple[nn.Module, nn.Module]:
    """Builds diffusers' U-Net and autoencoder with the weights of `model`.

    Raises:
        UserError: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("the comparison needs the package 'diffusers' (the test extra has it); install it, or give "
                        "--ours_only.")
    unet = model_node.params.unet_config.params
    ddconfig = model_node.params.first_stage_config.params.ddconfig
    return (_their_unet(model.model.diffusion_model, unet).eval().requires_grad_(False),
            _their_vae(model.first_stage_model, ddconfig).eval().requires_grad_(False))


def _their_unet(ours: nn.Module, params: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging
    logging.set_verbosity_error()        # it warns of casts that the comparison asks for
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    heads = [params.get("num_heads") or width // params["num_head_channels"] for width in widths]
    down, up = [], []
    for level in range(len(widths)):
        # CompVis counts resolutions by how often they are halved, diffusers by the kind of block.
        kind = "CrossAttn" if 2**level in params["attention_resolutions"] else ""
        down.append(f"{kind}DownBlock2D")
        up.append(f"{kind}UpBlock2D")
    network = UNet2DConditionModel(
        in_channels=params["in_channels"], out_channels=params["out_channels"], block_out_channels=widths,
        layers_per_block=params["num_res_blocks"], cross_attention_dim=params["context_dim"],
        attention_head_dim=heads, norm_num_groups=ours.out[0].num_groups,
        down_block_types=down, up_block_types=up[::-1])
    network.load_state_dict(unet_state(ours.state_dict(), params["num_res_blocks"]))
    return network


def _their_vae(ours: nn.Module, ddconfig: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL
    levels = len(ddconfig["ch_mult"])
    network = AutoencoderKL(
        in_channels=ddconfig["in_channels"], out_channels=ddconfig["out_ch"], latent_channels=ddconfig["z_channels"],
        layers_per_block=ddconfig["num_res_blocks"], norm_num_groups=ours.encoder.norm_out.num_groups,
        block_out_channels=[ddconfig["ch"] * mult for mult in ddconfig["ch_mult"]],
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    network.load_state_dict(vae_state(ours.state_dict(), levels))
    return network
