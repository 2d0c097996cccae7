"""ConceptFinetune: the one training step of every method, its optimizer groups, what a checkpoint holds."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import MethodConfig
from ldm.customization import ico
from ldm.customization.delta import Concept, words_of
from ldm.customization.feature_cache import CaptionFeatures, Posteriors, cast_frozen
from ldm.customization.ico import PromptScheme
from ldm.customization.selection import stopped_first_token, trained_parameters
from ldm.data.batches import TrainingBatch, TrainingPlan
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import UserError


def masked_mean(error: Tensor, masks: Tensor | None) -> Tensor:
    """Returns each row's mean (B,) of an error (B, C, h, w) over the latent pixels that count.

    Args:
        masks: (B, H, W) in [0, 1] at the images' size, averaged down to the latents'; None counts everything.
    """
    if masks is None:
        return error.mean(dim=(1, 2, 3))
    share = F.adaptive_avg_pool2d(masks[:, None].to(error), error.shape[-2:])            # (B, 1, h, w)
    return (error * share).mean(dim=(1, 2, 3)) / share.mean(dim=(1, 2, 3))


class ConceptFinetune(pl.LightningModule):
    """Fine-tunes a latent diffusion model on concepts: new words, contexts, and the tensors the method selects.

    Args:
        model: the base; everything in it is frozen but for what `method.train` selects.
        method: learning rates and all other choices.
        schemes: one per concept; `image_counts` says how many reference images each has.
        base: name and hash of the base, for concept files.
        learning_rate: the effective rate of concept words.
        seed: of random initial vectors.
        info: configuration and versions, for concept files.
        templates: in place of the method's template, one per reference image, concept after concept; None keeps it.
    """

    def __init__(self, model: LatentDiffusion, method: MethodConfig, schemes: Sequence[PromptScheme],
                 image_counts: Sequence[int], base: Mapping[str, str], learning_rate: float, seed: int,
                 info: Mapping[str, Any] | None = None, templates: Sequence[str | None] = ()):
        super().__init__()
        self.strict_loading = False    # a resume file holds the trained tensors only; load_state_dict checks them
        self.model, self.method, self.schemes, self.base = model, method, tuple(schemes), dict(base)
        self.effective_learning_rate, self.info = learning_rate, dict(info or {})
        model.requires_grad_(False)
        self.trained = trained_parameters(model.model.diffusion_model, method.train)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.word_blocks: list[nn.Parameter] = []       # one per concept
        self.context_blocks: list[nn.Parameter] = []    # one per reference image, concept after concept
        self.captions: list[str] = []                   # P_i of each reference image (Eq 2)
        self._seen: frozenset[int] = frozenset()        # reference images since the last optimizer step
        self.posteriors: Posteriors | None = None       # of all images, where they are kept
        self.text: Callable[[Sequence[str]], Tensor] = model.cond_stage_model.encode     # (B, T, D) of captions
        self._add_words(image_counts, templates, torch.Generator().manual_seed(seed))
        self._start: dict[str, list[Tensor]] = {}       # where each kind begins; a resumed run's state is loaded later
        for kind, parameters in self.kinds().items():
            self._start[kind] = [parameter.detach().cpu().clone() for parameter in parameters]

    def _add_words(self, image_counts: Sequence[int], templates: Sequence[str | None],
                   generator: torch.Generator) -> None:
        """Gives every concept word and every context its row and first value."""
        embedder, method = self.model.cond_stage_model, self.method
        for scheme in self.schemes:
            vectors = ico.initial_words(embedder, len(scheme.words), method.initial_words, generator)
            self.word_blocks.append(embedder.add_words(dict(zip(scheme.words, vectors, strict=True))))
        for scheme, count in zip(self.schemes, image_counts, strict=True):
            for image in range(count):
                template = templates[len(self.captions)] if templates else None
                framed = replace(scheme, template=template) if template else scheme
                self.captions.append(framed.caption(image))
                names = scheme.context_words(image)
                if names:
                    vectors = ico.initial_contexts(embedder, method.prefix, method.suffix, scheme, generator)
                    self.context_blocks.append(embedder.add_words(dict(zip(names, vectors, strict=True))))
        embedder.tokenize(self.captions, strict=True)   # a caption that does not fit is refused before training

    def lighten(self, dtype: torch.dtype | None, checkpointing: bool | None) -> None:
        """Saves memory and time without changing what is computed.

        Args:
            dtype: what autocast computes in; frozen weights of U-Net and text encoder are kept in it. None: they stay.
            checkpointing: recomputes activations in the backward pass; None leaves it to the model's configuration.
        """
        if checkpointing is not None:
            self.model.model.diffusion_model.set_checkpointing(checkpointing)
        if dtype is not None:
            cast_frozen(self.model.model.diffusion_model, dtype)
            cast_frozen(self.model.cond_stage_model, dtype)

    def keep_constants(self, plan: TrainingPlan, decoder: bool, quiet: bool = True, last: int | None = None) -> None:
        """Computes once what the steps of a plan would compute again and again, and gives the encoder's memory back.

        Args:
            decoder: keeps the decoder, on the CPU, for previews.
            quiet: shows no progress.
            last: the micro-step the plan ends before; None: it does not end.
        """
        self.posteriors = Posteriors(plan.seen_images(last), plan.load, lambda image: self._moments(image[None])[0],
                                     quiet)
        self.text = CaptionFeatures(self.text)
        self.model.first_stage_model.release(decoder)
        self.model.first_stage_model.cpu()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Returns the weighted error of the noise predicted for a batch (Eq 1 with the prompts of Eq 2)."""
        latents, t, noise = self._noised_inputs(batch)                                   # (B, C, h, w), (B,), same
        cond = self.text(batch.captions)                                                # (B, T, D)
        unet = self.model.model.diffusion_model
        with stopped_first_token(unet) if self.method.detach_first_token else nullcontext():
            error = masked_mean(self.model.p_losses(latents, cond, t, noise), batch.masks)   # (B,)
        weights = batch.weights.to(error)
        loss = (weights * error).sum() / batch.full
        self.log("loss", loss, prog_bar=True, batch_size=len(error))
        self._seen |= batch.concept_images
        return loss

    @torch.no_grad()
    def _noised_inputs(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Draws latents, time steps and noise: one seed per row, independent of device and batch size."""
        if self.posteriors is None:
            moments = self._moments(batch.images)                                        # (B, 2C, h, w)
        else:
            moments = self.posteriors.moments(batch.seen).to(self.device)                # (B, 2C, h, w)
        latents, steps, noise = [], [], []
        for row, seed in zip(moments, batch.seeds, strict=True):
            rng = torch.Generator().manual_seed(seed)
            posterior = DiagonalGaussianDistribution(row[None])
            shape = posterior.mean.shape
            # The order of the three draws decides every run's result.
            latents.append(self.model.scale_factor * posterior.sample(torch.randn(shape, generator=rng).to(row)))
            noise.append(torch.randn(shape, generator=rng).to(row))
            steps.append(torch.randint(0, self.model.num_timesteps, (1,), generator=rng))
        return torch.cat(latents), torch.cat(steps).to(self.device), torch.cat(noise)

    @torch.no_grad()
    def _moments(self, images: Tensor) -> Tensor:
        """Encodes images (B, H, W, 3) to mean and log-variance (B, 2C, h, w)."""
        return self.model.encode_first_stage(images.to(self.device).permute(0, 3, 1, 2)).parameters

    def transfer_batch_to_device(self, batch: TrainingBatch, device: torch.device,
                                 dataloader_idx: int) -> TrainingBatch:
        return batch       # frozen; the training step moves what it needs

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the contexts of absent images alone: with a zero gradient, Adam's momentum would move them."""
        for image, block in enumerate(self.context_blocks):
            if image not in self._seen:
                block.grad = None
        self._seen = frozenset()

    def kinds(self) -> dict[str, list[nn.Parameter]]:
        """Returns all that is trained, by kind: weights of the network, words, contexts."""
        return {"weights": list(self.trained.values()), "words": self.word_blocks, "contexts": self.context_blocks}

    def trained_tensors(self) -> list[nn.Parameter]:
        """Returns all that is trained, in one list."""
        return list(chain.from_iterable(self.kinds().values()))

    def moved(self) -> dict[str, float]:
        """Returns ||now - start|| / ||start|| of each kind that is trained, over all its values together."""
        shares = {}
        for kind, parameters in self.kinds().items():
            change = size = 0.0
            for start, now in zip(self._start[kind], parameters, strict=True):
                change += float((now.detach().cpu() - start).double().square().sum())
                size += float(start.double().square().sum())
            if size:
                shares[kind] = math.sqrt(change / size)
        return shares

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns what is trained, with learning rate and weight decay: weights, words, contexts."""
        return ico.learning_rate_groups(list(self.trained.values()), self.word_blocks, self.context_blocks,
                                        self.effective_learning_rate, self.method.kv_lr_factor,
                                        self.method.context_lr_factor, self.method.weight_decay)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Builds AdamW over ICO's groups."""
        return torch.optim.AdamW(self.parameter_groups(), lr=self.effective_learning_rate)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts micro-steps as this configuration divides a step, and as after a whole one, wherever it was saved."""
        steps, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        done = steps * self.method.accumulate
        for counts in loop["epoch_loop.batch_progress"].values():
            if isinstance(counts, dict):
                counts |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1

    def on_train_start(self) -> None:
        """Sets rates and weight decay: a resumed optimizer brings those it was saved with."""
        for group, configured in zip(self.trainer.optimizers[0].param_groups, self.parameter_groups(), strict=True):
            group["lr"], group["weight_decay"] = configured["lr"], configured["weight_decay"]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the trained tensors only: that is all a run needs beside its base."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"trained.{name}"] = parameter.detach()
        for index, block in enumerate(self.word_blocks):
            tensors[f"words.{index}"] = block.detach()
        for index, block in enumerate(self.context_blocks):
            tensors[f"contexts.{index}"] = block.detach()
        return tensors

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Writes trained tensors back.

        Raises:
            UserError: the file belongs to a run with other trained tensors.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys() or any(own[key].shape != state_dict[key].shape for key in own):
            raise UserError("the run to resume trained other tensors or other images than this configuration says; "
                            "resume with the configuration saved beside it.")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def concept(self) -> Concept:
        """Returns what has been learned so far, on the CPU."""
        own = set(words_of(self.schemes))
        words, contexts = {}, {}
        for name, vector in self.model.cond_stage_model.word_vectors().items():
            if name in own:
                words[name] = vector
            else:
                contexts[name] = vector
        differences = {}
        for (name, parameter), start in zip(self.trained.items(), self._start["weights"], strict=True):
            differences[name] = parameter.detach().cpu() - start
        info = {**self.info, "moved": self.moved()}
        return Concept(words, contexts, {}, self.schemes, self.base, self.global_step, info, differences)
