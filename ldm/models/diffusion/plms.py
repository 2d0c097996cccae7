"""PLMSSampler: DDIM's steps along a multistep noise prediction (Liu et al. 2022)."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler, ddim_step
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.sampler import SamplingRecord, StepOptions
from ldm.progress import progress
from ldm.util import UserError

# Adams-Bashforth weights of orders 2, 3 and 4, newest prediction first (order 4: Liu et al. 2022, Eq 12).
WEIGHTS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def multistep_eps(history: Sequence[Tensor]) -> Tensor:
    """Combines 2 to 4 noise predictions (rows, C, h, w), newest first, into the one a step follows."""
    weights = WEIGHTS[len(history) - 2]
    return sum(weight * eps for weight, eps in zip(weights, history, strict=True))


class PLMSSampler(DDIMSampler):
    """Samples with pseudo linear multistep: S steps, S + 1 predictions of the network.

    The first step has no history and averages the predictions at its two ends. The method adds no noise.
    """

    def make_schedule(self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0,
                      verbose: bool = True) -> None:
        """Fixes the steps, DDIM's.

        Raises:
            UserError: `ddim_eta` is not 0.
        """
        if ddim_eta != 0.0:
            raise UserError(f"PLMS adds no noise, but eta is {ddim_eta}; set eta to 0 or sample with DDIM.")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def _loop(self, x: Tensor, guidance: Guidance, steps: int, record: SamplingRecord, options: StepOptions) -> Tensor:
        earlier: list[Tensor] = []                                                # newest first, at most 3
        indices = range(steps - 1, -1, -1)[: options.stop_after]
        for index in progress(indices, desc="PLMS", unit="step", quiet=not options.verbose):
            t = int(self.ddim_timesteps[index])
            t_next = int(self.ddim_timesteps[index - 1]) if index else 0          # as `ddim_alphas_prev` has it
            alphas = float(self.ddim_alphas[index]), float(self.ddim_alphas_prev[index])
            # Once a step: its second prediction, if any, is of the rows that its first one was of.
            x, *earlier = guidance.end_joint_phase(t, x, *earlier)
            x = self._keep(x, t, guidance, options)
            history = [guidance.eps(x, t), *earlier]                              # (rows, C, h, w) each
            if earlier:
                eps = multistep_eps(history)
            else:
                ahead, _ = ddim_step(x, history[0], *alphas, sigma=0.0, noise=None)
                eps = (history[0] + guidance.eps(ahead, t_next)) / 2
            x, pred_x0 = ddim_step(x, eps, *alphas, sigma=0.0, noise=None)
            earlier = history[:3]
            record.step(steps - index - 1, x, pred_x0)
        return x
