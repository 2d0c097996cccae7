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
DIFFERENCE = "difference"       # beside its "u" and "v": a difference in full
LORA = re.compile(r"lora_unet_(?P<layer>\w+?)\.(?P<part>lora_up\.weight|lora_down\.weight|alpha|diff|diff_b)$")
# PEFT's and diffusers' earlier names: the layer's own, with dots.
DOTTED = re.compile(r"unet\.(?P<layer>.+?)\.(?P<part>lora_[AB]\.weight|lora\.(up|down)\.weight)$")
PROCESSOR = re.compile(r"unet\.(?P<layer>.+)\.processor\.(?P<part>to_\w+)_lora\.(?P<side>up|down)\.weight$")
WHOLE = re.compile(r"unet\.(?P<layer>.+\.(weight|bias))$")      # as `delta.bin` is spelled here
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
        weights = {f"unet.{key}": value for key, value in content["unet"].items()}
        content = weights | _table(path, content["modifier_token"])
    elif "string_to_param" in content:                          # an embedding of A1111 or of Textual Inversion
        content = _table(path, content["string_to_param"])
    layers: dict[str, dict[str, Any]] = {}
    words, left = {}, []
    for key, value in content.items():
        if not isinstance(value, Tensor) and not _pair(value):
            continue
        if TEXT.match(key):
            raise UserError(f"concept file '{path}' changes the text encoder too ('{key}'), which no concept here can; "
                            "it would not be what it was, and is not used.")
        if VECTORS.match(key):
            words[key] = value
        elif not _take(layers, key, value):
            left.append(key)
    if not layers and (left or not words):
        return None
    if left:
        raise UserError(f"concept file '{path}' has '{left[0]}', which has no place here; it would not be what it was, "
                        "and is not used.")
    found: dict[str, Any] = {EMBED: _rows(path, words)} if words else {}
    names = our_names() if layers else {}
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in names}
    for layer, parts in layers.items():
        theirs = layer if layer in names else flat.get(layer, f"{layer}.weight")
        if theirs not in names:
            raise UserError(f"concept file '{path}' changes '{layer}', which Stable Diffusion v1 does not have; it is "
                            "for another model.")
        found[UNET_PREFIX + names[theirs]] = _change(path, layer, parts)
    return found


def _table(path: Path, table: Any) -> dict[str, Tensor]:
    """Returns a table of words under names of one kind; Textual Inversion's own files keep it in a module."""
    table = getattr(table, "_parameters", table)
    if not isinstance(table, Mapping) or not all(isinstance(value, Tensor) for value in table.values()):
        raise _damaged(path, "its table of words")
    return {f"<{place}>": value for place, value in enumerate(table.values())}


def _rows(path: Path, words: Mapping[str, Any]) -> Tensor:
    """Returns the vectors (v, D) of all words."""
    rows = []
    for key, value in words.items():
        if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.is_floating_point():
            raise _damaged(path, key)
        rows.append(value.detach().reshape(-1, value.shape[-1]))
        if rows[-1].shape[1] != rows[0].shape[1]:
            raise _damaged(path, key)
    return torch.cat(rows)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"concept file '{path}' is damaged: '{what}' is not what its name says; get it again.")


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
    elif found := WHOLE.match(key):
        layer, part = found["layer"], "whole"
    else:
        return False
    if part == "diff_b":
        layer, part = f"{layer}_bias", "diff"
    layers.setdefault(layer, {})[part] = value if _pair(value) else value.detach()
    return True


def _change(path: Path, layer: str, parts: Mapping[str, Any]) -> Any:
    """Returns a weight in full, as the pair of factors, or as its difference; W = W0 + (alpha / rank) up down."""
    for part in parts.values():
        if not all(isinstance(value, Tensor) and value.is_floating_point()
                   for value in (part.values() if _pair(part) else (part,))):
            raise _damaged(path, layer)
    if "whole" in parts:
        return parts["whole"]
    if "diff" in parts:
        return {DIFFERENCE: parts["diff"]}
    up, down, alpha = parts.get("up"), parts.get("down"), parts.get("alpha")
    if up is None or down is None:
        raise UserError(f"concept file '{path}' is not whole: '{layer}' has one factor of two; get it again.")
    fits = min(up.ndim, down.ndim) >= 2 and up[0].numel() == len(down) > 0 and (alpha is None or alpha.numel() == 1)
    if not fits:
        raise _damaged(path, layer)
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    return {"u": scale * up.flatten(1).float(), "v": down.flatten(1).float()}          # (d, r), (r, D)
