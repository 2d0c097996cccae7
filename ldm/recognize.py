"""What a file of weights is, by its content: a checkpoint's names put into ours, other kinds told in a sentence."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint import (
    AVERAGE,
    OPTIONAL_KEYS,
    averages_alone,
    describe_mismatch,
    load_file,
    load_weights,
    named,
    unwrapped,
)
from ldm.convert.diffusers import our_vae_state
from ldm.util import UserError

# Entries below these are weights that a network computes with: one too many there means a larger network.
NETWORKS = ("model.diffusion_model.", "first_stage_model.encoder.", "first_stage_model.decoder.",
            "cond_stage_model.transformer.text_model.")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
LATER_TEXT_NAMES = r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)"

V1 = "a Stable Diffusion v1 checkpoint"
V1_WANTED = f"{V1} is wanted, a single file such as sd-v1-4.ckpt"
AS_CONCEPT = "give it with --delta_ckpt, and the checkpoint it was made for with --ckpt"

# How some entry's name begins, what the file then is, and what to do where it was given as a checkpoint.
# The first that matches decides; those of the second table are parts of a whole checkpoint, too.
KINDS = (
    (r"conditioner\.embedders\.", "a Stable Diffusion XL checkpoint", V1_WANTED),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint", V1_WANTED),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a FLUX checkpoint", V1_WANTED),
    (r"cond_stage_model\.model\.", "a Stable Diffusion 2 checkpoint (text width 1024)", V1_WANTED),
    (r"(words\.<|embed$|transformer\.text_model\.embeddings\.token_embedding\.)", "a concept file", AS_CONCEPT),
    (r"modifier_token$|.*\.to_[kv]_custom_diffusion\.", "a Custom Diffusion delta in diffusers' layout", V1_WANTED),
    (r"lora_|bundle_emb\.|.*[._]lora[._]|.*\.lora_|.*\.(hada|lokr|oft)_", "a LoRA file", V1_WANTED),
    (r"emb_params$|string_to_param$|clip_[lg]$|<[^<>\s]+>$", "a textual-inversion embedding", V1_WANTED),
    (r"control_model\.|controlnet_", "a ControlNet", V1_WANTED),
)
PARTS = (
    (r"down_blocks\.\d", "the U-Net alone of a diffusers folder", V1_WANTED),
    (r"(first_stage_model\.)?(encoder|decoder)\.(down|up|mid)", "an autoencoder (VAE) alone",
     f"give it with --vae; for --ckpt {V1_WANTED}"),
    (r"text_model\.", "the text encoder alone of a diffusers folder", V1_WANTED),
)


def kind_of(content: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns what a file is and what to do where it was given as a checkpoint; None where nothing tells."""
    state = unwrapped(content)
    names = [*content, *state]
    kinds = KINDS
    if not (_some_start_with(UNET, state) and _some_start_with(VAE, state)):
        kinds = KINDS + PARTS
    for pattern, title, advice in kinds:
        begins = re.compile(pattern)
        if any(map(begins.match, names)):
            return title, advice
    return _kind_of_unet(state)


def _some_start_with(prefix: str, names: Iterable[str]) -> bool:
    """Says whether a name begins with a prefix."""
    return any(name.startswith(prefix) for name in names)


def _kind_of_unet(state: Mapping[str, Any]) -> tuple[str, str] | None:
    """Tells Stable Diffusion's generations apart by the shapes of their U-Net."""
    width = _text_width(state)
    entry = state.get(f"{UNET}input_blocks.0.0.weight")
    if width is None or entry is None or len(entry) != 320:      # channels of all SD U-Nets' first level
        return None
    if width == 1024:
        return "a Stable Diffusion 2 checkpoint (text width 1024)", V1_WANTED
    if entry.shape[1] == 9:
        return "an inpainting model (9 input channels)", V1_WANTED
    if entry.shape[1] != 4:
        return f"a model with {entry.shape[1]} input channels", V1_WANTED
    return V1, "the model configured is another one; add configs/model/sd-v1.yaml with -b"


def _text_width(state: Mapping[str, Any]) -> int | None:
    """Returns how wide the text features are that a U-Net reads."""
    for name, value in state.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight"):
            return value.shape[1]
    return None


def fit_names(content: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Puts the tensors of a checkpoint under the names of `model`; also returns what it has no place for.

    transformers' later names of the text encoder gain their `text_model.`; averaged weights (`model_ema.*`) are the
    U-Net's where the file has no others. What would enlarge a network stays, for `load_weights` to refuse.
    """
    expected = model.state_dict().keys()
    spare: list[str] = []
    state: dict[str, Tensor] = {}
    for name, value in unwrapped(content).items():
        if isinstance(value, Tensor):
            state[re.sub(LATER_TEXT_NAMES, r"\g<0>text_model.", name)] = value
        else:
            spare.append(name)
    if averages_alone(state):     # some files of SD have their U-Net as averages only
        averages = {}           # CompVis's averages lose the dots of the names they stand for
        for name in expected:
            if name.startswith(UNET):
                averages[AVERAGE + name.removeprefix("model.").replace(".", "")] = name
        state = {averages.get(name, name): value for name, value in state.items()}
    fitting, others = {}, []
    for name, value in state.items():
        if name in expected or name in OPTIONAL_KEYS or name.startswith(NETWORKS):
            fitting[name] = value
        else:
            others.append(name)
    return fitting, [*spare, *sorted(others)]


def load_checkpoint(model: nn.Module, content: Mapping[str, Any], path: str | os.PathLike[str],
                    ignore: Sequence[str] = (), vae: Mapping[str, Tensor] | None = None, assign: bool = False) -> None:
    """Loads a checkpoint's content, complete, and prints what it has that the model has no place for.

    Args:
        ignore: beginnings of names that keep the model's values.
        vae: an autoencoder's weights in place of the file's, as `read_vae` returns them.
        assign: as in `load_weights`.

    Raises:
        UserError: weights are missing or misshapen; the sentence says what the file is where that is known.
    """
    state, spare = fit_names(content, model)
    left_alone = tuple(ignore)
    state = {name: value for name, value in state.items() if not name.startswith(left_alone)}
    state |= vae or {}
    expected = model.state_dict()
    accepted = [name for name in expected if name.startswith(left_alone)]
    accepted += OPTIONAL_KEYS     # what a released file may lack or have beside the weights
    if describe_mismatch(model, state, accepted):
        kind = kind_of(content)
        # A damaged file of the right kind is not called another kind: `load_weights` names what it lacks.
        if kind and not (kind[0] == V1 and _text_width(state) == _text_width(expected)):
            raise UserError(f"'{path}' is {kind[0]}; {kind[1]}.")
    load_weights(model, state, path, accepted, assign)
    say_left_out(path, spare)


def read_vae(path: str | os.PathLike[str], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Reads an autoencoder's weights under `model`'s names, and names what else the file holds.

    It may be a file of its own, CompVis's or diffusers', or a whole checkpoint, whose autoencoder is taken.

    Raises:
        UserError: the file is none, or its weights are missing or misshapen.
    """
    content = load_file(path, "autoencoder")
    state = {name: value for name, value in unwrapped(content).items() if isinstance(value, Tensor)}
    if _some_start_with(VAE, state):
        state = {name.removeprefix(VAE): value for name, value in state.items() if name.startswith(VAE)}
    expected = model.first_stage_model.state_dict()
    state = our_vae_state(state, expected)     # where the names are diffusers'
    known = {name: state[name] for name in expected if name in state}
    problem = describe_mismatch(model.first_stage_model, known)
    if problem:
        kind = kind_of(content)     # to say what was given instead
        what = f"is {kind[0]}; it" if kind else "is none that fits; it"
        raise UserError(f"autoencoder '{path}' {what} has {problem}.")
    spare = [name for name in state if name not in expected]
    return {VAE + name: value for name, value in known.items()}, spare


def _grouped(names: Iterable[str]) -> list[str]:
    """Names entries, those of other modules by their module alone: "model_ema.*"."""
    groups: dict[str, None] = {}         # an ordered set
    for name in names:
        module, dot, _ = name.partition(".")
        whole = not dot or name.startswith(("cond_stage_model.", VAE))
        groups[name if whole else f"{module}.*"] = None
    return list(groups)


def say_left_out(path: str | os.PathLike[str], names: list[str]) -> None:
    """Prints what of a file is not used."""
    if names:
        print(f"'{path}': left out, having no place in the model: {named(_grouped(names), 6)}", flush=True)
