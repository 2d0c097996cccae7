"""Tests of merging: the closed form against its optimality conditions, what merged words mean, what is refused."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Call, Run
from omegaconf import OmegaConf
from torch import Tensor

from ldm.base import base_identity
from ldm.customization.delta import AppliedConcept, Concept, load_concept
from ldm.customization.ico import PromptScheme
from ldm.customization.merge import merge, solve, with_own_words
from ldm.customization.selection import trained_parameters
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError, instantiate_from_config

WIDTH = 64      # of the text features
CAPTIONS = ["a photo of a dog in the snow", "a red car on a city street", "an oil painting of a house at sunset",
            "a cat and a teapot on a wooden table", "a robot in space"]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """The embedded model's classes with random weights, of 64 dimensions."""
    config = OmegaConf.load(ROOT / "configs/model/tiny.yaml").model
    small = {"unet_config": {"params": {"model_channels": 16, "channel_mult": [1, 2], "attention_resolutions": [2, 1],
                                        "num_head_channels": 8, "context_dim": WIDTH}},
             "cond_stage_config": {"params": {"width": WIDTH, "layers": 2, "heads": 2}}}
    config.params = OmegaConf.merge(config.params, small)
    torch.manual_seed(0)
    model = instantiate_from_config(config).eval().requires_grad_(False)
    for parameter in model.model.parameters():
        parameter.normal_(std=0.1)
    return model


def make_concept(model: LatentDiffusion, seed: int, words: tuple[str, ...] = ("<new1>", "<new2>")) -> Concept:
    """Random words, and K/V that differ from the base's."""
    rng = torch.Generator().manual_seed(seed)
    weights = {name: value + 0.1 * torch.randn(value.shape, generator=rng)
               for name, value in trained_parameters(model.model.diffusion_model, "crossattn-kv").items()}
    vectors = torch.randn(len(words), WIDTH, generator=rng)
    return Concept(dict(zip(words, vectors, strict=True)), {}, weights, (PromptScheme(words, "cat", 3, 1),),
                   base_identity(model, "small"), 520)


@pytest.fixture(scope="module")
def concepts(model: LatentDiffusion) -> list[Concept]:
    """Two concepts with the same words, of other vectors and weights."""
    return [make_concept(model, seed) for seed in (1, 2)]


def kv_names(model: LatentDiffusion) -> list[str]:
    return list(trained_parameters(model.model.diffusion_model, "crossattn-kv"))


def test_the_closed_form_is_optimal() -> None:
    """Against the linear equations of the Lagrangian, solved by numpy."""
    rng = np.random.default_rng(0)
    s, size, out, ridge = 4, 9, 3, 0.1
    c, r, wanted = rng.standard_normal((s, size)), rng.standard_normal((30, size)), rng.standard_normal((s, out))
    gram = r.T @ r
    ridged = gram + ridge * np.trace(gram) / size * np.eye(size)
    conditions = np.block([[ridged, c.T], [c, np.zeros((s, s))]])       # G x + C^T m = 0, C x = D
    expected = np.linalg.solve(conditions, np.vstack([np.zeros((size, out)), wanted]))[:size]
    found = solve(torch.from_numpy(c), {"w": torch.from_numpy(wanted)}, torch.from_numpy(gram), ridge)["w"]
    assert np.allclose(found.numpy(), expected.T, atol=1e-12)


def keys_of(model: LatentDiffusion, concept: Concept, text: str) -> dict[str, Tensor]:
    """Returns keys and values of a text's tokens, to the first end token, with a concept put into the model."""
    applied = AppliedConcept(model, concept, base_identity(model, "small"))
    encoder, unet = model.cond_stage_model, model.model.diffusion_model
    end = encoder.tokenize([text])[0].tolist().index(encoder.tokenizer.eos_token_id)
    features = encoder([text])[0, 1:end + 1]
    found = {name: features @ unet.get_parameter(name).T for name in kv_names(model)}
    applied.remove()
    return found


@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
def test_merged_words_mean_what_they_meant(model: LatentDiffusion, concepts: list[Concept], ridge: float) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = merge(model, base_identity(model, "small"), concepts, CAPTIONS, ridge)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], value) for key, value in after.items())
    assert not model.cond_stage_model.words
    assert [scheme.words for scheme in made.concept.schemes] == [("<new1>", "<new2>"), ("<new3>", "<new4>")]
    assert made.residual < 1e-8 and made.change > 0 and not made.concept.contexts
    for concept, scheme in zip(concepts, made.concept.schemes, strict=True):
        own, merged = keys_of(model, concept, concept.scheme.concept), keys_of(model, made.concept, scheme.concept)
        base = keys_of(model, dataclasses.replace(concept, weights={}), concept.scheme.concept)
        for name in own:
            learned = (own[name] - base[name]).norm()
            assert (merged[name] - own[name]).norm() < 1e-3 * learned


def test_the_order_of_concepts_changes_nothing_but_names(model: LatentDiffusion, concepts: list[Concept]) -> None:
    identity = base_identity(model, "small")
    one, other = (merge(model, identity, order, CAPTIONS).concept for order in (concepts, concepts[::-1]))
    for name, value in one.differences.items():
        assert torch.allclose(value, other.differences[name], atol=1e-5)
    assert [scheme.words for scheme in one.schemes] == [scheme.words for scheme in other.schemes]
    assert torch.equal(one.words["<new1>"], other.words["<new3>"])


def test_other_texts_change_less_with_more_captions_of_their_kind(model: LatentDiffusion,
                                                                  concepts: list[Concept]) -> None:
    """The captions' own keys move less than those of a text that none of them resembles."""
    made = merge(model, base_identity(model, "small"), concepts, CAPTIONS, 1e-6).concept
    plain = dataclasses.replace(made, differences={})
    moved = []
    for text in (CAPTIONS[0], "pencil sketch umbrella flamingo"):
        after, before = keys_of(model, made, text), keys_of(model, plain, text)
        moved.append(sum(float((after[name] - before[name]).norm() / before[name].norm()) for name in after))
    assert moved[0] < moved[1]


def test_words_get_the_next_free_name(model: LatentDiffusion) -> None:
    """Also where the next name is one of the concept's own."""
    first, second = make_concept(model, 1, ("<new1>", "<cat>")), make_concept(model, 2, ("<new2>", "<new1>"))
    renamed = with_own_words([first, second])
    assert renamed[0].scheme.words == ("<new1>", "<cat>") and renamed[1].scheme.words == ("<new2>", "<new3>")
    assert torch.equal(renamed[1].words["<new3>"], second.words["<new1>"])
    assert renamed[1].scheme.concept == "<new2> <new3> cat"


def test_a_concept_twice_is_one_and_with_other_weights_none(model: LatentDiffusion, concepts: list[Concept]) -> None:
    identity = base_identity(model, "small")
    one, twice = (merge(model, identity, some, CAPTIONS) for some in (concepts[:1], [concepts[0]] * 2))
    assert twice.targets == one.targets
    for name, value in one.concept.differences.items():
        assert torch.allclose(value, twice.concept.differences[name], atol=1e-5)
    with pytest.raises(UserError, match="have the same words and learned different things"):
        merge(model, identity, [concepts[0], dataclasses.replace(concepts[0], weights=concepts[1].weights)], CAPTIONS)


def test_words_alone_keep_the_bases_weights(model: LatentDiffusion, concepts: list[Concept]) -> None:
    words = dataclasses.replace(concepts[1], weights={})
    made = merge(model, base_identity(model, "small"), [concepts[0], words], CAPTIONS).concept
    own, merged = keys_of(model, words, words.scheme.concept), keys_of(model, made, made.schemes[1].concept)
    assert all(torch.allclose(own[name], merged[name], atol=1e-4) for name in own)


def test_what_cannot_be_merged(model: LatentDiffusion, concepts: list[Concept]) -> None:
    identity, name = base_identity(model, "small"), kv_names(model)[0]
    part = dict(list(concepts[1].weights.items())[1:])
    more = {**concepts[1].weights, "out.2.bias": torch.zeros(4)}
    for weights, message in ((part, f"changes 13 of 14 K/V weights, not {name}"), (more, "changes more than K/V")):
        with pytest.raises(UserError, match=message):
            merge(model, identity, [concepts[0], dataclasses.replace(concepts[1], weights=weights)], CAPTIONS)
    with pytest.raises(UserError, match="72 tokens .* more than the 64 dimensions"):
        merge(model, identity, [make_concept(model, seed) for seed in range(9)], CAPTIONS)
    with pytest.raises(UserError, match="there are no captions"):
        merge(model, identity, concepts, [])
    with pytest.raises(UserError, match="give more captions, or a --ridge above 0"):
        merge(model, identity, concepts, ["a cat"], 0.0)
    with pytest.raises(UserError, match="was made for the base 'small'"):
        merge(model, {"name": "other", "hash": "0", "network": "1"}, concepts, CAPTIONS)


def test_a_run_of_the_script(small_run: Run, tmp_path: Path, call_script: Call) -> None:
    one = call_script("merge", small_run.concept, "-o", tmp_path / "one.safetensors")
    assert one.status == 0 and (tmp_path / "one.safetensors").read_bytes() == small_run.concept.read_bytes()
    assert load_concept(tmp_path / "one.safetensors").step == 2
    again = call_script("merge", small_run.concept, "-o", tmp_path / "one.safetensors")
    assert again.status == 1 and "exists already" in again.err
    other = call_script("merge", small_run.concept, small_run.concept, "-o", tmp_path / "two.safetensors")
    assert other.status == 1 and "was made for the base 'small'" in other.err
    assert not (tmp_path / "two.safetensors").exists()
