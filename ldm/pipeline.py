"""Generator: base model + concept → images; the one door for scripts, demos and evaluation."""
from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm.base import build_model as build_model  # where callers of the first release find it
from ldm.base import image_side
from ldm.config import SampleConfig, typed
from ldm.customization.delta import AppliedConcept, Concept
from ldm.customization.prompts import PromptReader
from ldm.customization.routing import RoutedConcepts
from ldm.customization.tokens import TokenSets, named_schemes
from ldm.data.framing import to_images
from ldm.device import (
    autocast_to,
    compile_network,
    decode_latents,
    memory_for,
    set_format,
    supported_precision,
    weights_precision,
)
from ldm.device import choose_device as choose_device  # likewise
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dual_branch import DualBranch
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.attention import record_masks
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.requests import (
    ImageRequest,
    check_joint_phase,
    check_steps,
    count_joint_steps,
    dci_steps,
    list_requests,
)

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
MAX_TEXTS = 512      # encoded prompts that are kept, 0.24 MB each with SD v1

Masks = list[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Sample:
    """An image and everything needed to make it again.

    Where it was watched, `masks` are each integration's layer name and masks (2, 1, H, h, w), in order of time.
    """

    image: Image.Image
    request: ImageRequest
    settings: dict[str, Any]
    masks: Masks = field(default_factory=list)


def layer_size(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Returns the sides of a layer of so many pixels over latents of these sides, which it divides alike."""
    factor = math.isqrt(height * width // pixels)
    return height // factor, width // factor


def record_of(request: ImageRequest, told: dict[str, str], settings: SampleConfig, size: tuple[int, int],
              identity: dict[str, str], concept: Concept | None) -> dict[str, Any]:
    """Returns everything that decides an image, without any path: the request, what was told, the settings."""
    record = {name: getattr(settings, name) for name in ("sampler", "steps", "eta", "scale", "precision")}
    record |= {"height": size[0], "width": size[1], "base": dict(identity)}
    if concept is not None:
        named = [{"words": list(scheme.words), "class_noun": scheme.class_noun, "step": concept.step}
                 for scheme in named_schemes(request.prompt, concept.schemes)]
        record["concept"] = named[0]
        if len(named) > 1:
            record["concepts"] = named
        record["dci"] = asdict(settings.dci)
        for given_per_image in ("use", "agg_lambda", "choice"):     # the request has them; a choice adds its scores
            del record["dci"][given_per_image]
    return {**record, **asdict(request), **told}


class Generator:
    """Makes images with a base model and, if one is loaded, a concept. One thread samples at a time.

    On a model without weights (`empty_model`) it lists and refuses, but cannot sample.

    Args:
        model: the base.
        identity: its name and hash, as `build_model` returns them.
        device: where to sample.
        precision: the format U-Net and autoencoder are put into, bf16 or fp16; others leave them as they are.
        compiled: compiles the U-Net.
        any_base: takes concepts that were made for another base, with a warning.
    """

    def __init__(self, model: LatentDiffusion, identity: dict[str, str], device: torch.device | str = "cpu",
                 precision: str = "full", compiled: bool = False, any_base: bool = False):
        self.model, self.identity, self.any_base = model.to(device).eval(), identity, any_base
        precision = supported_precision(precision, self.model.device)
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        set_format(self.model, halves.get(precision))
        self.precision = weights_precision(self.model)
        if compiled:
            compile_network(self.model)
        self._texts: dict[tuple[str, torch.dtype], Tensor] = {}     # prompts encoded with the present concept
        self.concept: Concept | None = None
        self._applied: AppliedConcept | RoutedConcepts | None = None
        self._lock = threading.Lock()      # a concept changes the module, so requests take turns

    def load(self, *concepts: Concept | None, padding: str = "concepts") -> None:
        """Puts concepts in, in place of those before; None restores the base.

        Several stand side by side, each with its own K/V (`RoutedConcepts`, where `padding` is explained).

        Raises:
            UserError: one does not fit this base; the base is restored then.
        """
        given = [concept for concept in concepts if concept is not None]
        with self._lock:
            self._texts.clear()     # a word means something else with another concept
            if self._applied:
                self._applied.remove()
                self._applied = self.concept = None
            if len(given) > 1:
                self._applied = RoutedConcepts(self.model, given, self.identity, self.any_base, padding)
            elif given:
                self._applied = AppliedConcept(self.model, given[0], self.identity, self.any_base)
            if self._applied:
                self.concept = self._applied.concept

    def adopt(self, concept: Concept) -> None:
        """Samples with a concept whose words and weights are in the model already, as of one that is being trained."""
        self.concept = concept

    @property
    def prompts(self) -> PromptReader:
        """Reads prompts with the present concept in mind."""
        if self.concept is None:
            return PromptReader(self.model.cond_stage_model)
        return PromptReader(self.model.cond_stage_model, self.concept.schemes)

    def size(self, settings: SampleConfig) -> tuple[int, int]:
        """Returns (height, width) in px, the model's own where none is set.

        Raises:
            UserError: a side is no multiple of what the network needs.
        """
        return image_side(self.model, "H", settings.height), image_side(self.model, "W", settings.width)

    def requests(self, prompts: Sequence[str], settings: SampleConfig | DictConfig) -> list[ImageRequest]:
        """Lists the images of a run: for each prompt and seed, the plain one, then one per strength.

        Raises:
            UserError: a setting is out of range, DCI would have no step with two branches, or a prompt has an unknown
                word, does not mention the concept, or so late that it is cut off.
        """
        settings = typed(settings)
        check_steps(settings, self.model.num_timesteps)     # what costs nothing comes first
        self.size(settings)
        self.prompts.check(prompts, settings.dci)
        requests = list_requests(prompts, settings, self.concept is not None)
        if any(request.strength is not None for request in requests):
            total = self.model.num_timesteps
            check_joint_phase(settings, SAMPLERS[settings.sampler].times(dci_steps(settings), total), total)
        return requests

    def generate(self, prompts: Sequence[str], settings: SampleConfig | DictConfig,
                 progress: Callable[[int], None] | None = None,
                 watched: Collection[ImageRequest] = ()) -> Iterator[Sample]:
        """Yields one `Sample` per request, in their order within each way of sampling: the plain images first.

        Args:
            prompts: texts in which {} or "V noun" stands for a concept; DCI is for all that a prompt mentions.
            progress: called with the number of images after each batch.
            watched: DCI's images whose masks are wanted.

        Raises:
            UserError: as `requests` does, before any work; or the memory does not hold a batch.
        """
        settings = typed(settings)
        requests, size = self.requests(prompts, settings), self.size(settings)
        for dci in (None, settings.dci):
            # A batch is all plain or all DCI.
            group = [request for request in requests if (request.strength is None) == (dci is None)]
            for first in range(0, len(group), settings.batch_size):
                batch = group[first:first + settings.batch_size]
                images, masks = self._sample(batch, settings, watched)
                told = self.prompts.told([request.prompt for request in batch], dci)
                for image, request, texts in zip(images, batch, told, strict=True):
                    record = record_of(request, texts, settings, size, self.identity, self.concept)
                    if isinstance(self._applied, RoutedConcepts):
                        record["padding"] = self._applied.padding
                    yield Sample(image, request, record, masks.get(request, []))
                if progress:
                    progress(len(batch))

    def masks(self, request: ImageRequest, settings: SampleConfig | DictConfig) -> tuple[Image.Image, Masks]:
        """Samples one DCI request; returns the image and its masks, as `Sample` has them."""
        (image,), masks = self._sample([request], typed(settings), [request])
        return image, masks[request]

    def _sample(self, batch: Sequence[ImageRequest], settings: SampleConfig,
                watched: Collection[ImageRequest]) -> tuple[list[Image.Image], dict[ImageRequest, Masks]]:
        """Samples requests that are all plain or all DCI, and records the masks of those that are watched."""
        places = [place for place, request in enumerate(batch) if request in watched]
        with self._lock, memory_for(len(batch)), self._watching(places) as record:
            images = to_images(decode_latents(self.model, self.latents(batch, settings)))
        _, height, width = self._shape(settings)
        found: dict[ImageRequest, Masks] = {batch[place]: [] for place in places}
        for name, masks in record:                                                     # (2, B, H, N) each
            sized = masks.unflatten(-1, layer_size(masks.shape[-1], height, width))    # (2, B, H, h, w)
            for index, place in enumerate(places):
                found[batch[place]].append((name, sized[:, index:index + 1]))
        return images, found

    @contextlib.contextmanager
    def _watching(self, places: Sequence[int]) -> Iterator[Masks]:
        """Records the masks (2, B, H, N) of these B images of a batch, uncompiled, as only that can be watched."""
        record: Masks = []
        if not places:
            yield record
            return
        with torch.compiler.set_stance("force_eager"), record_masks(self.model.model.diffusion_model, record, places):
            yield record

    @torch.no_grad()
    def latents(self, batch: Sequence[ImageRequest], settings: SampleConfig | DictConfig) -> Tensor:
        """Samples latents (B, C, h, w) of requests that are all plain or all DCI."""
        settings = typed(settings)
        dual, steps = None, settings.steps
        prompts = [request.prompt for request in batch]
        with autocast_to(settings.precision, self.model, self.precision):
            unconditional = self._encode([""] * len(batch))                                    # (B, T, D)
            if batch[0].strength is None:
                conditioning = self._encode(self.prompts.texts(prompts))                       # (B, T, D)
            else:
                concept_sets, auxiliary_sets = self.prompts.token_sets(prompts, settings.dci)
                conditioning = self._encode(concept_sets.prompts)                              # (B, T, D)
                dual = self._dual_branch(batch, settings, concept_sets, auxiliary_sets)
                steps = dci_steps(settings)
            sampler, stop_after = SAMPLERS[settings.sampler](self.model), None
            if settings.dci.preview:
                total = self.model.num_timesteps
                stop_after = count_joint_steps(settings, sampler.times(steps, total), total)
            samples, _ = sampler.sample(
                steps, len(batch), self._shape(settings), conditioning, eta=settings.eta, verbose=False,
                unconditional_guidance_scale=settings.scale, unconditional_conditioning=unconditional,
                generators=[torch.Generator().manual_seed(request.seed) for request in batch], dual=dual,
                stop_after=stop_after)
        return samples

    def _dual_branch(self, batch: Sequence[ImageRequest], settings: SampleConfig, concept: TokenSets,
                     auxiliary: TokenSets) -> DualBranch:
        """Describes the auxiliary branch of a batch to the sampler."""
        dci, device = settings.dci, self.model.device
        layout = BranchLayout.SHARED if dci.guidance == "shared" else BranchLayout.SEPARATE
        if settings.scale == 1.0:
            layout = BranchLayout.UNGUIDED     # without guidance there is no unconditional row
        _, height, width = self._shape(settings)
        control = DBIMControl(
            concept_tokens=concept.mentioned.to(device), concept_prompt=concept.content.to(device),
            context_tokens=auxiliary.others.to(device), context_prompt=auxiliary.content.to(device),
            strength=torch.tensor([request.strength for request in batch], device=device), layout=layout,
            full_pixels=height * width, masked=dci.ablation != "no_mask",
            last_layer_only=dci.ablation == "last_layer", token_gain=dci.token_gain,
            spatial_gain=dci.spatial_gain, mask_sum=dci.mask_sum)
        generators = []
        for request in batch:      # the auxiliary branch's noise is another one, from the same seed
            seed = np.random.SeedSequence([abs(request.seed), 1]).generate_state(1)[0]
            generators.append(torch.Generator().manual_seed(int(seed)))
        own_weights = None
        if dci.ablation == "base_weights":
            own_weights = partial(self._applied.base_in_auxiliary, layout)
        return DualBranch(self._encode(auxiliary.prompts), control, dci.agg_time, generators, dci.noise == "common",
                          own_weights)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Encodes texts to (B, T, D), each once and by itself, so that it is the same in any batch."""
        kind = torch.float32
        if torch.is_autocast_enabled(self.model.device.type):
            kind = torch.get_autocast_dtype(self.model.device.type)
        if len(self._texts) > MAX_TEXTS:
            self._texts.clear()
        for text in texts:
            if (text, kind) not in self._texts:
                features = self.model.cond_stage_model([text])[0]                              # (T, D)
                if isinstance(self._applied, RoutedConcepts):
                    features = self._applied.widen(features, text)                             # (T, (1 + files) D)
                self._texts[text, kind] = features
        return torch.stack([self._texts[text, kind] for text in texts])

    def _shape(self, settings: SampleConfig) -> tuple[int, int, int]:
        """Returns (C, h, w) of an image's latents."""
        factor = self.model.first_stage_model.encoder.reduction
        height, width = self.size(settings)
        return self.model.channels, height // factor, width // factor
