"""What a concept is on disk: new words, changed tensors, how they are prompted; save, load, apply, take off."""
from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import (
    existing_file,
    is_safetensors,
    load_file,
    read_metadata,
    refuse_non_finite,
    save_safetensors,
)
from ldm.customization.contexts import PromptScheme
from ldm.customization.selection import UNET_PREFIX
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError

FORMAT = "dci-ico-concept-1"
PEER_TABLE = "transformer.text_model.embeddings.token_embedding.weight"  # the release's deltas: the whole token table
PEER_EMBED = "embed"                                                     # Custom Diffusion's: the new rows alone


@dataclass(frozen=True, eq=False)
class Concept:
    """One or several learned concepts, as a file holds them.

    Attributes:
        words: vectors (D,) of the concept words "V".
        contexts: vectors (D,) of the image-specific contexts; kept for inspection, not needed for sampling.
        weights: changed tensors of the U-Net by their names inside it, in full (not as differences).
        schemes: how each concept is prompted; the first is the one `{}` stands for.
        base: name and hash of the model it was trained on; an empty hash means unknown (foreign files).
        step: training steps taken.
        info: configuration and versions, for the reader.
    """

    words: Mapping[str, Tensor]
    contexts: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    schemes: tuple[PromptScheme, ...]
    base: Mapping[str, str]
    step: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheme(self) -> PromptScheme:
        """The (first) concept's prompt scheme."""
        return self.schemes[0]

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> Path:
        """Writes one safetensors file atomically; words stay float32, weights become `dtype` where that holds them.

        Raises:
            UserError: a value is not finite, or the file cannot be written.
        """
        refuse_non_finite({**self.words, **self.contexts, **self.weights}, f"the concept of step {self.step}")
        tensors = {f"words.{name}": value.float() for name, value in self.words.items()}
        tensors |= {f"contexts.{name}": value.float() for name, value in self.contexts.items()}
        tensors |= {f"{UNET_PREFIX}{name}": _stored(name, value, dtype) for name, value in self.weights.items()}
        schemes = [{"words": list(scheme.words), "class_noun": scheme.class_noun, "prefix": scheme.prefix,
                    "suffix": scheme.suffix, "template": scheme.template} for scheme in self.schemes]
        return save_safetensors(path, tensors, {"format": FORMAT, "concepts": schemes, "base": dict(self.base),
                                                "step": self.step, "info": dict(self.info)})


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in the format of the file, or in float32, with a warning, where the format cannot hold it."""
    stored = value.to(dtype)
    if bool(stored.isfinite().all()):
        return stored
    warnings.warn(f"'{name}' exceeds what {str(dtype).removeprefix('torch.')} can hold; it is stored as float32.",
                  stacklevel=3)
    return value.float()


def base_identity(model: LatentDiffusion, name: str) -> dict[str, str]:
    """Names a base model: its name and a hash of every tensor's first values, the same in half precision and full."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for key in sorted(state):
        if ".token_embedding.extra." in key or key.startswith("model_ema."):
            continue
        values = state[key].detach().reshape(-1)[:2048].to("cpu", torch.float16)
        digest.update(f"{key}{tuple(state[key].shape)}".encode())
        digest.update(values.numpy().tobytes())
    return {"name": name, "hash": digest.hexdigest()[:16]}


def load_concept(path: str | os.PathLike[str], words: tuple[str, ...] = (), class_noun: str = "") -> Concept:
    """Reads a concept file: ours, the paper release's `embeddings_gs-*.ckpt`, or Custom Diffusion's `delta*.ckpt`.

    Args:
        words, class_noun: what a foreign file does not say; ours are self-describing.

    Raises:
        UserError: the file is none of these, damaged, or says too little.
    """
    path = existing_file(path, "concept file")
    if is_safetensors(path):
        return _read_own(path)
    state = load_file(path, "concept file")
    state = state.get("state_dict", state)
    return _read_foreign(path, {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)},
                         words, class_noun)


def _read_own(path: Path) -> Concept:
    metadata = read_metadata(path, "concept file")
    if metadata.get("format") != FORMAT:
        raise UserError(f"concept file '{path}' is a safetensors file but no concept ({FORMAT}); give the file that "
                        "training wrote under checkpoints/.")
    tensors = load_file(path, "concept file")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    schemes = tuple(PromptScheme(**{**entry, "words": tuple(entry["words"]), "index": index})
                    for index, entry in enumerate(json.loads(metadata["concepts"])))
    refuse_non_finite(tensors, f"concept file '{path}'")
    words = part("words.")
    ordered = {name: words[name] for scheme in schemes for name in scheme.words}
    return Concept(ordered, part("contexts."), part(UNET_PREFIX), schemes, json.loads(metadata["base"]),
                   int(metadata["step"]), json.loads(metadata["info"]))


def _read_foreign(path: Path, state: Mapping[str, Tensor], words: tuple[str, ...], class_noun: str) -> Concept:
    refuse_non_finite(state, f"concept file '{path}'")
    weights = {key.removeprefix(UNET_PREFIX): value for key, value in state.items()
               if re.search(r"attn2\.to_(?:[kqv]|out)", key)}
    if PEER_EMBED in state:
        rows = state[PEER_EMBED]
    elif PEER_TABLE in state:
        rows = state[PEER_TABLE][49408:]   # the release saves CLIP's 49,408 rows too; new words follow them
    else:
        raise UserError(f"concept file '{path}' is no concept: it has neither our format nor the release's token "
                        "table nor Custom Diffusion's 'embed'.")
    words = words or tuple(f"<new{index + 1}>" for index in range(len(rows)))
    if len(words) != len(rows):
        raise UserError(f"concept file '{path}' holds {len(rows)} new words but {len(words)} were named "
                        f"({' '.join(words)}); list all with --modifier_token, joined by +.")
    if not class_noun:
        raise UserError(f"concept file '{path}' does not say its class noun; give it with --class_noun.")
    return Concept(dict(zip(words, rows.float(), strict=True)), {}, weights, (PromptScheme(words, class_noun),),
                   {"name": "unknown", "hash": ""})


class AppliedConcept:
    """A concept put into a model; `remove` gives the model back as it was, to the bit."""

    def __init__(self, model: LatentDiffusion, concept: Concept, base: Mapping[str, str]):
        _check_base(concept, base)
        self.model, self.concept = model, concept
        unet = dict(model.model.diffusion_model.named_parameters())
        wrong = [name for name, value in concept.weights.items()
                 if name not in unet or unet[name].shape != value.shape]
        width = model.cond_stage_model.embedding.embedding_dim
        if wrong or any(len(vector) != width for vector in concept.words.values()):
            raise UserError(f"the concept was made for the base '{concept.base['name']}' and does not fit this model: "
                            f"{len(wrong)} tensors differ ({', '.join(wrong[:2]) or 'word vectors of another width'}); "
                            "draw with the model it was made for.")
        model.cond_stage_model.add_words(concept.words).requires_grad_(False)   # may refuse; so before any change
        self._originals = {name: unet[name].detach().clone() for name in concept.weights}
        self._write(concept.weights)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        unet = dict(self.model.model.diffusion_model.named_parameters())
        for name, value in values.items():
            unet[name].copy_(value)

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Gives the model the base's tensors back for a while; the concept's words stay."""
        self._write(self._originals)
        try:
            yield
        finally:
            self._write(self.concept.weights)

    def remove(self) -> None:
        """Restores the base's tensors and vocabulary."""
        self._write(self._originals)
        self.model.cond_stage_model.clear_words()


def _check_base(concept: Concept, base: Mapping[str, str]) -> None:
    if concept.base["hash"] and concept.base["hash"] != base["hash"]:
        raise UserError(f"the concept was made for the base '{concept.base['name']}' ({concept.base['hash']}), not for "
                        f"'{base['name']}' ({base['hash']}); give that checkpoint with --ckpt.")
