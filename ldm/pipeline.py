"""Generator: base model + concept → images; the one door for scripts, demos and evaluation."""
from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.base import build_model as build_model  # where callers of the first release find it
from ldm.base import image_side
from ldm.config import DCIConfig, SampleConfig
from ldm.customization import tokens
from ldm.customization.delta import AppliedConcept, Concept
from ldm.customization.tokens import TokenSets
from ldm.data.framing import to_images
from ldm.device import (
    FORMATS,
    PRECISIONS,
    compile_network,
    decode_latents,
    out_of_memory,
    set_format,
    supported_precision,
    weights_precision,
)
from ldm.device import choose_device as choose_device  # likewise
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dual_branch import DualBranch, in_joint_phase
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.attention import record_masks
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.util import UserError

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
ABLATIONS = ("none", "no_mask", "no_full_prompt", "last_layer", "base_weights")
MAX_TEXTS = 512      # encoded prompts that are kept, 0.24 MB each with SD v1
MAX_STRENGTH = 50.0  # beyond it the auxiliary branch is off, or all there is, at every scale
MAX_SEED = 2 ** 63 - 1
MAX_IMAGES = 100_000   # of one run, which are listed before the first is drawn

Masks = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One image to draw: `strength` is lambda, or None for the fine-tuned model without DCI."""

    prompt: str
    seed: int
    strength: float | None


@dataclass(frozen=True, eq=False)
class Sample:
    """A drawn image and everything needed to draw it again.

    Where it was watched, `masks` are each integration's layer name and masks (2, 1, H, h, w), in order of time.
    """

    image: Image.Image
    row: Row
    settings: dict[str, Any]
    masks: Masks = field(default_factory=list)


def check_seed(name: str, seed: int, most: int = MAX_SEED) -> None:
    """Refuses a seed, called `name`, that random generators do not take."""
    if not 0 <= seed <= most:
        raise UserError(f"{name} is {seed}; give a whole number from 0 to {most}.")


def check_settings(settings: SampleConfig) -> None:
    """Refuses values outside their range in one sentence."""
    dci = settings.dci
    choices = (("sampler", settings.sampler, SAMPLERS), ("dci.guidance", dci.guidance, ("separate", "shared")),
               ("dci.noise", dci.noise, ("independent", "common")),
               ("dci.ablation", dci.ablation, ABLATIONS),
               ("precision", settings.precision, PRECISIONS))
    for name, value, allowed in choices:
        if value not in allowed:
            raise UserError(f"{name} '{value}' is unknown; use one of {', '.join(allowed)}.")
    for strength in dci.agg_lambda:
        if not abs(strength) <= MAX_STRENGTH:
            raise UserError(f"agg_lambda {strength} is out of range; give numbers between -{MAX_STRENGTH:g} and "
                            f"{MAX_STRENGTH:g} (useful: -2 to 2).")
    if not 0.0 <= dci.agg_time <= 1.0:
        raise UserError(f"agg_time {dci.agg_time} is out of range; give a share of the steps between 0 and 1.")
    if not 0.0 <= settings.eta <= 1.0:
        raise UserError(f"eta {settings.eta} is out of range; give a number between 0 and 1.")
    if settings.eta > 0 and settings.sampler != "ddim":
        raise UserError(f"the sampler '{settings.sampler}' is deterministic; set eta to 0 (--ddim_eta 0) or use ddim.")
    if not math.isfinite(settings.scale):
        raise UserError(f"scale {settings.scale} is not a finite number.")
    if dci.use and not (dci.agg_lambda or settings.plain):
        raise UserError("there is nothing to draw: dci.agg_lambda is empty and plain is false; give --agg_lambda.")
    for name in ("n_samples", "n_iter", "batch_size", "steps"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; give at least 1.")
    if settings.n_samples * settings.n_iter > MAX_IMAGES:
        raise UserError(f"n_samples {settings.n_samples} times n_iter {settings.n_iter} are too many images; a run "
                        f"draws up to {MAX_IMAGES:,}.")
    check_seed("seed", settings.seed, MAX_SEED - settings.n_samples * settings.n_iter)    # every image adds 1 to it


def cost_matched_steps(steps: int, agg_time: float, separate: bool, guided: bool = True) -> int:
    """Returns how many DCI steps cost as many U-Net rows as `steps` steps of plain sampling (paper section 4.2).

    A plain guided step has 2 rows; a joint step 4 (separate guidance) or 3 (shared); unguided 1 and 2.
    """
    plain, joint = (2, 4 if separate else 3) if guided else (1, 2)
    return max(1, round(steps / (1.0 + agg_time * (joint - plain) / plain)))


def dci_steps(settings: SampleConfig) -> int:
    """Returns how many steps a DCI image takes."""
    if not settings.dci.match_cost:
        return settings.steps
    separate = settings.dci.guidance == "separate"
    return cost_matched_steps(settings.steps, settings.dci.agg_time, separate, settings.scale != 1.0)


def layer_size(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Returns the sides of a layer of so many pixels over latents of these sides, which it divides alike."""
    factor = math.isqrt(height * width // pixels)
    return height // factor, width // factor


@contextlib.contextmanager
def _memory_for(images: int) -> Iterator[None]:
    """Turns memory that runs out while so many images are drawn at once into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fewer = "batch_size=1, then " if images > 1 else ""
        raise UserError(f"the memory does not hold {images} image(s) at once; try {fewer}--precision bf16, then a "
                        "smaller --H and --W.") from error


class Generator:
    """Draws images with a base model and, if one is loaded, a concept. One thread draws at a time.

    On a model without weights (`empty_model`) it plans and refuses, but cannot draw.

    Args:
        model: the base.
        identity: its name and hash, as `build_model` returns them.
        device: where to draw.
        precision: the format U-Net and autoencoder are put into, bf16 or fp16; others leave them as they are.
        compiled: compiles the U-Net.
        any_base: takes concepts that were made for another base, with a warning.
    """

    def __init__(self, model: LatentDiffusion, identity: dict[str, str], device: torch.device | str = "cpu",
                 precision: str = "full", compiled: bool = False, any_base: bool = False):
        self.model, self.identity, self.any_base = model.to(device).eval(), identity, any_base
        precision = supported_precision(precision, self.model.device)
        set_format(self.model, FORMATS[precision] if precision in ("bf16", "fp16") else None)
        self.precision = weights_precision(self.model)
        if compiled:
            compile_network(self.model)
        self._texts: dict[tuple[str, torch.dtype], Tensor] = {}     # prompts encoded with the present concept
        self.applied: AppliedConcept | None = None
        self._lock = threading.Lock()      # a concept changes the module, so requests take turns

    @property
    def concept(self) -> Concept | None:
        """The concept that is loaded."""
        return self.applied.concept if self.applied else None

    def load(self, concept: Concept | None) -> None:
        """Puts a concept in, in place of the one before; None restores the base."""
        with self._lock:
            self._texts.clear()
            if self.applied:
                self.applied.remove()
                self.applied = None
            if concept:
                self.applied = AppliedConcept(self.model, concept, self.identity, self.any_base)

    def size(self, settings: SampleConfig) -> tuple[int, int]:
        """Returns (height, width) in px, the model's own where none is set.

        Raises:
            UserError: a side is no multiple of what the network needs.
        """
        return image_side(self.model, "H", settings.height), image_side(self.model, "W", settings.width)

    def plan(self, prompts: Sequence[str], settings: SampleConfig) -> list[Row]:
        """Lists the images of a run: for each prompt and seed, the plain one, then one per strength.

        Raises:
            UserError: a setting is out of range, DCI would have no step with two branches, or a prompt has an unknown
                word, does not mention the concept, or so late that it is cut off.
        """
        check_settings(settings)
        most = self.model.num_timesteps - (settings.sampler == "dpm_solver")
        if settings.steps > most:
            raise UserError(f"steps is {settings.steps}; {settings.sampler} takes at most {most} with this model.")
        self.size(settings)
        texts = self.texts(prompts)
        for prompt in prompts if self.concept else ():
            self._check_concept(prompt)
        self.model.cond_stage_model.tokenize(texts)
        if self.concept is None:
            strengths: list[float | None] = [None]
        else:
            strengths = [None] if settings.plain or not settings.dci.use else []
            strengths += list(settings.dci.agg_lambda) if settings.dci.use else []
            if strengths != [None]:
                self._check_phase(settings)
            for prompt in prompts if settings.dci.use else ():
                self.token_sets([prompt], settings.dci)
        count = settings.n_samples * settings.n_iter
        if count * len(prompts) * len(strengths) > MAX_IMAGES:
            raise UserError(f"{len(prompts)} prompts with {count} samples and {len(strengths)} strengths each are too "
                            f"many images; a run draws up to {MAX_IMAGES:,}.")
        return [Row(prompt, settings.seed + index, strength)
                for prompt in prompts for index in range(count) for strength in strengths]

    def _check_phase(self, settings: SampleConfig) -> None:
        """Refuses DCI without any step with two branches: it would draw plain images under another name."""
        steps, total, share = dci_steps(settings), self.model.num_timesteps, settings.dci.agg_time
        if not any(in_joint_phase(t, total, share) for t in SAMPLERS[settings.sampler].times(steps, total)):
            raise UserError(f"with steps={steps} and agg_time={share:g} no step has two branches, so DCI would change "
                            "nothing; take more steps, a larger dci.agg_time, or dci.use=false.")

    def _check_concept(self, prompt: str) -> None:
        """Refuses a prompt whose concept is cut off, and warns of one that says its class twice."""
        scheme = tokens.named_scheme(prompt, self.concept.schemes)
        tokens.concept_prompts(self.model.cond_stage_model, [prompt], scheme.concept)
        if tokens.noun_beside(prompt, scheme.concept, scheme.class_noun):
            warnings.warn(f"the prompt '{prompt}' says '{scheme.class_noun}' beside the concept, which is a "
                          f"'{scheme.concept}' already, so the concept is easily lost; leave the word out",
                          stacklevel=2)

    def token_sets(self, prompts: Sequence[str], dci: DCIConfig) -> tuple[TokenSets, TokenSets]:
        """Returns the prompts of the concept and of the auxiliary branch with their token sets S^c and S^a (Eq 3)."""
        if self.concept is None:
            raise UserError("DCI needs a concept; give one with --delta_ckpt.")
        made = {prompt: self._token_sets(prompt, dci) for prompt in dict.fromkeys(prompts)}   # one for many images
        concept, auxiliary = zip(*(made[prompt] for prompt in prompts), strict=True)
        return tokens.stack(concept), tokens.stack(auxiliary)

    def _token_sets(self, prompt: str, dci: DCIConfig) -> tuple[TokenSets, TokenSets]:
        embedder, scheme = self.model.cond_stage_model, tokens.named_scheme(prompt, self.concept.schemes)
        if dci.ablation == "no_full_prompt":
            return tokens.divided_prompts(embedder, [prompt], scheme.concept)
        return (tokens.concept_prompts(embedder, [prompt], scheme.concept),
                tokens.auxiliary_prompts(embedder, [prompt], scheme.concept, scheme.class_noun, dci.replace_noun))

    def auxiliary_noun(self, prompt: str, dci: DCIConfig) -> str | None:
        """Returns the noun that stands for the concept in a prompt's second branch; None where none does."""
        if dci.ablation == "no_full_prompt":
            return None
        scheme = tokens.named_scheme(prompt, self.concept.schemes)
        pieces = tokens.split_at_concept(prompt, scheme.concept)
        return tokens.chosen_noun(self.model.cond_stage_model, scheme.class_noun, pieces, dci.replace_noun)

    def describe(self, prompts: Sequence[str], dci: DCIConfig) -> str:
        """Returns a table of the tokens of both branches' prompts: position, id, text, role."""
        concept, auxiliary = self.token_sets(prompts, dci)
        embedder = self.model.cond_stage_model
        return "\n".join([tokens.describe_tokens(embedder, concept, ("S^c: concept", "-")),
                          tokens.describe_tokens(embedder, auxiliary, ("auxiliary noun", "S^a: context"))])

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Puts the file's first concept where a prompt says {}; with a file loaded, every prompt must mention one."""
        if self.concept is None:
            if any("{}" in prompt for prompt in prompts):
                raise UserError("a prompt has {} but no concept is loaded; give one with --delta_ckpt.")
            return list(prompts)
        named = [tokens.named_scheme(prompt, self.concept.schemes).concept for prompt in prompts]
        return ["".join(tokens.join_pieces(tokens.split_at_concept(prompt, concept), concept, articles=False))
                for prompt, concept in zip(prompts, named, strict=True)]

    def generate(self, prompts: Sequence[str], settings: SampleConfig,
                 progress: Callable[[int], None] | None = None, watched: Collection[Row] = ()) -> Iterator[Sample]:
        """Draws all images of `plan`, in its order within each way of sampling: first the plain ones.

        Args:
            prompts: texts in which {} or "V noun" stands for the concept; in each, DCI is for the first concept of the
                file that it mentions.
            progress: called with the number of images after each batch.
            watched: DCI's images whose masks are wanted.

        Raises:
            UserError: as `plan` does, before any work; or the memory does not hold a batch.
        """
        rows = self.plan(prompts, settings)
        for joint in (False, True):
            group = [row for row in rows if (row.strength is not None) == joint]
            for first in range(0, len(group), settings.batch_size):
                batch = group[first:first + settings.batch_size]
                images, masks = self._draw(batch, settings, watched)
                size = self.size(settings)
                for image, row, texts in zip(images, batch, self._texts_of(batch, settings), strict=True):
                    record = _record(settings, size, self.identity, self.concept, row.prompt)
                    yield Sample(image, row, {**record, **asdict(row), **texts}, masks.get(row, []))
                if progress:
                    progress(len(batch))

    def _draw(self, rows: Sequence[Row], settings: SampleConfig,
              watched: Collection[Row]) -> tuple[list[Image.Image], dict[Row, Masks]]:
        """Draws rows that are all plain or all DCI, and records the masks of those that are watched."""
        places = [place for place, row in enumerate(rows) if row in watched]
        with self._lock, _memory_for(len(rows)), self._watching(places) as record:
            images = to_images(decode_latents(self.model, self.latents(rows, settings)))
        _, height, width = self._shape(settings)
        sized = [(name, masks.unflatten(-1, layer_size(masks.shape[-1], height, width))) for name, masks in record]
        return images, {rows[place]: [(name, masks[:, index:index + 1]) for name, masks in sized]
                        for index, place in enumerate(places)}

    @contextlib.contextmanager
    def _watching(self, places: Sequence[int]) -> Iterator[Masks]:
        """Records the masks (2, B, H, N) of these B images of a batch, uncompiled, as only that can be watched."""
        record: Masks = []
        if not places:
            yield record
            return
        with torch.compiler.set_stance("force_eager"), record_masks(self.model.model.diffusion_model, record, places):
            yield record

    def _texts_of(self, rows: Sequence[Row], settings: SampleConfig) -> list[dict[str, str]]:
        """Returns what each branch was told, for the images' settings."""
        prompts = [row.prompt for row in rows]
        if rows[0].strength is None:
            return [{"text": text} for text in self.texts(prompts)]
        concept, auxiliary = self.token_sets(prompts, settings.dci)
        return [{"text": text, "auxiliary_text": other}
                for text, other in zip(concept.prompts, auxiliary.prompts, strict=True)]

    @torch.no_grad()
    def latents(self, rows: Sequence[Row], settings: SampleConfig) -> Tensor:
        """Samples latents (B, C, h, w) of rows that are all plain or all DCI."""
        dual = None
        steps = settings.steps
        prompts = [row.prompt for row in rows]
        with self._autocast(settings):
            unconditional = self._encode([""] * len(rows))                                     # (B, T, D)
            if rows[0].strength is None:
                conditioning = self._encode(self.texts(prompts))                               # (B, T, D)
            else:
                concept_sets, auxiliary_sets = self.token_sets(prompts, settings.dci)
                conditioning = self._encode(concept_sets.prompts)                              # (B, T, D)
                dual = self._dual_branch(rows, settings, concept_sets, auxiliary_sets)
                steps = dci_steps(settings)
            samples, _ = SAMPLERS[settings.sampler](self.model).sample(
                steps, len(rows), self._shape(settings), conditioning, eta=settings.eta, verbose=False,
                unconditional_guidance_scale=settings.scale, unconditional_conditioning=unconditional,
                generators=[torch.Generator().manual_seed(row.seed) for row in rows], dual=dual)
        return samples

    def _dual_branch(self, rows: Sequence[Row], settings: SampleConfig, concept: TokenSets,
                     auxiliary: TokenSets) -> DualBranch:
        dci, device = settings.dci, self.model.device
        layout = BranchLayout.UNGUIDED if settings.scale == 1.0 else \
            BranchLayout.SHARED if dci.guidance == "shared" else BranchLayout.SEPARATE
        _, height, width = self._shape(settings)
        control = DBIMControl(
            *(mask.to(device) for mask in (concept.named, concept.content, auxiliary.others, auxiliary.content)),
            strength=torch.tensor([row.strength for row in rows], device=device), layout=layout,
            full_pixels=height * width, masked=dci.ablation != "no_mask",
            last_layer_only=dci.ablation == "last_layer", token_gain=dci.token_gain,
            spatial_gain=dci.spatial_gain, mask_sum=dci.mask_sum)
        base = partial(self.applied.base_in_auxiliary, layout) if dci.ablation == "base_weights" else None
        seeds = [int(np.random.SeedSequence([abs(row.seed), 1]).generate_state(1)[0]) for row in rows]
        return DualBranch(self._encode(auxiliary.prompts), control, dci.agg_time,
                          [torch.Generator().manual_seed(seed) for seed in seeds], dci.noise == "common",
                          base)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts to (B, T, D), each once and by itself, so that it is the same in any batch."""
        kind = torch.get_autocast_dtype(self.model.device.type) if torch.is_autocast_enabled(self.model.device.type) \
            else torch.float32
        if len(self._texts) > MAX_TEXTS:
            self._texts.clear()
        for text in dict.fromkeys(texts):
            if (text, kind) not in self._texts:
                self._texts[text, kind] = self.model.cond_stage_model([text])[0]
        return torch.stack([self._texts[text, kind] for text in texts])

    def masks(self, row: Row, settings: SampleConfig) -> tuple[Image.Image, Masks]:
        """Draws one DCI row; returns the image and its masks, as `Sample` has them."""
        (image,), masks = self._draw([row], settings, [row])
        return image, masks[row]

    def _shape(self, settings: SampleConfig) -> tuple[int, int, int]:
        factor = self.model.first_stage_model.encoder.reduction
        height, width = self.size(settings)
        return self.model.channels, height // factor, width // factor

    def _autocast(self, settings: SampleConfig) -> contextlib.AbstractContextManager[Any]:
        """Returns the context to compute in: none for weights in the format that is asked for."""
        device = self.model.device
        wanted = supported_precision(settings.precision, device)
        if wanted == self.precision:
            return contextlib.nullcontext()
        if self.precision != "full":
            raise UserError(f"these weights are in {self.precision} and cannot draw in precision {wanted}; load the "
                            "model again.")
        half = self.model.model.diffusion_model.dtype
        if wanted == "autocast" and half == torch.float32:
            half = torch.bfloat16 if device.type == "cpu" else torch.float16
        return torch.autocast(device.type, FORMATS.get(wanted, half))


def _record(settings: SampleConfig, size: tuple[int, int], identity: dict[str, str],
            concept: Concept | None, prompt: str) -> dict[str, Any]:
    """Returns the settings that decide a prompt's image, without any path."""
    record = {name: getattr(settings, name) for name in ("sampler", "steps", "eta", "scale", "precision")}
    record |= {"height": size[0], "width": size[1], "base": dict(identity)}
    if concept is not None:
        scheme = tokens.named_scheme(prompt, concept.schemes)
        record["concept"] = {"words": list(scheme.words), "class_noun": scheme.class_noun, "step": concept.step}
        dci = settings.dci
        record["dci"] = {name: getattr(dci, name) for name in (
            "agg_time", "replace_noun", "guidance", "noise", "match_cost", "ablation", "token_gain", "spatial_gain",
            "mask_sum")}
    return record
