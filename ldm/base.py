"""Base models: built from a configuration and files of weights, named by what they are, asked what sizes they draw."""
from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import cast_weights, is_mapped, load_file
from ldm.config import BaseConfig
from ldm.customization.selection import UNET_PREFIX
from ldm.device import format_of
from ldm.embedded import NAME
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.recognize import fit_names, load_checkpoint, read_vae, say_left_out
from ldm.util import UserError, instantiate_from_config

COUNTS = {"num_res_blocks", "transformer_depth", "layers", "channel_mult", "ch_mult"}     # of a model's modules
MAX_COUNT = 64
# What building from a wrong configuration ends in: a key that is missing or unknown, a size that cannot be.
WRONG_CONFIGURATION = (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AssertionError, RuntimeError)
MAX_SIDE = 8192          # px of an image


def check_counts(node: Any) -> None:
    """Refuses a model's configuration that asks for more layers than any network has, before one is built."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    waiting = [node]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += value.values()
        for name in COUNTS & value.keys():
            count = value[name]
            if isinstance(count, list):
                count = len(count)
            if isinstance(count, (int, float)) and count > MAX_COUNT:
                raise UserError(f"the model cannot be built: {name} is {count}, and {MAX_COUNT} is the most; compare "
                                "it with configs/model/.")


def empty_model(model_node: Any) -> LatentDiffusion:
    """Builds a model on the meta device: without weights, in a second and no memory.

    Raises:
        UserError: the configuration is none of a `LatentDiffusion`.
    """
    check_counts(model_node)
    try:
        with torch.device("meta"):       # weights come from a file; no time or memory goes into others
            model = instantiate_from_config(model_node)
    except WRONG_CONFIGURATION as error:
        raise UserError(f"the model cannot be built from its configuration ({error}); "
                        "compare it with configs/model/.") from error
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"model.target must be a LatentDiffusion, not {type(model).__name__}.")
    return model


def build_model(model_node: Any, base: BaseConfig,
                dtype: torch.dtype = torch.float32) -> tuple[LatentDiffusion, dict[str, str]]:
    """Builds a base model with its weights and returns it with its identity; no checkpoint means the embedded model.

    Args:
        model_node: the configuration's `model`.
        base: which checkpoint, and which autoencoder in place of its own.
        dtype: the format of U-Net and autoencoder, whatever the files': each weight is cast once, from its file.

    Raises:
        UserError: a file is missing, broken or of another kind, or the configuration is no model's.
    """
    path, name = Path(str(resources.files("ldm.tiny") / "model.safetensors")), NAME
    if base.ckpt is not None:
        path = Path(base.ckpt)
        name = path.stem
    content = load_file(path)      # before the model is built: a missing or broken file should cost no time
    model = empty_model(model_node)

    def read() -> dict[str, Tensor]:
        weights, _ = fit_names(load_file(path), model)
        if base.vae:
            weights |= read_vae(base.vae, model)[0]
        return weights

    vae, spare = read_vae(base.vae, model) if base.vae else ({}, [])
    load_checkpoint(model, content, path, vae=vae, assign=True)
    say_left_out(base.vae, spare)
    identity = base_identity(model, base.name or name)
    mapped = is_mapped(path) and (base.vae is None or is_mapped(Path(base.vae)))
    del content, vae                     # what is cast stays in memory no longer than it is needed
    cast_weights(model, lambda key: format_of(key, dtype), read if mapped else None)
    model.to("cpu")                      # where its weights are already; Lightning still has "meta" noted as its place
    return model.eval().requires_grad_(False), identity


def base_identity(model: LatentDiffusion, name: str) -> dict[str, str]:
    """Names a base model: by its name and two hashes over the first values of its tensors.

    `hash` is of all tensors' values in half precision. `network` is of what a concept touches, U-Net and text encoder,
    and of signs alone: those are the same whatever format a file stores, and any training turns some.
    """
    values, signs = hashlib.sha256(), hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        if ".token_embedding.extra." in key or key.startswith("model_ema."):
            continue
        first = state[key].detach().reshape(-1)[:2048].cpu()
        title = f"{key}{tuple(state[key].shape)}".encode()
        values.update(title + first.to(torch.float16).numpy().tobytes())
        if key.startswith((UNET_PREFIX, "cond_stage_model.")):
            signs.update(title + first.signbit().numpy().tobytes())
    return {"name": name, "hash": values.hexdigest()[:16], "network": signs.hexdigest()[:16]}


def image_side(model: LatentDiffusion, name: str, side: int | None) -> int:
    """Returns an image's side in px, the model's own where it is None.

    Raises:
        UserError: the side, called `name`, is no multiple of what the network needs.
    """
    factor = model.first_stage_model.encoder.reduction
    multiple = factor * model.model.diffusion_model.reduction
    if side is None:
        side = model.image_size * factor
    if not multiple <= side <= MAX_SIDE or side % multiple:
        raise UserError(f"{name} is {side} px; this model needs a multiple of {multiple}, up to {MAX_SIDE}.")
    return side
