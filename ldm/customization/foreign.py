"""Other tools' deltas taken apart: new words' rows, weights, factors of differences, and what has no use here."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import named, refuse_non_finite, unwrapped
from ldm.customization.ico import PromptScheme
from ldm.customization.imports import DIFFERENCE, EMBED, translated
from ldm.customization.selection import UNET_PREFIX
from ldm.recognize import AS_CONCEPT, kind_of
from ldm.util import UserError

TABLE = "transformer.text_model.embeddings.token_embedding.weight"  # the release's deltas: the whole token table
CLIP_WORDS = 49408                                                  # rows of the table that are CLIP's own
UNET_NAME = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|out)\.")
TEXT_NAME = re.compile(r"(cond_stage_model|transformer|text_encoder|text_model)\.")


@dataclass
class Delta:
    """What a foreign file holds.

    Attributes:
        rows: vectors (m, D) of its new words; m may be 0.
        weights: changed tensors of the U-Net by their names inside it.
        differences: of further ones to the base.
        factors: (u, v) of further ones, whose difference to the base is u @ v.
        text: names of changed tensors of the text encoder.
        spare: names of all else.
        single: its tool gives every concept one word.
    """

    rows: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    single: bool = True


def read_delta(path: Path, content: Mapping[str, Any]) -> Delta:
    """Takes the content of the paper release's `embeddings_gs-*.ckpt` or Custom Diffusion's `delta*.ckpt` apart.

    Raises:
        UserError: it is neither, changes what a concept here cannot, or has values that are not finite.
    """
    state, kind = unwrapped(content), kind_of(content)
    theirs = translated(path, content)
    title = None
    if theirs is not None:
        state = theirs
    elif kind and kind[1] != AS_CONCEPT:
        title = kind[0]
    # Custom Diffusion's deltas have no autoencoder.
    if title is None and any(name.startswith("first_stage_model.") for name in state):
        title = "a whole checkpoint"
    if title:
        raise UserError(f"concept file '{path}' is no concept: it is {title}; give here what training wrote under "
                        "checkpoints/ or a Custom Diffusion delta, and a checkpoint with --ckpt.")
    delta = _take_apart(path, state)
    if theirs is not None and delta.spare:
        raise UserError(f"concept file '{path}' is damaged ({named(delta.spare)}); get it again.")
    if not (len(delta.rows) or delta.weights or delta.differences or delta.factors):
        raise UserError(f"concept file '{path}' is no concept: it has neither our format nor the release's token "
                        "table nor Custom Diffusion's 'embed' or weights.")
    if delta.text:
        raise UserError(f"concept file '{path}' changes the text encoder too ({named(delta.text)}), which no concept "
                        "here can; it would not be what it was, and is not used.")
    # The vectors of an embedding belong together; a `delta.bin` has a word for each of its concepts.
    delta.single = delta.single and (theirs is None or "modifier_token" in content)
    tensors = {"the new words": delta.rows, **delta.weights, **delta.differences}
    for name, (u, v) in delta.factors.items():
        tensors[f"{name}.u"], tensors[f"{name}.v"] = u, v
    refuse_non_finite(tensors, f"concept file '{path}'")
    count = len(delta.weights) + len(delta.differences) + len(delta.factors)
    if theirs is not None and count:
        print(f"'{path}': all {count} changed weights of the U-Net are read", flush=True)
    return delta


def _take_apart(path: Path, state: Mapping[str, Any]) -> Delta:
    delta = Delta(torch.empty(0, 0))
    for key, value in state.items():
        name = key.removeprefix(UNET_PREFIX)
        if key == EMBED and isinstance(value, Tensor):
            delta.rows = _rows(path, key, value)
        elif key == TABLE and isinstance(value, Tensor):
            # The release's table: CLIP's rows, then the new ones.
            delta.rows, delta.single = _rows(path, key, value)[CLIP_WORDS:], False
        elif TEXT_NAME.match(key):
            delta.text.append(key)
        elif UNET_NAME.match(name) and isinstance(value, Tensor):
            delta.weights[name] = value.detach()
        elif UNET_NAME.match(name) and isinstance(value, dict) and value.keys() == {DIFFERENCE}:
            delta.differences[name] = value[DIFFERENCE]
        elif UNET_NAME.match(name) and _is_pair(value):
            delta.factors[name] = value["u"].detach(), value["v"].detach()     # Custom Diffusion's compressed form
        else:
            delta.spare.append(key)
    return delta


def _rows(path: Path, name: str, table: Tensor) -> Tensor:
    """Returns a table of words' vectors (m, D) in float32."""
    if table.ndim != 2 or not table.is_floating_point():
        raise UserError(f"concept file '{path}' is damaged: '{name}' is no table of words' vectors; get it again.")
    return table.detach().float()


def _is_pair(value: Any) -> bool:
    """Says whether a value is Custom Diffusion's compressed form: u (rows, rank) and v (rank, columns)."""
    if not isinstance(value, dict) or value.keys() != {"u", "v"}:
        return False
    u, v = value["u"], value["v"]
    return isinstance(u, Tensor) and isinstance(v, Tensor) and u.ndim == v.ndim == 2 and u.shape[1] == v.shape[0]


def schemes_of(path: Path, delta: Delta, words: tuple[str, ...], nouns: tuple[str, ...]) -> tuple[PromptScheme, ...]:
    """Says how a foreign file's concepts are prompted.

    Args:
        words: names of all its new words, in order; empty for <new1>, <new2>, ...
        nouns: one class noun for all words together, or one for each.

    Raises:
        UserError: words or nouns do not fit the file, or it may hold one concept or several.
    """
    count = len(delta.rows)
    # As Custom Diffusion names them by default.
    names = words or tuple(f"<new{index + 1}>" for index in range(count))
    if len(names) != count:
        raise UserError(f"concept file '{path}' holds {count} new words but {len(names)} were named "
                        f"({' '.join(names)}); list all with --modifier_token, joined by +.")
    if not nouns:
        raise UserError(f"concept file '{path}' does not say its class noun; give it with --class_noun.")
    if len(nouns) > 1 and len(nouns) != count:
        raise UserError(f"concept file '{path}' holds {count} new words but {len(nouns)} class nouns were named "
                        f"({', '.join(nouns)}); name one for each, and quote a noun of several words.")
    if len(nouns) > 1:
        schemes = []
        for index, (name, noun) in enumerate(zip(names, nouns, strict=True)):
            schemes.append(PromptScheme((name,), noun, index=index))
        return tuple(schemes)
    if count > 1 and delta.single and not words:
        raise UserError(f"concept file '{path}' holds {count} new words, which may be one concept's or {count} "
                        f"concepts'; name a class noun for each (--class_noun cat dog), or say that they belong "
                        f"together with --modifier_token '{'+'.join(names)}'.")
    return (PromptScheme(names, nouns[0]),)
