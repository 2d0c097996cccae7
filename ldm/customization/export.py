"""Concept files as other tools read them: LoRA, weights' differences, embeddings, diffusers' attention processors.

All of them hold the fine-tuned model; DCI itself is this project's sampler. Names and scales are facts of those tools;
what each refuses or misreads in silence decided the forms: one alpha for all layers, as diffusers takes the most common
one for every layer; one tensor in a file of words, as no other tool takes several.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.convert.diffusers import unet_key
from ldm.customization.delta import Concept
from ldm.customization.low_rank import Spectrum

LORA = "lora_unet_"
TOKENS = "emb_params"       # the name A1111 and ComfyUI know for the vectors of an embedding
MOST = 65504                # of float16


@dataclass(frozen=True)
class Exported:
    """A file to write: its tensors and what it says of itself."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def slug_of(text: str) -> str:
    """Returns a name that file systems and prompts of all tools take: small letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "concept"


def layer_name(name: str, res_blocks: int) -> str:
    """Names a weight as LoRA files do: diffusers' name of the layer, its dots as underscores."""
    return LORA + unet_key(name, res_blocks).removesuffix(".weight").replace(".", "_")


def as_lora(concept: Concept, found: Mapping[str, Spectrum], ranks: Mapping[str, int], res_blocks: int) -> Exported:
    """Returns a LoRA in the form of kohya's scripts: W = W0 + (alpha / r) up down.

    alpha is the largest rank, the same in every layer; `up` makes up for layers of a smaller one.

    Args:
        found, ranks: of `low_rank`; a weight of rank 0 is left out.
        res_blocks: of the U-Net's levels, 2 for SD v1.
    """
    alpha, tensors = max(ranks.values()), {}
    for name, spectrum in found.items():
        rank = ranks[name]
        if not rank:
            continue
        root, layer = spectrum.s[:rank].sqrt(), layer_name(name, res_blocks)
        tensors[f"{layer}.lora_up.weight"] = (spectrum.u[:, :rank] * root * rank / alpha).half()       # (d, r)
        tensors[f"{layer}.lora_down.weight"] = (root[:, None] * spectrum.v[:rank]).half()              # (r, D)
        tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    metadata = {**_told(concept), "ss_network_module": "networks.lora", "ss_network_dim": str(alpha),
                "ss_network_alpha": str(float(alpha)), "ss_base_model_version": "sd_v1", "ss_v2": "False"}
    return Exported(tensors, {**metadata, "sshs_model_hash": _hash(tensors)})


def as_diff(concept: Concept, differences: Mapping[str, Tensor], res_blocks: int) -> Exported:
    """Returns the differences as A1111 (1.5 and later) and ComfyUI add them: nothing is lost but half precision's."""
    tensors = {}
    for name, value in differences.items():
        layer = layer_name(name, res_blocks)
        kind = "diff_b" if layer.endswith("_bias") else "diff"
        tensors[f"{layer.removesuffix('_bias')}.{kind}"] = value.half()
    return Exported(tensors, {**_told(concept), "ss_base_model_version": "sd_v1", "ss_v2": "False"})


def as_processors(differences: Mapping[str, Tensor], base: Mapping[str, Tensor], res_blocks: int) -> dict[str, Tensor]:
    """Returns diffusers' Custom Diffusion weights: K/V in full, by the names of attention processors."""
    tensors = {}
    for name, value in differences.items():
        layer, part = re.fullmatch(r"(.*)\.to_([kv])\.weight", unet_key(name, res_blocks)).groups()
        tensors[f"{layer}.processor.to_{part}_custom_diffusion.weight"] = (base[name].double() + value).float()
    return tensors


def embeddings(concept: Concept, slug: str) -> dict[str, Exported]:
    """Returns the files of words, by name: all vectors of each concept in one, for A1111 and ComfyUI, and one a word.

    In an embedding of several vectors the class noun stays outside: "slug-v cat".
    """
    files = {}
    for index, scheme in enumerate(concept.schemes):
        vectors = torch.stack([concept.words[word].float() for word in scheme.words])                  # (n, D)
        files[embedding_name(concept, slug, index)] = Exported({TOKENS: vectors}, _told(concept))
        for word in scheme.words:
            files[slug_of(word)] = Exported({word: concept.words[word].float()}, _told(concept))
    return files


def embedding_name(concept: Concept, slug: str, index: int = 0) -> str:
    """Names the file of a concept's vectors, which is what prompts of A1111 and ComfyUI say."""
    return f"{slug}-v" if len(concept.schemes) == 1 else f"{slug}-v{index + 1}"


def beyond_half(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names tensors with values that half precision made infinite."""
    return [name for name, value in tensors.items() if not bool(value.isfinite().all())]


def _told(concept: Concept) -> dict[str, str]:
    """Says in a file's head what it is."""
    return {"ss_output_name": slug_of(concept.scheme.class_noun), "dci_concepts": "; ".join(
        scheme.concept for scheme in concept.schemes), "dci_base": concept.base.get("hash", "")}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Returns what kohya's scripts name a model by: SHA-256 of a file's bytes behind its head."""
    content = save({name: value.contiguous() for name, value in tensors.items()})
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little"):]).hexdigest()
