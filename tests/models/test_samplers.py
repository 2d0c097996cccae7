"""Tests of the samplers: against diffusers' schedulers, and on Gaussian data, where all has a closed form."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.sampler import dpm_timesteps
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps, schedule_buffers
from ldm.util import UserError

SAMPLERS = [DDIMSampler, PLMSSampler, DPMSolverSampler]
SHAPE = (4, 8, 8)
SD_SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


class GaussianModel:
    """Predicts the noise of data N(mean, std^2) exactly; every value on its own, so a row knows no other row."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std                                      # (C, h, w) each
        self.alphas_cumprod = schedule_buffers()["alphas_cumprod"]
        self.alphas = self.alphas_cumprod.double()
        self.calls: list[float] = []
        self.states: list[Tensor] = []
        self.noises: list[Tensor] = []

    def alpha(self, t: float) -> Tensor:
        """Returns alpha-bar, between time steps that of the neighbours' mean logarithm."""
        low = min(int(t), self.num_timesteps - 2)
        return (self.alphas[low].log() * (low + 1 - t) + self.alphas[low + 1].log() * (t - low)).exp()

    def marginal(self, t: float) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of x_t."""
        alpha = self.alpha(t)
        return alpha.sqrt() * self.mean, (alpha * self.std**2 + 1.0 - alpha).sqrt()

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert t.shape == (len(x),) and (t == t[0]).all()
        self.calls.append(t[0].item())
        self.states.append(x)
        mean, std = self.marginal(t[0].item())
        return ((1.0 - self.alpha(t[0].item())).sqrt() / std**2 * (x - mean)).to(x.dtype)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noises without chance, with 1 everywhere; what it was given is kept."""
        self.noises.append(noise)
        alpha = self.alphas[t].reshape(-1, 1, 1, 1).to(x_start.dtype)
        return alpha.sqrt() * x_start + (1.0 - alpha).sqrt()

    def flow(self, x: Tensor, source: float, target: float) -> Tensor:
        """Carries x along the probability flow: the quantile of each value stays what it is."""
        (mean, std), (target_mean, target_std) = self.marginal(source), self.marginal(target)
        return target_mean + target_std * (x - mean) / std


@pytest.fixture
def model() -> GaussianModel:
    rng = torch.Generator().manual_seed(0)
    mean, std = torch.randn(SHAPE, generator=rng), torch.rand(SHAPE, generator=rng) + 0.2
    return GaussianModel(mean.double(), std.double())


def points(value: float | Tensor) -> GaussianModel:
    """A model of data that is one point: its predicted noise is constant along every trajectory."""
    return GaussianModel(torch.as_tensor(value).double().expand(SHAPE), torch.zeros(SHAPE).double())


def noise(rows: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(sampler: type[Sampler], model: GaussianModel, steps: int, rows: int = 2, **options: Any) -> Tensor:
    return sampler(model).sample(steps, rows, SHAPE, verbose=False, **options)[0]


# ---- against diffusers ----

def scheduler_states(scheduler: Any, model: GaussianModel, steps: int, x: Tensor) -> list[Tensor]:
    """Runs diffusers' loop and returns the state after each call of the model."""
    scheduler.set_timesteps(steps)
    states = []
    for t in scheduler.timesteps:
        eps = model.apply_model(x, t.expand(len(x)), None)
        x = scheduler.step(eps, t, x).prev_sample
        states.append(x)
    return states


def ddim_reference(model: GaussianModel, steps: int, x: Tensor) -> list[Tensor]:
    scheduler = DDIMScheduler(**SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              timestep_spacing="leading")
    return scheduler_states(scheduler, model, steps, x)


def plms_reference(model: GaussianModel, steps: int, x: Tensor) -> list[Tensor]:
    scheduler = PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
                              timestep_spacing="leading")
    # diffusers lists the second time step twice: its first call only looks ahead, its second redoes the first step
    return scheduler_states(scheduler, model, steps, x)[1:]


def dpm_reference(model: GaussianModel, steps: int, x: Tensor) -> list[Tensor]:
    scheduler = DPMSolverMultistepScheduler(
        **SD_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True,
        timestep_spacing="linspace", final_sigmas_type="sigma_min")
    return scheduler_states(scheduler, model, steps, x)


# DDIM and PLMS coincide with diffusers where S divides 1000 (elsewhere diffusers cuts the stride down to a whole
# number and starts below the noisiest steps), except PLMS with S = 1, for which diffusers takes a DDIM step; DPM-Solver
# where S divides 999 (elsewhere diffusers rounds the time steps).
@pytest.mark.parametrize("sampler, reference, steps", [
    *((DDIMSampler, ddim_reference, steps) for steps in (1, 2, 5, 20, 50, 200)),
    *((PLMSSampler, plms_reference, steps) for steps in (2, 4, 5, 20, 50, 200)),
    *((DPMSolverSampler, dpm_reference, steps) for steps in (1, 3, 9, 27, 37, 111)),
])
def test_trajectory_is_that_of_diffusers(model: GaussianModel, sampler: type[Sampler],
                                         reference: Callable[[GaussianModel, int, Tensor], list[Tensor]],
                                         steps: int) -> None:
    x = noise(2, dtype=torch.float32)
    _, intermediates = sampler(model).sample(steps, 2, SHAPE, x_T=x, log_every_t=1, verbose=False)
    called = list(model.calls)
    model.calls.clear()
    expected = reference(model, steps, x)
    assert called == model.calls
    ours = intermediates["x_inter"][1:]
    assert len(ours) == len(expected) == steps
    for state, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(state, other, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("steps", [2, 10, 14, 15, 20, 50])
def test_dpm_solver_between_time_steps_is_algorithm_2(model: GaussianModel, steps: int) -> None:
    """Lu et al. 2022, Algorithm 2, in continuous time from 1 to 1/N; log alpha-bar is linear between (n+1)/N."""
    times = np.linspace(1.0, 1e-3, steps + 1)
    log_alpha = np.interp(times, np.arange(1, 1001) / 1000, 0.5 * np.log(model.alphas.numpy()))
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    h = np.diff(np.log(alpha / sigma))                                       # h_i goes from t_{i-1} to t_i
    x = noise(2)
    expected, data = x, []
    for i in range(1, steps + 1):
        t = torch.full((2,), 1000 * (times[i - 1] - 1e-3), dtype=torch.float64)
        data.append((expected - sigma[i - 1] * model.apply_model(expected, t, None)) / alpha[i - 1])
        direction = data[-1]
        if len(data) > 1 and not (steps < 15 and i == steps):
            r = h[i - 2] / h[i - 1]
            direction = (1 + 1 / (2 * r)) * data[-1] - 1 / (2 * r) * data[-2]
        expected = sigma[i] / sigma[i - 1] * expected - alpha[i] * np.expm1(-h[i - 1]) * direction
    called, model.calls[:] = list(model.calls), []
    torch.testing.assert_close(sample(DPMSolverSampler, model, steps, x_T=x), expected, rtol=1e-5, atol=1e-5)
    assert model.calls == pytest.approx(called, abs=1e-4)
    if steps == 10:
        assert called == pytest.approx([999, 899.1, 799.2, 699.3, 599.4, 499.5, 399.6, 299.7, 199.8, 99.9])


def test_plms_with_one_step_looks_ahead_to_time_step_0(model: GaussianModel) -> None:
    x = noise(2)
    found = sample(PLMSSampler, model, 1, x_T=x)
    assert model.calls == [1, 0]
    exact = model.flow(x, 1, 0)
    assert (found - exact).abs().mean() < 0.1 * (sample(DDIMSampler, model, 1, x_T=x) - exact).abs().mean()


# ---- against the probability flow ----

@pytest.mark.parametrize("sampler, steps, order", [
    (DDIMSampler, 100, 1), (DDIMSampler, 250, 1), (PLMSSampler, 50, 2), (DPMSolverSampler, 300, 2)])
def test_error_falls_with_the_order_of_the_method(model: GaussianModel, sampler: type[Sampler], steps: int,
                                                  order: int) -> None:
    x = noise(2)

    def error(steps: int) -> float:
        model.calls.clear()
        found = sample(sampler, model, steps, x_T=x)
        return float((found - model.flow(x, model.calls[0], 0)).abs().mean())

    coarse, fine = error(steps), error(2 * steps)
    assert fine < coarse / 2 ** (order - 0.25)
    assert fine < {1: 0.02, 2: 0.005}[order]


def test_ddim_with_all_steps_maps_noise_to_the_known_data(model: GaussianModel) -> None:
    x = noise(2)
    exact = model.flow(x, 999, 0)
    torch.testing.assert_close(sample(DDIMSampler, model, 1000, x_T=x), exact, rtol=0, atol=0.02)
    assert model.calls == list(range(999, -1, -1))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 17, 333])
def test_data_of_one_point_is_found_exactly_in_any_number_of_steps(sampler: type[Sampler], steps: int) -> None:
    model, x = points(0.7), noise(2)
    found = sample(sampler, model, steps, x_T=x)
    tolerance = 1e-9 if sampler is not DPMSolverSampler else 1e-6        # times between steps come in float32
    torch.testing.assert_close(found, model.flow(x, model.calls[0], 0), rtol=tolerance, atol=tolerance)


# ---- the number of steps ----

def test_ddim_takes_exactly_as_many_steps_as_asked() -> None:
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(steps)
        assert timesteps.shape == (steps,)
        assert (np.diff(timesteps) > 0).all()
        assert timesteps[0] >= 0 and timesteps[-1] <= 999
        assert set(np.diff(timesteps)) <= {1000 // steps, -(-1000 // steps)}      # even but for rounding,
        assert timesteps[-1] > 999 - 1000 / steps                                 # and up to the noisiest step
        if 1000 % steps == 0 and steps < 1000:
            assert timesteps.tolist() == list(range(1, 1001, 1000 // steps))
    assert ddim_timesteps(1000).tolist() == list(range(1000))


def test_dpm_solver_goes_from_the_last_time_step_to_the_first() -> None:
    for steps in range(1, 1000):
        timesteps = dpm_timesteps(steps)
        assert timesteps.shape == (steps + 1,)
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[0] == 999 and timesteps[-1] == 0


@pytest.mark.parametrize("sampler, steps", [(DDIMSampler, 0), (DDIMSampler, 1001), (PLMSSampler, 0),
                                            (PLMSSampler, 1001), (DPMSolverSampler, 0), (DPMSolverSampler, 1000)])
def test_impossible_number_of_steps_is_refused(model: GaussianModel, sampler: type[Sampler], steps: int) -> None:
    with pytest.raises(UserError, match="steps"):
        sample(sampler, model, steps)


@pytest.mark.parametrize("sampler, extra", [(DDIMSampler, 0), (PLMSSampler, 1), (DPMSolverSampler, 0)])
@pytest.mark.parametrize("steps", [1, 7, 30, 300])
def test_callbacks_and_predictions_are_counted(model: GaussianModel, sampler: type[Sampler], extra: int,
                                               steps: int) -> None:
    numbers: list[int] = []
    shown: list[tuple[torch.Size, int]] = []
    sample(sampler, model, steps, callback=numbers.append,
           img_callback=lambda image, number: shown.append((image.shape, number)))
    assert numbers == list(range(steps))
    assert shown == [((2, *SHAPE), number) for number in range(steps)]
    assert len(model.calls) == steps + extra


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_intermediates_are_recorded(model: GaussianModel, sampler: type[Sampler]) -> None:
    x = noise(2)
    found, few = sampler(model).sample(10, 2, SHAPE, x_T=x, log_every_t=4, verbose=False)
    assert set(few) == {"x_inter", "pred_x0"}
    _, every = sampler(model).sample(10, 2, SHAPE, x_T=x, log_every_t=1, verbose=False)
    kept = [0, 1, 2, 6, 10]                        # the start, the first step, and those with 8, 4, 0 steps to go
    for name, states in few.items():
        assert len(every[name]) == 11
        assert len(states) == len(kept)
        assert all(torch.equal(state, every[name][number]) for state, number in zip(states, kept, strict=True))
    assert torch.equal(few["x_inter"][0], x) and torch.equal(few["x_inter"][-1], found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stopped_early_a_run_returns_what_its_last_step_predicts(model: GaussianModel, sampler: type[Sampler]) -> None:
    x = noise(2)
    _, every = sampler(model).sample(10, 2, SHAPE, x_T=x, log_every_t=1, verbose=False)
    model.calls.clear()
    found, _ = sampler(model).sample(10, 2, SHAPE, x_T=x, stop_after=4, verbose=False)
    assert torch.equal(found, every["pred_x0"][4])
    assert len(model.calls) == 4 + (sampler is PLMSSampler)      # whose first step takes two


# ---- noise ----

def test_variance_of_eta_one_is_the_posterior_variance_of_ddpm() -> None:
    buffers = schedule_buffers()
    sigmas, alphas, previous = ddim_parameters(buffers["alphas_cumprod"].double().numpy(), np.arange(1000), 1.0)
    np.testing.assert_allclose(sigmas[1:] ** 2, buffers["posterior_variance"].numpy()[1:], rtol=5e-3)
    assert sigmas[0] == 0.0
    assert previous[0] == alphas[0] and (previous[1:] == alphas[:-1]).all()


@pytest.mark.parametrize("eta, temperature", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_one_stochastic_step_has_the_mean_and_variance_of_the_formula(eta: float, temperature: float) -> None:
    rows, steps, data, start = 200, 10, 0.7, 1.3
    model = points(data)
    x = torch.full((rows, *SHAPE), start).double()
    torch.manual_seed(3)
    _, intermediates = DDIMSampler(model).sample(steps, rows, SHAPE, x_T=x, eta=eta, temperature=temperature,
                                                 log_every_t=1, verbose=False)
    after = intermediates["x_inter"][1]                                      # 51,200 draws of one number
    alpha, previous = float(model.alphas[901]), float(model.alphas[801])
    beta = 1 - alpha / previous
    variance = eta**2 * beta * (1 - previous) / (1 - alpha)                  # eta 1: DDPM's posterior variance
    if eta == 1.0:                                                      # DDPM's posterior mean (Ho et al. Eq 7)
        mean = (previous**0.5 * beta * data + (alpha / previous) ** 0.5 * (1 - previous) * start) / (1 - alpha)
    else:
        eps = (start - alpha**0.5 * data) / (1 - alpha) ** 0.5
        mean = previous**0.5 * data + (1 - previous - variance) ** 0.5 * eps
    assert float(after.mean()) == pytest.approx(mean, abs=5 * (variance / after.numel()) ** 0.5)
    assert float(after.var()) == pytest.approx(temperature**2 * variance, rel=0.04)


@pytest.mark.parametrize("sampler, eta", [(DDIMSampler, 0.0), (DDIMSampler, 1.0), (PLMSSampler, 0.0),
                                          (DPMSolverSampler, 0.0)])
def test_a_row_is_the_same_in_any_batch(model: GaussianModel, sampler: type[Sampler], eta: float) -> None:
    torch.manual_seed(5)
    together = sample(sampler, model, 8, 4, eta=eta, generators=generators(10, 11, 12, 13))
    torch.manual_seed(6)
    pair = sample(sampler, model, 8, 2, eta=eta, generators=generators(12, 10))
    assert torch.equal(pair, together[[2, 0]])
    for row in range(4):
        alone = sample(sampler, model, 8, 1, eta=eta, generators=generators(10 + row))
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_global_seed_decides_without_generators(model: GaussianModel) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(sample(DDIMSampler, model, 5, eta=1.0))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# ---- image to image, inpainting ----

@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
@pytest.mark.parametrize("index", [0, 12, 49])
def test_encode_and_decode_are_inverse(sampler: type[DDIMSampler], index: int) -> None:
    image, eps = noise(1, seed=7), noise(1, seed=8)
    model = points(image[0])                                               # its data is this image
    tool = sampler(model)
    tool.make_schedule(50)
    encoded = tool.stochastic_encode(image, torch.tensor([index]), noise=eps)
    alpha = model.alphas[1 + 20 * index]
    torch.testing.assert_close(encoded, alpha.sqrt() * image + (1 - alpha).sqrt() * eps, rtol=1e-6, atol=1e-6)
    decoded = tool.decode(encoded, None, index + 1)
    last = model.alphas[0]
    expected = last.sqrt() * image + (1 - last).sqrt() * eps
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_encode_and_decode_with_the_original_steps() -> None:
    image, eps = noise(1, seed=7), noise(1, seed=8)
    model = points(image[0])
    tool = DDIMSampler(model)
    encoded = tool.stochastic_encode(image, torch.tensor([300]), use_original_steps=True, noise=eps)
    decoded = tool.decode(encoded, None, 301, use_original_steps=True)
    last = model.alphas[0]
    torch.testing.assert_close(decoded, last.sqrt() * image + (1 - last).sqrt() * eps, rtol=1e-4, atol=1e-4)
    assert model.calls == list(range(300, -1, -1))


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_masked_part_is_the_given_image(model: GaussianModel, sampler: type[Sampler]) -> None:
    image, x = noise(2, seed=9), noise(2)
    mask = torch.zeros(2, 1, 8, 8).double()
    mask[..., :4] = 1.0                                                      # the left half is kept
    free = sample(sampler, model, 50, x_T=x)
    model.states.clear()
    model.calls.clear()
    found = sample(sampler, model, 50, x_T=x, mask=mask, x0=image)
    for number, (t, state) in enumerate(zip(model.calls, model.states, strict=True)):
        if sampler is PLMSSampler and number == 1:
            continue                                                         # looks ahead, from a state of no step
        known = model.q_sample(image, torch.full((2,), t), torch.ones_like(image))
        assert torch.equal(state[..., :4], known[..., :4])
    assert torch.equal(found[..., 4:], free[..., 4:])                        # the model looks at each value alone
    if sampler is PLMSSampler:
        return                                                               # its last step looks back
    # one last DDIM step from t = 1, where the noise is 1, carries the image to the least noise there is
    alpha, last = model.alphas[1], model.alphas[0]
    known = alpha.sqrt() * image + (1 - alpha).sqrt()
    mean, std = model.marginal(1)
    eps = (1 - alpha).sqrt() / std**2 * (known - mean)
    expected = last.sqrt() * (known - (1 - alpha).sqrt() * eps) / alpha.sqrt() + (1 - last).sqrt() * eps
    torch.testing.assert_close(found[..., :4], expected[..., :4], rtol=1e-9, atol=1e-9)


def test_masked_part_is_noised_by_each_rows_own_generator(model: GaussianModel) -> None:
    image, mask = noise(3, seed=9), torch.ones(1, 1, 8, 8).double()

    def noises(rows: list[int]) -> Tensor:
        model.noises.clear()
        generators = [torch.Generator().manual_seed(row) for row in rows]
        sample(DDIMSampler, model, 5, len(rows), generators=generators, mask=mask, x0=image[rows])
        return torch.stack(model.noises)                                     # (steps, rows, C, h, w)

    assert torch.equal(noises([0, 1, 2])[:, 1], noises([1])[:, 0])


@pytest.mark.parametrize("sampler, options", [
    (PLMSSampler, {"eta": 0.5}), (DPMSolverSampler, {"eta": 0.5}), (DPMSolverSampler, {"x0": noise(2)}),
    (DPMSolverSampler, {"mask": torch.ones(2, 1, 8, 8), "x0": noise(2)})])
def test_what_only_ddim_can_do_is_refused(model: GaussianModel, sampler: type[Sampler],
                                          options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="DDIM"):
        sample(sampler, model, 5, **options)
    assert not model.calls


@pytest.mark.parametrize("steps", [50, 1000])
def test_inversion_is_undone_by_decoding(model: GaussianModel, steps: int) -> None:
    """DDIM's inverse follows the probability flow upwards; `decode` comes back, the nearer the smaller the steps."""
    image, tool = model.flow(noise(2, seed=7), 999, 0), DDIMSampler(model)     # a draw of the model's data
    tool.make_schedule(steps)
    up, numbers = steps * 6 // 10, []
    encoded, record = tool.encode(image, None, up, return_intermediates=3, callback=numbers.append)
    assert numbers == list(range(up)) and model.calls == tool.ddim_timesteps[:up].tolist()
    assert record["x_encoded"] is encoded is record["intermediates"][-1]
    assert record["intermediate_steps"] == [0, up // 3, 2 * (up // 3), up - 2, up - 1]
    exact = model.flow(image, 0, int(tool.ddim_timesteps[up - 1]))
    back = tool.decode(encoded, None, up)
    assert (encoded - exact).abs().mean() < 3.0 / steps and (back - image).abs().mean() < 3.0 / steps


def test_a_step_of_a_clients_own_loop_is_samples_step(model: GaussianModel) -> None:
    x, tool = noise(2, dtype=torch.float32), DDIMSampler(model)
    torch.manual_seed(4)
    expected, states = tool.sample(10, 2, SHAPE, None, x_T=x, eta=1.0, noise_dropout=0.3, log_every_t=1, verbose=False)
    torch.manual_seed(4)
    found = x
    for index in range(9, -1, -1):
        t = torch.full((2,), int(tool.ddim_timesteps[index]))
        found, pred_x0 = tool.p_sample_ddim(found, None, t, index, noise_dropout=0.3)
    assert torch.equal(found, expected) and torch.equal(pred_x0, states["pred_x0"][-1])
    torch.manual_seed(4)
    assert torch.equal(tool.ddim_sampling(None, (2, *SHAPE), x_T=x, noise_dropout=0.3, verbose=False)[0], expected)
    plain = sample(DDIMSampler, model, 10, x_T=x, eta=1.0)
    assert not torch.equal(plain, expected)


def test_plms_makes_its_schedule_as_compvis_scripts_ask_for_it(model: GaussianModel) -> None:
    sampler = PLMSSampler(model)
    sampler.make_schedule(ddim_num_steps=50, ddim_discretize="uniform", ddim_eta=0.0, verbose=False)
    assert sampler.ddim_timesteps.tolist() == list(range(1, 1000, 20))
    with pytest.raises(UserError, match="eta"):
        sampler.make_schedule(ddim_num_steps=50, ddim_eta=1.0)
