"""Tests of smaller concept files: against numpy's float64 decomposition, rules by hand and by trying all ranks."""
from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, Run
from torch import Tensor

from ldm.customization.delta import Concept, load_concept
from ldm.customization.ico import PromptScheme
from ldm.customization.low_rank import by_error, by_rank, by_share, by_size, compress, numbers_of, spectra
from ldm.util import UserError


def concept_of(differences: dict[str, Tensor], **parts: dict) -> Concept:
    return Concept({"<new1>": torch.ones(4)}, {}, parts.get("weights", {}), (PromptScheme(("<new1>",), "cat"),),
                   {"name": "", "hash": ""}, 7, {}, differences, parts.get("factors", {}))


def with_values(values: list[float], rows: int, columns: int, seed: int) -> Tensor:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, len(values))))
    return torch.from_numpy(u * np.array(values) @ v.T)


@pytest.fixture
def concept() -> Concept:
    return concept_of({"a": with_values([5.0, 3.0, 1.0, 1.0], 4, 6, 0), "b": with_values([8.0, 0.5, 0.4], 9, 3, 1)})


def product(made: Concept, name: str) -> np.ndarray:
    if name in made.differences:
        return made.differences[name].double().numpy()
    if name not in made.factors:
        return np.zeros(())
    u, v = made.factors[name]
    return u.double().numpy() @ v.double().numpy()


@pytest.mark.parametrize("rank", [1, 2])
def test_ranks_are_those_of_a_float64_decomposition(concept: Concept, rank: int) -> None:
    found = spectra(concept, {})
    made = compress(concept, found, by_rank(found, rank))
    left, whole = 0.0, 0.0
    for name, difference in concept.differences.items():
        u, s, v = np.linalg.svd(difference.numpy(), full_matrices=False)
        assert np.allclose(product(made.concept, name), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-6)
        assert made.layers[name].error == pytest.approx(math.sqrt((s[rank:]**2).sum() / (s**2).sum()))
        left, whole = left + (s[rank:]**2).sum(), whole + (s**2).sum()
    assert made.error == pytest.approx(math.sqrt(left / whole))
    assert made.concept.words is concept.words and made.concept.step == 7


@pytest.mark.parametrize(("share", "a", "b"), [(0.6, 1, 0), (0.85, 2, 0), (0.95, 3, 1), (0.0, 0, 0)])
def test_custom_diffusions_rule_stops_before_the_share_is_exceeded(concept: Concept, share: float, a: int,
                                                                   b: int) -> None:
    """Sums 5, 8, 9, 10 of 10, and 8, 8.5, 8.9 of 8.9."""
    assert by_share(spectra(concept, {}), share) == {"a": a, "b": b}


def every_choice(found: dict) -> list[tuple[int, float]]:
    """What all pairs of ranks store and leave out, the squared error; a rank that costs more than in full is none."""
    choices = []
    for ranks in itertools.product(range(5), range(4)):
        left = sum(float(s.s[rank:].square().sum()) for s, rank in zip(found.values(), ranks, strict=True))
        numbers = sum(min(rank * s.step, s.whole) for s, rank in zip(found.values(), ranks, strict=True))
        choices.append((numbers, left))
    return choices


def test_ranks_by_error_and_by_size_are_best_for_what_they_store(concept: Concept) -> None:
    """No choice that stores less leaves out less; and the bound is kept."""
    found = spectra(concept, {})
    whole = sum(float(s.s.square().sum()) for s in found.values())
    for error in (0.0, 0.02, 0.1, 0.2, 0.5, 0.9, 1.0):
        ranks = by_error(found, error)
        left = sum(float(s.s[ranks[name]:].square().sum()) for name, s in found.items())
        assert math.sqrt(left / whole) <= error + 1e-12
        assert not any(n < numbers_of(found, ranks) and e < left - 1e-12 for n, e in every_choice(found))
    for numbers in (0, 9, 12, 30, 40, 51, 1000):
        ranks = by_size(found, numbers)
        left = sum(float(s.s[ranks[name]:].square().sum()) for name, s in found.items())
        assert numbers_of(found, ranks) <= numbers
        assert not any(n <= numbers_of(found, ranks) and e < left - 1e-12 for n, e in every_choice(found))
    assert by_size(found, 0) == {"a": 0, "b": 0} and by_size(found, 1000) == {"a": 4, "b": 3}


def test_what_is_stored_in_full_is_compared_with_the_base(concept: Concept) -> None:
    base = {name: torch.ones(value.shape) for name, value in concept.differences.items()}
    whole = concept_of({}, weights={"a": (base["a"] + concept.differences["a"]).float()},
                       factors={"b": (concept.differences["b"].float(), torch.eye(3))})
    for name, spectrum in spectra(whole, base).items():
        assert torch.allclose(spectrum.s, torch.linalg.svdvals(concept.differences[name]), atol=1e-5)
    with pytest.raises(UserError, match="changes 'a', which the base does not have in this shape"):
        spectra(whole, {"a": torch.ones(2, 2)})
    with pytest.raises(UserError, match="changes no weights"):
        spectra(concept_of({}), {})
    with pytest.raises(UserError, match="'bias' is no matrix"):
        spectra(concept_of({"bias": torch.ones(3)}), {})


def test_a_run_of_the_script(small_run: Run, tmp_path: Path, call_script: Call) -> None:
    """Files are no larger than asked for, smaller ones err more, and none is overwritten."""
    sizes = ("0.03", "0.015")
    arguments = ("compress", small_run.concept, "--size", *sizes, "--outdir", tmp_path)
    done = call_script(*arguments)
    assert done.status == 0, done.err
    whole, errors = load_concept(small_run.concept), []
    for size in sizes:
        path = tmp_path / f"{small_run.concept.stem}-{size}mb.safetensors"
        assert 0.5 * float(size) < path.stat().st_size / 1e6 <= float(size)
        made = load_concept(path)
        assert made.schemes == whole.schemes and made.base == whole.base and not made.contexts
        left = sum(((value.double() - torch.from_numpy(product(made, name))) ** 2).sum()
                   for name, value in whole.differences.items())
        errors.append(float((left / sum((value.double() ** 2).sum() for value in whole.differences.values())).sqrt()))
    assert 0 < errors[0] < errors[1] < 1
    assert f"{100 * errors[0]:.2f} % of what was learned is left out" in done.out
    again = call_script(*arguments)
    assert again.status == 1 and "exists already; remove it first" in again.err


@pytest.mark.parametrize(("values", "message"), [
    (("--size", 0), "0 is out of range; give more than 0"),
    (("--error", 2), "2 is out of range; give a share, from 0 to 1"),
    (("--size", 0.0001), "too little: words and names alone take"), ((), "one of the arguments --size --error --rank")])
def test_what_no_file_can_have_is_refused(small_run: Run, call_script: Call, values: tuple, message: str) -> None:
    done = call_script("compress", small_run.concept, *values)
    assert done.status != 0 and message in done.err
