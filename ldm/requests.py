"""What a sampling run is asked for: one request per image, the steps each takes, what its file says of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.config import MAX_IMAGES, SampleConfig
from ldm.customization.delta import Concept
from ldm.customization.tokens import named_scheme
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dual_branch import in_joint_phase
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import UserError

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


@dataclass(frozen=True)
class ImageRequest:
    """One image to sample: `strength` is lambda, or None for the fine-tuned model without DCI."""

    prompt: str
    seed: int
    strength: float | None


def list_requests(prompts: Sequence[str], settings: SampleConfig, concept: Concept | None) -> list[ImageRequest]:
    """Lists the images of a run: for each prompt and seed, the plain one, then one per strength.

    Raises:
        UserError: they are too many.
    """
    strengths: list[float | None] = []
    if concept is None or settings.plain or not settings.dci.use:
        strengths.append(None)     # a base without a concept has nothing to inject around
    if concept is not None and settings.dci.use:
        strengths += settings.dci.agg_lambda
    count = settings.n_samples * settings.n_iter
    if count * len(prompts) * len(strengths) > MAX_IMAGES:
        raise UserError(f"{len(prompts)} prompts with {count} samples and {len(strengths)} strengths each are too "
                        f"many images; a run draws up to {MAX_IMAGES:,}.")
    requests = []
    for prompt in prompts:
        for seed in range(settings.seed, settings.seed + count):
            requests += [ImageRequest(prompt, seed, strength) for strength in strengths]
    return requests


def cost_matched_steps(steps: int, agg_time: float, separate: bool, guided: bool = True) -> int:
    """Returns how many DCI steps cost as many U-Net rows as `steps` steps of plain sampling (paper section 4.2).

    A plain guided step has 2 rows; a joint step 4 (separate guidance) or 3 (shared); unguided 1 and 2.
    """
    plain, joint = 1, 2
    if guided:
        plain, joint = 2, 4 if separate else 3     # rows of the U-Net
    return max(1, round(steps / (1.0 + agg_time * (joint - plain) / plain)))


def dci_steps(settings: SampleConfig) -> int:
    """Returns how many steps a DCI image takes."""
    if not settings.dci.match_cost:
        return settings.steps
    separate = settings.dci.guidance == "separate"
    return cost_matched_steps(settings.steps, settings.dci.agg_time, separate, settings.scale != 1.0)


def check_steps(settings: SampleConfig, num_timesteps: int) -> None:
    """Refuses more steps than the model's schedule has.

    Raises:
        UserError: they are.
    """
    most = num_timesteps
    if settings.sampler == "dpm_solver":
        most -= 1                        # its steps go between time steps
    if settings.steps > most:
        raise UserError(f"steps is {settings.steps}; {settings.sampler} takes at most {most} with this model.")


def check_joint_phase(settings: SampleConfig, num_timesteps: int) -> None:
    """Refuses DCI without any joint step: it would draw plain images under another name.

    Raises:
        UserError: there is none.
    """
    steps, share = dci_steps(settings), settings.dci.agg_time
    # Where the steps start from, the sampler's own.
    times = SAMPLERS[settings.sampler].times(steps, num_timesteps)
    if not any(in_joint_phase(t, num_timesteps, share) for t in times):
        raise UserError(f"with steps={steps} and agg_time={share:g} no step has two branches, so DCI would change "
                        "nothing; take more steps, a larger dci.agg_time, or dci.use=false.")


def record_of(request: ImageRequest, told: dict[str, str], settings: SampleConfig, size: tuple[int, int],
              identity: dict[str, str], concept: Concept | None) -> dict[str, Any]:
    """Returns everything that decides an image, without any path: the request, what was told, the settings."""
    record = {name: getattr(settings, name) for name in ("sampler", "steps", "eta", "scale", "precision")}
    record |= {"height": size[0], "width": size[1], "base": dict(identity)}
    if concept is not None:
        scheme = named_scheme(request.prompt, concept.schemes)
        record["concept"] = {"words": list(scheme.words), "class_noun": scheme.class_noun, "step": concept.step}
        record["dci"] = asdict(settings.dci)
        for given_per_image in ("use", "agg_lambda"):     # the request has them
            del record["dci"][given_per_image]
    return {**record, **asdict(request), **told}
