"""What a sampling run is asked for: one request per image, the steps each takes, what its file says of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import MAX_IMAGES, SampleConfig
from ldm.models.diffusion.dual_branch import in_joint_phase
from ldm.util import UserError


@dataclass(frozen=True)
class ImageRequest:
    """One image to sample: `strength` is lambda, or None for the fine-tuned model without DCI."""

    prompt: str
    seed: int
    strength: float | None


def list_requests(prompts: Sequence[str], settings: SampleConfig, has_concept: bool) -> list[ImageRequest]:
    """Lists the images of a run: for each prompt and seed, the plain one, then one per strength.

    Raises:
        UserError: they are too many.
    """
    strengths: list[float | None] = []
    compared = settings.plain or settings.dci.choice.use     # with what DCI makes
    if not has_concept or compared or not settings.dci.use:
        strengths.append(None)     # a base without a concept has nothing to inject around
    if has_concept and settings.dci.use:
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


def count_joint_steps(settings: SampleConfig, times: Sequence[float], num_timesteps: int) -> int:
    """Counts the steps with two branches among those that start from time steps `times`."""
    joint = [t for t in times if in_joint_phase(t, num_timesteps, settings.dci.agg_time)]
    return len(joint)


def check_joint_phase(settings: SampleConfig, times: Sequence[float], num_timesteps: int) -> None:
    """Refuses DCI without any joint step: it would draw plain images under another name.

    Args:
        times: the time steps that the sampler's steps start from.

    Raises:
        UserError: there is none.
    """
    steps, share = dci_steps(settings), settings.dci.agg_time
    if not count_joint_steps(settings, times, num_timesteps):
        raise UserError(f"with steps={steps} and agg_time={share:g} no step has two branches, so DCI would change "
                        "nothing; take more steps, a larger dci.agg_time, or dci.use=false.")
