"""What every sampler shares: CompVis's `sample` interface, the start, and the record of intermediates."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Generators, Guidance, SecondBranch, draw_noise
from ldm.util import UserError


def refuse_set(**options: Any) -> None:
    """Refuses what CompVis's samplers do and these do not, where it is asked for."""
    # 0.0 counts as asked for: it is a value.
    asked = [name for name, value in options.items() if value is not None and value is not False]
    if asked:
        raise UserError(f"the sampler does not know how to use {', '.join(asked)}; leave it out (docs/compvis.md).")


def warn_ignored(options: Mapping[str, Any]) -> None:
    """Warns of keywords that CompVis's samplers take and never read; nor do these."""
    if options:
        warnings.warn(f"the sampler ignores {', '.join(options)}, as CompVis's do.", stacklevel=4)


@dataclass(frozen=True, eq=False)
class StepOptions:
    """How steps are taken; see `Sampler.sample`."""

    eta: float = 0.0
    mask: Tensor | None = None
    x0: Tensor | None = None
    temperature: float = 1.0
    noise_dropout: float = 0.0
    verbose: bool = True
    stop_after: int | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.x0 is None:
            raise UserError("a mask needs x0, the latents to keep where it is 1.")


class SamplingRecord:
    """Calls the user's callbacks after each step and keeps every n-th state, as CompVis's samplers return them."""

    def __init__(self, start: Tensor, batch: int, steps: int, log_every_t: int,
                 callback: Callable[[int], Any] | None, img_callback: Callable[[Tensor, int], Any] | None):
        self.batch, self.steps, self.log_every_t = batch, steps, log_every_t
        self.callback, self.img_callback = callback, img_callback
        self.intermediates = {"x_inter": [start[:batch]], "pred_x0": [start[:batch]]}
        self.pred_x0 = start[:batch]       # what the last step predicted

    def step(self, done: int, x: Tensor, pred_x0: Tensor) -> None:
        """Takes the state after step `done` (from 0); only the concept branch's rows are shown."""
        x, pred_x0 = x[: self.batch], pred_x0[: self.batch]
        self.pred_x0 = pred_x0
        if self.callback:
            self.callback(done)
        if self.img_callback:
            self.img_callback(pred_x0, done)
        index = self.steps - done - 1
        if index % self.log_every_t == 0 or done == 0:     # as CompVis's samplers keep them
            self.intermediates["x_inter"].append(x)
            self.intermediates["pred_x0"].append(pred_x0)


class Sampler:
    """Base of the samplers; a subclass gives `run`.

    Args:
        model: a `LatentDiffusion` (anything with `apply_model`, `alphas_cumprod`, `num_timesteps` and a device).
        schedule: CompVis's name of the schedule; the model's own is always used.
        ignored: further keywords, which CompVis's samplers take.
    """

    def __init__(self, model: Any, schedule: str = "linear", **ignored: Any):
        warn_ignored(ignored)
        self.model, self.schedule = model, schedule
        self.ddpm_num_timesteps = model.num_timesteps

    @torch.no_grad()
    def sample(self, S: int, batch_size: int, shape: Sequence[int], conditioning: Any = None,
               callback: Callable[[int], Any] | None = None, normals_sequence: None = None,
               img_callback: Callable[[Tensor, int], Any] | None = None, quantize_x0: bool = False, eta: float = 0.0,
               mask: Tensor | None = None, x0: Tensor | None = None, temperature: float = 1.0,
               noise_dropout: float = 0.0, score_corrector: None = None, corrector_kwargs: None = None,
               verbose: bool = True, x_T: Tensor | None = None, log_every_t: int = 100,
               unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Any = None,
               dynamic_threshold: None = None, ucg_schedule: None = None, *, generators: Generators | None = None,
               dual: SecondBranch | None = None, stop_after: int | None = None,
               **ignored: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Samples latents; the arguments and their order are CompVis's but for the last three.

        Args:
            S: number of steps, exactly.
            shape: (C, h, w) of one sample.
            conditioning, unconditional_conditioning: for `batch_size` rows each.
            callback: called with the number of each step; `img_callback` with the predicted x_0 as well.
            normals_sequence, quantize_x0, score_corrector, corrector_kwargs, dynamic_threshold, ucg_schedule: refused.
            eta: 0 is deterministic, 1 adds DDPM's noise (DDIM only).
            mask: (B, 1 or C, h, w); where 1, `x0` is kept instead of sampled (DDIM and PLMS).
            temperature: scales the added noise.
            noise_dropout: share of the added noise that is set to 0, the rest enlarged accordingly.
            x_T: (B, C, h, w) initial latents; None draws them.
            log_every_t: how many steps lie between recorded intermediates.
            generators: one CPU generator per row, so that row k is the same in any batch.
            dual: DCI's auxiliary branch; None samples one branch.
            stop_after: takes the first so many of the steps, and returns the x_0 they predict; None takes all.

        Returns:
            Latents (B, C, h, w), and `x_inter` and `pred_x0` lists.

        Raises:
            UserError: an option is set that this sampler does not have.
        """
        refuse_set(normals_sequence=normals_sequence, quantize_x0=quantize_x0, score_corrector=score_corrector,
                   corrector_kwargs=corrector_kwargs, dynamic_threshold=dynamic_threshold, ucg_schedule=ucg_schedule)
        warn_ignored(ignored)
        options = StepOptions(eta, mask, x0, temperature, noise_dropout, verbose, stop_after)
        device = self.model.device
        empty = torch.empty((batch_size, *shape), device=device)     # for its shape, format and device
        x = draw_noise(empty, generators) if x_T is None else x_T.to(device)     # (B, C, h, w)
        build = Guidance if dual is None else dual.guidance
        guidance = build(self.model, conditioning, unconditional_conditioning, unconditional_guidance_scale, generators)
        record = SamplingRecord(x, batch_size, S, log_every_t, callback, img_callback)
        # (rows, C, h, w): of two branches while they last.
        x = self.run(guidance.start(x), guidance, S, record, options)
        if stop_after is not None:
            x = record.pred_x0
        return x[:batch_size], record.intermediates     # the concept's rows come first

    @staticmethod
    def times(steps: int, num_timesteps: int) -> Sequence[float]:
        """Returns the time steps that the steps of a run start from."""
        raise NotImplementedError

    def run(self, x: Tensor, guidance: Guidance, steps: int, record: SamplingRecord, options: StepOptions) -> Tensor:
        """Takes state `x` through all steps."""
        raise NotImplementedError
