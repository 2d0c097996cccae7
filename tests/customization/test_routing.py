"""Tests of concept files side by side: whose weights each token meets, what others change, that nothing stays."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, Run, SmallWorld
from torch import Tensor

from ldm.customization.delta import Concept, load_concept
from ldm.customization.ico import PromptScheme
from ldm.customization.selection import trained_parameters
from ldm.pipeline import Generator
from ldm.requests import ImageRequest
from ldm.sheets import read_settings
from ldm.util import UserError

BOTH, CAT = "a {} beside a <new3> <new4> dog", "a <new1> <new2> cat in the snow"


@pytest.fixture(scope="module")
def cat(small_run: Run) -> Concept:
    """What the small model learned, made stronger."""
    concept = load_concept(small_run.concept)
    stronger = {name: 50 * value for name, value in concept.differences.items()}
    return dataclasses.replace(concept, differences=stronger)


@pytest.fixture(scope="module")
def dog(cat: Concept) -> Concept:
    """Another concept, with the same names for its words."""
    rng = torch.Generator().manual_seed(3)
    words = {name: torch.randn(value.shape, generator=rng) * value.std() for name, value in cat.words.items()}
    differences = {name: torch.randn(value.shape, generator=rng) * value.std()
                   for name, value in cat.differences.items()}
    return dataclasses.replace(cat, words=words, differences=differences,
                               schemes=(PromptScheme(("<new1>", "<new2>"), "dog"),))


@pytest.fixture
def generator(small_world: SmallWorld) -> Generator:
    return Generator(*small_world.build())


def draw(generator: Generator, world: SmallWorld, prompt: str, strength: float | None = None) -> Tensor:
    """Returns the latents of one image."""
    return generator.latents([ImageRequest(prompt, 5, strength)], world.sample_config("steps=2"))


@pytest.mark.parametrize("padding", ["base", "concepts"])
def test_every_token_meets_the_weights_of_its_owner(generator: Generator, cat: Concept, dog: Concept,
                                                    padding: str) -> None:
    """Keys of a layer, against each weight applied to its tokens alone."""
    name = next(name for name in cat.differences if name.endswith("to_k.weight"))
    layer = generator.model.model.diffusion_model.get_submodule(name.removesuffix(".weight"))
    base = layer.weight.detach().clone()
    generator.load(cat, dog, padding=padding)
    assert [scheme.words for scheme in generator.concept.schemes] == [("<new1>", "<new2>"), ("<new3>", "<new4>")]
    text = generator.prompts.texts([BOTH])[0]
    encoder = generator.model.cond_stage_model
    features = encoder([text])[0]                                                      # (T, D)
    keys = layer(generator._encode([text])[0])                                         # (T, out)
    weights = {"base": base, "cat": base + cat.differences[name], "dog": base + dog.differences[name]}
    ids = encoder.content_ids(text)
    first, second = len(encoder.content_ids("a")), len(encoder.content_ids("a <new1> <new2> cat beside a"))
    owners = ["base"] * len(features)
    for start, concept, owner in ((first, "<new1> <new2> cat", "cat"), (second, "<new3> <new4> dog", "dog")):
        for place in range(len(encoder.content_ids(concept))):
            owners[1 + start + place] = owner
    if padding == "concepts":
        weights["mean"] = (weights["cat"] + weights["dog"]) / 2
        owners[1 + len(ids):] = ["mean"] * (len(features) - len(ids) - 1)
    expected = torch.stack([feature @ weights[owner].T for feature, owner in zip(features, owners, strict=True)])
    assert owners.count("cat") >= 3 and owners.count("dog") >= 3
    assert torch.allclose(keys, expected, atol=1e-5 * float(keys.abs().max()))


@pytest.mark.parametrize("strength", [None, 0.5])
def test_others_beside_it_change_no_concept(generator: Generator, small_world: SmallWorld, cat: Concept, dog: Concept,
                                            strength: float | None) -> None:
    twin = dataclasses.replace(dog, words={name: 2 * value for name, value in dog.words.items()})
    found = []
    for others in ((dog,), (twin,), (dog, twin)):
        generator.load(cat, *others)
        found.append(draw(generator, small_world, CAT, strength))
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[0], found[2], atol=1e-4)
    generator.load(cat)
    assert (draw(generator, small_world, CAT, strength) - found[0]).abs().max() > 1e-3      # the rest is the base's


def test_the_order_of_files_changes_nothing(generator: Generator, small_world: SmallWorld, cat: Concept,
                                            dog: Concept) -> None:
    found = []
    for files, prompt in (((cat, dog), BOTH), ((dog, cat), "a <new3> <new4> cat beside a {}")):
        generator.load(*files)
        found.append(draw(generator, small_world, prompt, 0.5))
    assert torch.allclose(*found, atol=1e-4)


def test_concepts_that_learned_no_weights_are_the_base_with_words(generator: Generator, small_world: SmallWorld,
                                                                 cat: Concept, dog: Concept) -> None:
    still = [dataclasses.replace(concept, differences={name: 0 * value for name, value in concept.differences.items()})
             for concept in (cat, dog)]
    generator.load(*still)
    routed = draw(generator, small_world, CAT)
    generator.load(still[0])
    assert torch.allclose(draw(generator, small_world, CAT), routed, atol=1e-4)
    embeddings = [dataclasses.replace(concept, differences={}) for concept in (cat, dog)]
    generator.load(*embeddings)
    beside = draw(generator, small_world, CAT)
    generator.load(embeddings[0])
    assert torch.equal(draw(generator, small_world, CAT), beside)


def test_taking_them_off_leaves_the_base_to_the_bit(generator: Generator, small_world: SmallWorld, cat: Concept,
                                                    dog: Concept) -> None:
    before = {name: value.clone() for name, value in generator.model.state_dict().items()}
    plain = draw(generator, small_world, "a cat")
    generator.load(cat, dog)
    draw(generator, small_world, BOTH)
    generator.load(None)
    after = generator.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(draw(generator, small_world, "a cat"), plain) and generator.concept is None
    assert not generator.model.cond_stage_model.words


def test_what_is_more_than_keys_and_values_is_refused_and_changes_nothing(generator: Generator, cat: Concept,
                                                                         dog: Concept) -> None:
    network = generator.model.model.diffusion_model
    query = next(iter(trained_parameters(network, "crossattn-kv"))).replace("to_k", "to_q")
    shape = network.get_parameter(query).shape
    whole = dataclasses.replace(dog, differences={**dog.differences, query: torch.ones(shape)})
    before = {name: value.clone() for name, value in generator.model.state_dict().items()}
    with pytest.raises(UserError, match="changes more than K/V .*not kept apart from other concepts"):
        generator.load(cat, whole)
    with pytest.raises(UserError, match="was made for the base 'other'"):
        generator.load(cat, dataclasses.replace(dog, base={"name": "other", "hash": "0", "network": "0"}))
    after = generator.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert generator.concept is None and not generator.model.cond_stage_model.words


def test_images_say_which_concepts_they_show(generator: Generator, small_world: SmallWorld, cat: Concept,
                                             dog: Concept) -> None:
    generator.load(cat, dog)
    plain, joint = generator.generate([BOTH], small_world.sample_config("steps=2"))
    assert [concept["class_noun"] for concept in joint.settings["concepts"]] == ["cat", "dog"]
    assert joint.settings["text"] == "a <new1> <new2> cat beside a <new3> <new4> dog"
    assert joint.settings["auxiliary_text"] == "a man beside a car"
    assert not np.array_equal(np.asarray(plain.image), np.asarray(joint.image))
    assert joint.settings["padding"] == "concepts"


def test_two_files_on_the_command_line(call_script: Call, small_world: SmallWorld, small_run: Run,
                                       tmp_path: Path) -> None:
    """The same file twice: the second one's words get names of their own."""
    files = ["-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, small_run.concept]
    prompt = "a {} beside a <new3> <new4> cat in the snow"
    outcome = call_script("sample", *files, "steps=2", "padding=base", "--prompt", prompt, "--outdir", tmp_path)
    assert outcome.status == 0 and "auxiliary noun: dog, man" in outcome.out
    assert "in prompts: <new1> <new2> cat\n" in outcome.out and "in prompts: <new3> <new4> cat\n" in outcome.out
    (image,) = (tmp_path / "samples").glob("*lambda*.png")
    settings = read_settings(image)
    assert settings["text"] == "a <new1> <new2> cat beside a <new3> <new4> cat in the snow"
    assert settings["auxiliary_text"] == "a dog beside a man in the snow" and settings["padding"] == "base"
    tokens = call_script("sample", *files, "--prompt", prompt, "--show_tokens")
    assert tokens.status == 0 and "<new3>" in tokens.out
    for more, message in ((["--class_noun", "cat"], "class noun 'cat' is not needed"),
                          (["--modifier_token", "<new1>"], "names the words of one file")):
        assert message in call_script("sample", *files, "--prompt", prompt, *more).error
