"""Other tools' concept files in Custom Diffusion's names: LoRA, differences, attention processors, embeddings.

What a file holds of the U-Net is put under this project's names, all of it, or the file is refused by the first name
that has no place: a part of it would draw something else without a word.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.convert.diffusers import unet_key
from ldm.customization.selection import UNET_PREFIX
from ldm.util import UserError, instantiate_from_config, shipped

EMBED = "embed"                 # Custom Diffusion's name of the new words' rows
VECTORS_HERE = "emb_params"     # A1111's name of an embedding's vectors
DIFFERENCE = "difference"       # beside its "u" and "v": a difference in full
LORA = re.compile(r"lora_unet_(?P<layer>\w+?)\.(?P<part>lora_up\.weight|lora_down\.weight|alpha|diff|diff_b)$")
# PEFT's and diffusers' earlier names: the layer's own, with dots.
DOTTED = re.compile(r"unet\.(?P<layer>.+?)\.(?P<part>lora_[AB]\.weight|lora\.(up|down)\.weight)$")
PROCESSOR = re.compile(r"unet\.(?P<layer>.+)\.processor\.(?P<part>to_\w+)_lora\.(?P<side>up|down)\.weight$")
CUSTOM = re.compile(r"(?P<layer>.+\.attn2)\.processor\.(?P<part>to_[qkv]|to_out)_custom_diffusion\.(?P<rest>.+)$")
TEXT = re.compile(r"(lora_te\d?_|text_encoder\.)")
VECTORS = re.compile(r"(emb_params|bundle_emb\.[^.]+\.string_to_param\.\*|<[^<>\s]+>)$")
SIDES = {"lora_up.weight": "up", "lora_B.weight": "up", "lora.up.weight": "up",
         "lora_down.weight": "down", "lora_A.weight": "down", "lora.down.weight": "down"}


@cache
def our_names() -> dict[str, str]:
    """Returns SD v1's U-Net weights by diffusers' names: ours, which are CompVis's."""
    config = OmegaConf.load(shipped("configs/model/sd-v1.yaml")).model.params.unet_config
    with torch.device("meta"):
        unet = instantiate_from_config(config)
    return {unet_key(name, config.params.num_res_blocks): name for name, _ in unet.named_parameters()}


def translated(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns another tool's file in Custom Diffusion's names; None where it is none of theirs.

    Raises:
        UserError: it changes the text encoder, or has a weight of the U-Net without a place here.
    """
    if isinstance(content.get("unet"), Mapping) and "modifier_token" in content:      # Custom Diffusion's `delta.bin`
        words = [value.detach() for value in content["modifier_token"].values()]
        content = {**content["unet"], **({VECTORS_HERE: torch.stack(words)} if words else {})}
    if "string_to_param" in content:                            # an embedding of A1111 or of Textual Inversion
        content = {VECTORS_HERE: torch.cat(_vectors(content["string_to_param"]))}
    layers: dict[str, dict[str, Tensor]] = {}
    rows, left = [], []
    for key, value in content.items():
        if not isinstance(value, Tensor) and not _pair(value):
            continue
        if TEXT.match(key):
            raise UserError(f"concept file '{path}' changes the text encoder too ('{key}'), which no concept here can; "
                            "it would not be what it was, and is not used.")
        if VECTORS.match(key):
            if value.ndim not in (1, 2) or not value.is_floating_point():
                raise UserError(f"concept file '{path}' is damaged: '{key}' is no table of words' vectors; get it "
                                "again.")
            rows.append(value.detach().reshape(-1, value.shape[-1]))                    # (v, D)
        elif not _take(layers, key, value):
            left.append(key)
    if not layers and (left or not rows):
        return None
    if left:
        raise UserError(f"concept file '{path}' has '{left[0]}', which has no place here; it would not be what it was, "
                        "and is not used.")
    found: dict[str, Any] = {EMBED: torch.cat(rows)} if rows else {}
    names = our_names() if layers else {}
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in names}
    for layer, parts in layers.items():
        theirs = layer if layer in names else flat.get(layer, f"{layer}.weight")
        if theirs not in names:
            raise UserError(f"concept file '{path}' changes '{layer}', which Stable Diffusion v1 does not have; it is "
                            "for another model.")
        found[UNET_PREFIX + names[theirs]] = _change(path, layer, parts)
    print(f"'{path}': {len(layers)} weights of the U-Net are read, none is left", flush=True)
    return found


def _vectors(table: Any) -> list[Tensor]:
    """Returns the vectors (v, D) of an embedding's words; Textual Inversion's own files keep them in a module."""
    table = getattr(table, "_parameters", table)
    return [value.detach().reshape(-1, value.shape[-1]) for value in table.values()]


def _pair(value: Any) -> bool:
    """Says whether a value is Custom Diffusion's compressed form."""
    return isinstance(value, Mapping) and value.keys() == {"u", "v"}


def _take(layers: dict[str, dict[str, Any]], key: str, value: Any) -> bool:
    """Puts an entry to its layer; says whether it is one of the U-Net's."""
    if found := LORA.match(key) or DOTTED.match(key):
        layer, part = found["layer"], SIDES.get(found["part"], found["part"])
    elif found := PROCESSOR.match(key):
        end = "to_out.0" if found["part"] == "to_out" else found["part"]
        layer, part = f"{found['layer']}.{end}", found["side"]
    elif found := CUSTOM.match(key):
        layer, part = f"{found['layer']}.{found['part']}.{found['rest']}", "whole"
    elif key.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        layer, part = key, "whole"
    else:
        return False
    if part == "diff_b":
        layer, part = f"{layer}_bias", "diff"
    layers.setdefault(layer, {})[part] = value if _pair(value) else value.detach()
    return True


def _change(path: Path, layer: str, parts: Mapping[str, Any]) -> Any:
    """Returns a weight in full, as the pair of factors, or as its difference; W = W0 + (alpha / rank) up down."""
    if "whole" in parts:
        return parts["whole"]
    if "diff" in parts:
        return {DIFFERENCE: parts["diff"]}
    if "up" not in parts or "down" not in parts:
        raise UserError(f"concept file '{path}' is not whole: '{layer}' has one factor of two; get it again.")
    up, down = parts["up"].flatten(1).float(), parts["down"].flatten(1).float()        # (d, r), (r, D)
    return {"u": up * float(parts.get("alpha", len(down))) / len(down), "v": down}
