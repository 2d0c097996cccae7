"""What a concept is on disk: new words, changed tensors, how they are prompted; save, load, apply, take off."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, Json
from torch import Tensor, nn

from ldm.checkpoint import existing_file, is_safetensors, load_file, named, read_metadata, refuse_non_finite
from ldm.customization.foreign import read_delta, schemes_of
from ldm.customization.ico import PromptScheme
from ldm.customization.selection import UNET_PREFIX
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.dbim import BranchLayout
from ldm.recognize import say_left_out
from ldm.records import BadRecord, Count, Line, Record, read_record
from ldm.saving import save_safetensors
from ldm.util import UserError

FORMAT_NAME = "dci-ico-concept-"     # what every version's format begins with
FORMAT = FORMAT_NAME + "2"
READ = (FORMAT_NAME + "1", FORMAT)   # the first had no differences
# What a weight's name in a file ends with where its difference to the base is stored, or the factors of that.
DIFFERENCE = ".difference"
FACTORS = (".u", ".v")


class Metadata(Record):
    """What a concept file says of itself; all but its format in JSON."""

    format: Line
    concepts: Json[Annotated[tuple[PromptScheme, ...], Field(min_length=1)]]
    base: Json[dict[Line, Line]]
    step: Json[Count]
    info: Json[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Concept:
    """One or several learned concepts, as a file holds them.

    Attributes:
        words: vectors (D,) of the concept words "V".
        contexts: vectors (D,) of the image-specific contexts; kept for inspection, not needed for sampling.
        weights: changed tensors of the U-Net by their names inside it, in full.
        differences: further ones as their difference to the base, of which half precision keeps more.
        factors: further ones as factors (u, v) of that difference: weight = base + u @ v.
        schemes: how each concept is prompted; the first is the one `{}` stands for.
        base: the model it was trained on, as `ldm.base.base_identity` names it; an empty hash: unknown (foreign files).
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
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def scheme(self) -> PromptScheme:
        """The (first) concept's prompt scheme."""
        return self.schemes[0]

    @property
    def changed(self) -> list[str]:
        """Names of the changed weights, however they are held."""
        return [*self.weights, *self.differences, *self.factors]

    def misfits(self, unet: Mapping[str, Tensor]) -> list[str]:
        """Names the changed weights that a U-Net of these weights does not have in their shape."""
        wrong = []
        for name, value in (*self.weights.items(), *self.differences.items()):
            if name not in unet or unet[name].shape != value.shape:
                wrong.append(name)
        for name, (u, v) in self.factors.items():       # of a convolution (out, in * kernel)
            if name not in unet or unet[name].ndim < 2 or unet[name].flatten(1).shape != (len(u), v.shape[1]):
                wrong.append(name)
        return wrong

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> Path:
        """Writes one safetensors file atomically; words stay float32, weights become `dtype` where that holds them.

        Raises:
            UserError: a value is not finite, or the file cannot be written.
        """
        weights = dict(self.weights)
        for name, difference in self.differences.items():
            weights[name + DIFFERENCE] = difference
        for name, (u, v) in self.factors.items():
            weights[name + FACTORS[0]], weights[name + FACTORS[1]] = u, v
        # A file that cannot be used is worse than none.
        refuse_non_finite({**self.words, **self.contexts, **weights}, f"the concept of step {self.step}")
        tensors = {}
        for name, value in self.words.items():
            tensors[f"words.{name}"] = value.float()     # few and small; their rounding would move the concept
        for name, value in self.contexts.items():
            tensors[f"contexts.{name}"] = value.float()
        for name, value in weights.items():
            tensors[f"{UNET_PREFIX}{name}"] = _stored(name, value, dtype)
        schemes = [asdict(scheme) for scheme in self.schemes]
        return save_safetensors(path, tensors, {"format": FORMAT, "concepts": schemes, "base": dict(self.base),
                                                "step": self.step, "info": dict(self.info)})


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in the format of the file, or in float32, with a warning, where the format cannot hold it."""
    stored = value.to(dtype)     # of what float32 holds, float16 has values up to 65,504
    if bool(stored.isfinite().all()):
        return stored
    warnings.warn(f"'{name}' exceeds what {str(dtype).removeprefix('torch.')} can hold; it is stored as float32.",
                  stacklevel=3)
    return value.float()


def load_concept(path: str | os.PathLike[str], words: tuple[str, ...] = (),
                 class_noun: str | Sequence[str] = "") -> Concept:
    """Reads a concept file: ours, the paper release's `embeddings_gs-*.ckpt`, or Custom Diffusion's `delta*.ckpt`.

    What a foreign file holds is used, or named in a printed line, or the file is refused.

    Args:
        words, class_noun: what a foreign file does not say; ours are self-describing. Several nouns make as many
            concepts, of one word each.

    Raises:
        UserError: the file is none of these, damaged, or says too little.
    """
    path = existing_file(path, "concept file")     # says what is wrong with a path before it is opened
    if is_safetensors(path) and read_metadata(path, "concept file").get("format", "").startswith(FORMAT_NAME):
        try:
            return _read_own(path)
        except BadRecord as error:
            raise UserError(f"concept file '{path}' is damaged ({error}); get it again.") from error
    nouns = [class_noun] if isinstance(class_noun, str) else class_noun
    return _read_foreign(path, words, tuple(noun for noun in nouns if noun))


def load_concepts(paths: Sequence[str | os.PathLike[str]], words: tuple[str, ...] = (),
                  class_noun: str | Sequence[str] = "") -> list[Concept]:
    """Reads concept files that shall be used together.

    Args:
        words: of a single foreign file.
        class_noun: of foreign files, one for each that does not say it, in their order; of a single file as
            `load_concept` takes it.

    Raises:
        UserError: as `load_concept`; or a noun is not needed.
    """
    nouns = [class_noun] if isinstance(class_noun, str) else list(class_noun)
    if len(paths) == 1:
        return [load_concept(paths[0], words, nouns)]
    if words:
        raise UserError("--modifier_token names the words of one file; import each file on its own first "
                        "(scripts/convert.py), or leave it out.")
    found, left = [], [noun for noun in nouns if noun]
    for path in paths:
        try:
            found.append(load_concept(path))
        except UserError:
            if not left:
                raise
            found.append(load_concept(path, class_noun=left.pop(0)))
    if left:
        raise UserError(f"class noun '{left[0]}' is not needed: the concept files say theirs; leave it out.")
    return found


def _read_own(path: Path) -> Concept:
    """Reads a concept file of ours.

    Raises:
        BadRecord: its metadata or tensors are not as they are written here.
        UserError: another version wrote it, or it has values that are not finite.
    """
    entries = read_metadata(path, "concept file")
    tensors = load_file(path, "concept file")
    unknown = [key for key in tensors if not key.startswith(("words.", "contexts.", UNET_PREFIX))]
    if entries["format"] not in READ or unknown:
        what = f"{entries['format']}, with {named(unknown)}" if unknown else entries["format"]
        raise UserError(f"concept file '{path}' was written by another version ({what}); use the one that made it.")
    metadata = read_record(Metadata, entries)     # after the format: another version's would not fit
    refuse_non_finite(tensors, f"concept file '{path}'")
    _check_tensors(tensors)

    parts: dict[str, dict[str, Tensor]] = {"words.": {}, "contexts.": {}, UNET_PREFIX: {}}
    for key, value in tensors.items():
        for prefix, part in parts.items():
            if key.startswith(prefix):
                part[key.removeprefix(prefix)] = value
    schemes = tuple(replace(scheme, index=index) for index, scheme in enumerate(metadata.concepts))
    weights, differences, factors = _split(parts[UNET_PREFIX])
    return Concept(_in_order(parts["words."], schemes), parts["contexts."], weights, schemes, metadata.base,
                   metadata.step, metadata.info, differences, factors)


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuses what no training writes: values that are no weights, words that are no vectors."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise BadRecord(f"'{name}' is of {value.dtype}, not of floating-point numbers")
        if not name.startswith(UNET_PREFIX) and value.ndim != 1:
            raise BadRecord(f"'{name}' is no vector")


def _split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor],
                                                   dict[str, tuple[Tensor, Tensor]]]:
    """Parts weights that are stored in full from differences and from factors of differences."""
    full, differences, names = {}, {}, set()
    for name, value in weights.items():
        if name.endswith(FACTORS):
            names.add(name[:-len(FACTORS[0])])
        elif name.endswith(DIFFERENCE):
            differences[name.removesuffix(DIFFERENCE)] = value
        else:
            full[name] = value
    factors = {}
    for name in sorted(names):
        u, v = weights.get(name + FACTORS[0]), weights.get(name + FACTORS[1])
        # (rows, r) and (r, columns).
        if u is None or v is None or u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
            raise BadRecord(f"'{name}' has factors that do not multiply")
        factors[name] = u, v
    twice = (full.keys() & differences.keys()) | (full.keys() & factors.keys()) | (differences.keys() & factors.keys())
    if twice:
        raise BadRecord(f"it holds {named(sorted(twice))} in two ways")
    return full, differences, factors


def words_of(schemes: Sequence[PromptScheme]) -> list[str]:
    """Returns the concept words of all schemes, in their order."""
    names: list[str] = []
    for scheme in schemes:
        names += scheme.words
    return names


def _in_order(words: Mapping[str, Tensor], schemes: Sequence[PromptScheme]) -> dict[str, Tensor]:
    """Returns the words' vectors in the order in which concepts name them."""
    names = words_of(schemes)
    if sorted(names) != sorted(words):     # tensors in a file have no order; the concepts' does
        raise BadRecord(f"its concepts name the words {named(names)}, and it holds {named(words) or 'none'}")
    return {name: words[name] for name in names}


def _read_foreign(path: Path, words: tuple[str, ...], nouns: tuple[str, ...]) -> Concept:
    delta = read_delta(path, load_file(path, "concept file"))
    schemes = schemes_of(path, delta, words, nouns)
    say_left_out(path, delta.spare)
    if len(schemes) > 1:
        print(f"'{path}': read as {len(schemes)} concepts: {named(scheme.concept for scheme in schemes)}", flush=True)
    names = words_of(schemes)
    return Concept(dict(zip(names, delta.rows, strict=True)), {}, delta.weights, schemes,
                   {"name": "unknown", "hash": ""}, differences=delta.differences, factors=delta.factors)


class AppliedConcept:
    """A concept put into a model; `remove` gives the model back as it was, to the bit.

    Args:
        model: the base, of the identity `base`.
        any_base: takes a concept that was made for another base, with a warning.

    Raises:
        UserError: the concept was made for another base, or does not fit this model.
    """

    def __init__(self, model: LatentDiffusion, concept: Concept, base: Mapping[str, str], any_base: bool = False):
        check_base(concept, base, any_base)     # a concept for another base would draw noise
        check_fit(model, concept)
        self.model, self.concept = model, concept
        unet = dict(model.model.diffusion_model.named_parameters())
        if concept.words:                                                       # may refuse; so before any change
            # Words are the concept's, not to be trained.
            model.cond_stage_model.add_words(concept.words).requires_grad_(False)
        # On the model's device; about 38 MB for SD v1.
        self._originals = {name: unet[name].detach().clone() for name in concept.changed}
        self._write_concept()

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        unet = dict(self.model.model.diffusion_model.named_parameters())
        for name, value in values.items():
            unet[name].copy_(value)

    def _write_concept(self) -> None:
        self._write(self.concept.weights)
        # In float32: half precision would round what was learned away.
        for name, difference in self.concept.differences.items():
            base = self._originals[name]
            self._write({name: base.float() + difference.to(base.device).float()})
        for name, (u, v) in self.concept.factors.items():
            base = self._originals[name]
            change = u.to(base.device).float() @ v.to(base.device).float()
            self._write({name: base.float() + change.view_as(base)})

    @contextmanager
    def base_in_auxiliary(self, layout: BranchLayout) -> Iterator[None]:
        """Lets the auxiliary branch read keys and values through the base's weights (ablation "base_weights")."""
        def hook(base: Tensor, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            first = len(output) // layout.blocks * layout.latents.index(1)       # the auxiliary's rows come last
            return torch.cat([output[:first], F.linear(inputs[0][first:], base)])

        network, handles = self.model.model.diffusion_model, []
        for name, base in self._originals.items():
            if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
                layer = network.get_submodule(name.removesuffix(".weight"))
                handles.append(layer.register_forward_hook(partial(hook, base)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def remove(self) -> None:
        """Restores the base's tensors and vocabulary."""
        self._write(self._originals)
        self.model.cond_stage_model.clear_words()


def check_fit(model: LatentDiffusion, concept: Concept) -> None:
    """Compares a concept's tensors with a model's.

    Raises:
        UserError: it lacks some of them, or has them in other shapes.
    """
    wrong = concept.misfits(dict(model.model.diffusion_model.named_parameters()))
    width = model.cond_stage_model.embedding.embedding_dim
    if wrong or any(len(vector) != width for vector in concept.words.values()):
        raise UserError(f"the concept was made for the base '{concept.base['name']}' and does not fit this model: "
                        f"{len(wrong)} tensors differ ({', '.join(wrong[:2]) or 'word vectors of another width'}); "
                        "draw with the model it was made for.")


def check_base(concept: Concept, base: Mapping[str, str], any_base: bool) -> None:
    """Compares U-Net and text encoder, or what earlier files have instead, the values of the whole model.

    Raises:
        UserError: the concept is of another base than `base`; with `any_base` a warning is all.
    """
    # Files from before the network's hash have the other alone.
    kinds = [kind for kind in ("network", "hash") if concept.base.get(kind)]
    if not kinds or any(concept.base[kind] == base.get(kind) for kind in kinds):
        return
    mismatch = (f"the concept was made for the base '{concept.base['name']}' ({concept.base['hash']}), not for "
                f"'{base['name']}' ({base['hash']})")
    if not any_base:
        raise UserError(f"{mismatch}; give that checkpoint with --ckpt, or use it on this one with --any_base.")
    warnings.warn(f"{mismatch}; it is used all the same.", stacklevel=3)
