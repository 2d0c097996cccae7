"""Tests of the Generator: switches that change nothing, batches that do not matter, options, images' settings."""
from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallWorld, contents
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm import sheets
from ldm.config import SampleConfig
from ldm.config_files import merge
from ldm.customization.delta import load_concept
from ldm.customization.ico import PromptScheme
from ldm.customization.tokens import TokenSets
from ldm.device import choose_device
from ldm.modules.attention import SpatialTransformer
from ldm.pipeline import Generator
from ldm.requests import ImageRequest as Request
from ldm.requests import cost_matched_steps
from ldm.sampling import sample_run
from ldm.sheets import FONT, cell_side, font, mask_panel, read_settings, readable, save_png, sheet, wrap
from ldm.training.run import Run
from ldm.util import UserError

PROMPT = "a {} in the snow"
RUNS = [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("dpm_solver", 0.0)]


@pytest.fixture(scope="module")
def small_generator(small_world: SmallWorld, small_run: Run) -> Generator:
    """The small model with the small run's concept in it."""
    generator = Generator(*small_world.build())
    generator.load(load_concept(small_run.concept))
    return generator


def draw(generator: Generator, settings: DictConfig, *rows: Request) -> Tensor:
    return generator.latents(rows, settings)


def gap(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((first - second).abs().max() / first.abs().max())


def images(generator: Generator, settings: DictConfig, prompts: Sequence[str] = (PROMPT,)) -> dict[Request, np.ndarray]:
    return {sample.request: np.asarray(sample.image).astype(int) for sample in generator.generate(prompts, settings)}


# Switches.

@pytest.mark.parametrize(("sampler", "eta"), RUNS)
def test_dci_off_is_plain_sampling_bit_for_bit(small_world: SmallWorld, small_generator: Generator, sampler: str,
                                               eta: float) -> None:
    def config(*overrides: str) -> DictConfig:
        return small_world.sample_config(f"sampler={sampler}", f"eta={eta}", *overrides)

    plain, joint = Request(PROMPT, 5, None), Request(PROMPT, 5, 1.0)
    expected = draw(small_generator, config(), plain)
    assert expected.isfinite().all()
    assert torch.equal(draw(small_generator, config("dci.agg_time=0"), joint), expected)
    assert gap(draw(small_generator, config(), joint), expected) > 1e-3
    rows = small_generator.requests([PROMPT], config("dci.use=false"))
    assert rows == [plain]
    assert torch.equal(draw(small_generator, config("dci.use=false"), *rows), expected)


def test_a_very_negative_strength_is_plain_sampling(small_world: SmallWorld, small_generator: Generator) -> None:
    """M^a -> 0 as lambda -> -inf; at 8 x 8 pixels the smallest logit is far below float32's resolution of 1."""
    config = small_world.sample_config("dci.mask_sum=1.0e+6")
    assert gap(draw(small_generator, config, Request(PROMPT, 5, -50.0)),
               draw(small_generator, config, Request(PROMPT, 5, None))) < 1e-5


def test_plan_lists_images_in_order(small_world: SmallWorld, small_generator: Generator) -> None:
    config = small_world.sample_config("n_samples=2", "seed=9", "dci.agg_lambda=[0.0,1.5]")
    assert small_generator.requests([PROMPT, "{}"], config) == [
        Request(prompt, seed, strength)
        for prompt in (PROMPT, "{}") for seed in (9, 10) for strength in (None, 0.0, 1.5)]
    without_plain = small_world.sample_config("plain=false")
    assert small_generator.requests([PROMPT], without_plain) == [Request(PROMPT, 5, 1.0)]


def test_braces_stand_for_the_concept(small_world: SmallWorld, small_generator: Generator) -> None:
    config = small_world.sample_config()
    spelled = PROMPT.replace("{}", "<new1> <new2> cat")
    assert small_generator.prompts.texts([PROMPT, spelled]) == [spelled, spelled]
    for strength in (None, 1.0):
        assert torch.equal(draw(small_generator, config, Request(PROMPT, 5, strength)),
                           draw(small_generator, config, Request(spelled, 5, strength)))


@pytest.mark.parametrize("override", ["dci.use=true", "dci.use=false", "dci.ablation=no_full_prompt"])
def test_a_concept_that_is_cut_off_is_told_before_anything_is_drawn(small_world: SmallWorld,
                                                                    small_generator: Generator, override: str) -> None:
    config = small_world.sample_config(override)
    late = "red " * 73 + "{}"                # three tokens, of which two fit
    small_generator.requests([PROMPT, late.removeprefix("red ")], config)
    message = "the concept '<new1> <new2> cat' is cut off: it ends at token 76 and 75 fit"
    with warnings.catch_warnings(), pytest.raises(UserError, match=message):
        warnings.simplefilter("error")       # one sentence is enough
        small_generator.requests([PROMPT, late], config)


def test_an_auxiliary_noun_that_is_cut_off_is_told(small_world: SmallWorld, small_generator: Generator) -> None:
    config = small_world.sample_config("dci.replace_noun='old red dog house'")
    with pytest.raises(UserError, match="the auxiliary noun 'old red dog house' is cut off: it ends at token 76"):
        small_generator.requests([PROMPT, "red " * 72 + "{}"], config)


def test_the_class_said_twice_is_warned_of(small_world: SmallWorld, small_generator: Generator) -> None:
    with pytest.warns(UserWarning, match="^the prompt 'my cat {}' says 'cat' beside the concept") as told:
        small_generator.requests([PROMPT, "my cat {}"], small_world.sample_config("dci.use=false"))
    assert len(told) == 1


# Several concepts in one file.

@pytest.fixture(scope="module")
def joint_generator(small_world: SmallWorld, small_run: Run) -> Generator:
    """The small model with a file of two concepts in it, a cat and a dog."""
    one = load_concept(small_run.concept)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(7)) * one.words["<new1>"].std()
    generator = Generator(*small_world.build())
    generator.load(dataclasses.replace(one, words={**one.words, "<new3>": vectors[0], "<new4>": vectors[1]},
                                       schemes=(*one.schemes, PromptScheme(("<new3>", "<new4>"), "dog", index=1))))
    return generator


def named(generator: Generator, sets: TokenSets) -> list[list[str]]:
    """Returns each prompt's tokens of the noun phrase."""
    embedder = generator.model.cond_stage_model
    return [[token.removesuffix("</w>") for token in embedder.tokenizer.convert_ids_to_tokens(ids[mask].tolist())]
            for ids, mask in zip(embedder.tokenize(sets.prompts), sets.named, strict=True)]


def test_every_prompt_has_the_concept_it_names(small_world: SmallWorld, joint_generator: Generator) -> None:
    """Where it names two, both have DCI."""
    prompts = [PROMPT, "a <new3>  <NEW4> dog on the beach", "a <new3> <new4> dog beside {}", PROMPT]
    config = small_world.sample_config()
    concept, auxiliary = joint_generator.prompts.token_sets(prompts, config.dci)
    assert concept.prompts == joint_generator.prompts.texts(prompts) == [
        "a <new1> <new2> cat in the snow", "a <new3> <new4> dog on the beach",
        "a <new3> <new4> dog beside <new1> <new2> cat", "a <new1> <new2> cat in the snow"]
    first, second = ["<new1>", "<new2>", "cat"], ["<new3>", "<new4>", "dog"]
    assert named(joint_generator, concept) == [first, second, second + first, first]
    assert auxiliary.prompts == ["a dog in the snow", "a cat on the beach", "a man beside car", "a dog in the snow"]
    assert named(joint_generator, auxiliary) == [["dog"], ["cat"], ["man", "car"], ["dog"]]
    assert concept.phrases.any(dim=2).tolist() == [[True, False], [False, True], [True, True], [True, False]]
    divided = small_world.sample_config("dci.ablation=no_full_prompt").dci
    alone, rest = joint_generator.prompts.token_sets(prompts[:2], divided)
    assert named(joint_generator, alone) == [first, second] and rest.prompts == ["in the snow", "on the beach"]
    with pytest.raises(UserError, match="write {} or '<new1> <new2> cat' or '<new3> <new4> dog' where"):
        joint_generator.requests([PROMPT, "a <new3> dog"], config)


def test_the_second_concept_is_drawn_alone_and_among_others(small_world: SmallWorld,
                                                            joint_generator: Generator) -> None:
    config, prompt = small_world.sample_config("eta=1.0"), "a <new3> <new4> dog on the beach"
    for strength in (None, 1.0):
        together = draw(joint_generator, config, Request(PROMPT, 5, strength), Request(prompt, 6, strength))
        assert gap(draw(joint_generator, config, Request(prompt, 6, strength))[0], together[1]) < 1e-4
        assert gap(*together) > 1e-3
    plain, joint = joint_generator.generate([prompt], config)
    assert plain.settings["concept"] == {"words": ["<new3>", "<new4>"], "class_noun": "dog", "step": 2}
    assert (plain.settings["text"], joint.settings["auxiliary_text"]) == (prompt, "a cat on the beach")
    assert joint_generator.requests([prompt], small_world.sample_config("dci.use=false")) == [Request(prompt, 5, None)]


# Batches.

@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("plms", 0.0)])
def test_a_image_does_not_depend_on_its_batch(small_world: SmallWorld, small_generator: Generator, sampler: str,
                                                eta: float) -> None:
    """Different prompts, seeds and strengths side by side equal separate runs."""
    config = small_world.sample_config(f"sampler={sampler}", f"eta={eta}")
    rows = [Request(PROMPT, 5, -1.0), Request(PROMPT, 5, 0.0), Request(PROMPT, 5, 2.0),
            Request("{} on the beach", 6, 1.0)]
    together = draw(small_generator, config, *rows)
    for row, latents in zip(rows, together, strict=True):
        assert gap(draw(small_generator, config, row)[0], latents) < 1e-4
    for first, second in itertools.combinations(together, 2):
        assert gap(first, second) > 1e-3


def test_seeds_count_images_not_batches(small_world: SmallWorld, small_generator: Generator) -> None:
    whole, single, repeated = (
        images(small_generator, small_world.sample_config("eta=1.0", *overrides))
        for overrides in (("n_samples=3", "batch_size=4"), ("n_samples=3", "batch_size=1"), ("n_iter=3",)))
    assert whole.keys() == single.keys() == repeated.keys() and {row.seed for row in whole} == {5, 6, 7}
    for row in whole:
        assert abs(whole[row] - single[row]).max() <= 1 and abs(whole[row] - repeated[row]).max() <= 1
    (alone,) = images(small_generator, small_world.sample_config("eta=1.0", "seed=6", "dci.use=false")).values()
    assert abs(alone - whole[Request(PROMPT, 6, None)]).max() <= 1
    assert abs(alone - whole[Request(PROMPT, 5, None)]).max() > 1


# Options.

@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_sampling_without_guidance(small_world: SmallWorld, small_generator: Generator, sampler: str) -> None:
    unguided, guided = (small_world.sample_config(f"sampler={sampler}", f"scale={scale}") for scale in (1, 3))
    plain, joint = Request(PROMPT, 5, None), Request(PROMPT, 5, 1.0)
    results = [draw(small_generator, unguided, plain), draw(small_generator, unguided, joint),
               draw(small_generator, guided, plain)]
    for first, second in itertools.combinations(results, 2):
        assert gap(first, second) > 1e-3


def test_every_option_changes_the_image(small_world: SmallWorld, small_generator: Generator) -> None:
    options = [[f"dci.guidance={guidance}", f"dci.noise={noise}"]
               for guidance in ("separate", "shared") for noise in ("independent", "common")]
    options += [[f"dci.ablation={name}"] for name in ("no_mask", "no_full_prompt", "last_layer", "base_weights")]
    options += [["dci.replace_noun=car"], ["dci.agg_time=0.75"], ["dci.token_gain=1.0"], ["dci.spatial_gain=0.0"],
                ["dci.mask_sum=50.0"]]
    drawn = [draw(small_generator, small_world.sample_config("dci.agg_time=1.0", *overrides), Request(PROMPT, 5, 1.5))
             for overrides in options]
    for (one, first), (other, second) in itertools.combinations(zip(options, drawn, strict=True), 2):
        assert gap(first, second) > 1e-5, (one, other)


@pytest.mark.parametrize("guidance", ["separate", "shared"])
def test_the_auxiliary_branch_with_the_bases_weights(small_world: SmallWorld, small_run: Run, monkeypatch,
                                                     guidance: str) -> None:
    """Keys and values of its rows are those of a network without the concept, all others the concept's."""
    generator, rows = Generator(*small_world.build()), [Request(PROMPT, 5, 1.0), Request("a {} on the beach", 6, 1.0)]
    unet, seen = generator.model.model.diffusion_model, []
    layer = unet.middle_block[1].transformer_blocks[0].attn2
    project = layer.keys_values
    monkeypatch.setattr(layer, "keys_values", lambda text: seen.append((text, *project(text))) or seen[-1][1:])
    generator.load(load_concept(small_run.concept))
    tuned = {name: value.clone() for name, value in unet.state_dict().items()}
    config = small_world.sample_config(f"dci.guidance={guidance}", "dci.ablation=base_weights")
    generator.latents(rows, config)
    assert all(torch.equal(value, tuned[name]) for name, value in unet.state_dict().items())

    concept, auxiliary = generator.prompts.token_sets([row.prompt for row in rows], config.dci)
    texts = ["", "", *concept.prompts, "", "", *auxiliary.prompts]
    texts = texts if guidance == "separate" else [*texts[:4], *texts[6:]]
    text, keys, values = seen[0]
    assert torch.equal(text, torch.cat([generator.model.cond_stage_model([prompt]) for prompt in texts]))
    with torch.no_grad():
        mine = project(text)
        generator.load(None)
        base = project(text)
    for got, tuned_rows, base_rows in zip((keys, values), mine, base, strict=True):
        torch.testing.assert_close(got[:4], tuned_rows[:4])
        torch.testing.assert_close(got[4:], base_rows[4:])
        assert not torch.equal(tuned_rows[4:], base_rows[4:])
    assert {len(text) for text, *_ in seen} == {len(texts), 4}        # afterwards the concept goes on alone


@pytest.mark.parametrize(("agg_time", "separate", "guided", "steps"), [
    (0.3, True, True, 154), (0.2, True, True, 167), (0.3, False, True, 174), (0.2, False, True, 182),
    (0.3, True, False, 154), (0.0, True, True, 200), (1.0, True, True, 100)])
def test_cost_matched_steps(agg_time: float, separate: bool, guided: bool, steps: int) -> None:
    assert cost_matched_steps(200, agg_time, separate, guided) == steps


def test_match_cost_spends_what_plain_sampling_does(small_world: SmallWorld, small_generator: Generator) -> None:
    rows: list[int] = []
    handle = small_generator.model.model.diffusion_model.register_forward_hook(
        lambda module, args, eps: rows.append(len(eps)))
    config = small_world.sample_config("steps=30", "dci.match_cost=true")
    draw(small_generator, config, Request(PROMPT, 5, None))
    draw(small_generator, config, Request(PROMPT, 5, 1.0))
    handle.remove()
    assert rows == [2] * 30 + [4] * 10 + [2] * 10         # 30 / 1.5 = 20 steps, half of them joint: 60 rows each


# The concept in the model.

def test_unloading_restores_the_base(small_world: SmallWorld, small_run: Run) -> None:
    generator, config = Generator(*small_world.build()), small_world.sample_config()
    row = Request("a cat in the snow", 5, None)
    before = {name: value.clone() for name, value in generator.model.state_dict().items()}
    expected, words = draw(generator, config, row), len(generator.model.cond_stage_model.tokenizer)
    assert generator.requests([row.prompt], config) == [row]       # without a concept there is nothing to inject around
    generator.load(load_concept(small_run.concept))
    changed = {name for name, value in generator.model.state_dict().items()
               if name not in before or not torch.equal(value, before[name])}
    assert len(changed) == 20 + 1
    generator.load(load_concept(small_run.concept))            # in place of the one before, not on top of it
    generator.load(None)
    after = generator.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert len(generator.model.cond_stage_model.tokenizer) == words
    assert torch.equal(draw(generator, config, row), expected)
    with pytest.raises(UserError, match="unknown word <new1>"):
        generator.requests(["a <new1> cat"], config)


def test_a_concept_of_another_base_is_refused(small_world: SmallWorld, small_run: Run) -> None:
    generator = Generator(*small_world.build())
    concept = dataclasses.replace(load_concept(small_run.concept), base={"name": "elsewhere", "hash": "0" * 16})
    with pytest.raises(UserError, match="'elsewhere'.*'small'"):
        generator.load(concept)
    assert generator.concept is None
    generator.load(load_concept(small_run.concept))


def test_masks_of_every_joint_step_and_layer(small_world: SmallWorld, small_generator: Generator,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_generator.model.model.diffusion_model
    layers = sum(isinstance(module, SpatialTransformer) for module in network.modules())
    image, record = small_generator.masks(Request(PROMPT, 5, 1.0), small_world.sample_config())
    assert len(record) == 2 * layers == 20                     # half of four steps are joint
    assert [name for name, _ in record[:layers]] == [name for name, _ in record[layers:]]
    sizes = [tuple(masks.shape[-2:]) for _, masks in record[:layers]]
    assert sizes == [(side, side) for side in (8, 4, 2, 2, 2, 2, 4, 4, 8, 8)]
    for _, masks in record:
        assert masks.shape[:2] == (2, 1) and torch.allclose(masks.sum(dim=0), torch.ones(()))
    (drawn,) = small_generator.generate([PROMPT], small_world.sample_config("plain=false"))
    assert (drawn.request.seed, drawn.request.strength) == (5, 1.0) and image == drawn.image
    short, panel = (mask_panel(image, record, title, cell=48) for title in ("a cat", "a cat " * 20))
    assert panel.width == 3 * (48 + 8) + 8 and panel.height > short.height          # the title has room
    monkeypatch.setattr(sheets, "sheet", lambda *given: given)
    columns, rows, _, title = mask_panel(image, record, "a cat in the snow", cell=48)
    assert columns == ["image", "step 1", "step 2"] and title.endswith(": a cat in the snow")
    assert len(rows) == 3 and all(cells[0] is image and len(cells) == 3 for _, cells in rows)
    _, none = small_generator.masks(Request(PROMPT, 5, 1.0), small_world.sample_config("dci.agg_time=0"))
    with pytest.raises(UserError, match="no masks to draw: agg_time"):
        mask_panel(image, none, "a cat")


def test_masks_of_images_that_are_not_square(small_world: SmallWorld, small_generator: Generator,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    image, record = small_generator.masks(Request(PROMPT, 5, 1.0), small_world.sample_config("height=32", "width=96"))
    assert image.size == (96, 32) and {tuple(masks.shape[-2:]) for _, masks in record} == {(8, 24), (4, 12), (2, 6)}
    first = record[0][1]
    monkeypatch.setattr(sheets, "sheet", lambda *given: given)
    _, rows, *_ = mask_panel(image, [("layer", first), ("below", first[..., ::2, ::2])], "a cat", cell=48)
    shades = (255 * first[0].mean(dim=(0, 1)).clip(0, 1)).to(torch.uint8)
    expected = shades.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    assert rows[0][0].startswith("8 x 24: ") and rows[0][1][1].size == rows[1][1][1].size == (48, 16)
    assert np.array_equal(rows[0][1][1], expected)


def test_watched_images_are_drawn_once_and_unchanged(small_world: SmallWorld, small_generator: Generator,
                                                       tmp_path: Path) -> None:
    """Masks come from the pass that draws the image, each from its own row of the batch."""
    config = small_world.sample_config("dci.agg_lambda=[0.0,1.0]", "n_samples=2", "batch_size=3")
    calls: list[int] = []
    handle = small_generator.model.model.diffusion_model.register_forward_hook(
        lambda module, args, eps: calls.append(len(eps)))
    prompts = [PROMPT, "{} on the beach"]
    sample_run(small_generator, config, prompts, tmp_path / "plain", grid=False)
    alone = calls.copy()
    calls.clear()
    watched = sample_run(small_generator, config, prompts, tmp_path / "watched", grid=False, masks=True)
    handle.remove()
    assert calls == alone and [path.name for path in watched.sheets] == ["000.png", "001.png"]
    before, after = contents(tmp_path / "plain"), contents(tmp_path / "watched")
    assert all(after[name] == content for name, content in before.items())
    rows = [Request(PROMPT, 5, 1.0), Request(prompts[1], 6, 0.0)]
    samples = {sample.request: sample for sample in small_generator.generate(prompts, config, watched=rows)}
    assert [row for row, sample in samples.items() if sample.masks] == rows
    for row in rows:
        _, expected = small_generator.masks(row, config)
        assert [name for name, _ in samples[row].masks] == [name for name, _ in expected]
        for (_, masks), (_, wanted) in zip(samples[row].masks, expected, strict=True):
            torch.testing.assert_close(masks, wanted, atol=1e-4, rtol=1e-4)


def test_the_auxiliary_noun_is_on_screen_and_sheet(small_world: SmallWorld, small_generator: Generator, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    captions: list[str] = []

    def sheet_of(columns: Sequence[str], rows: Sequence[tuple[str, object]], title: str = "") -> Image.Image:
        captions[:] = [caption for caption, _ in rows]
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("ldm.comparison.sheet", sheet_of)
    prompts = [PROMPT, "a {} beside a dog", "{} on the beach"]
    sample_run(small_generator, small_world.sample_config("steps=2"), prompts, tmp_path)
    assert "auxiliary noun: dog (2 of 3 prompts), man (1 of 3 prompts)" in capsys.readouterr().out
    assert captions == [f"{text}   (seed 5, auxiliary noun: {noun})" for text, noun in (
        ("a <new1> <new2> cat in the snow", "dog"), ("a <new1> <new2> cat beside a dog", "man"),
        ("<new1> <new2> cat on the beach", "dog"))]
    sample_run(small_generator, small_world.sample_config("steps=2", "dci.replace_noun=car"), prompts, tmp_path)
    assert "auxiliary noun: car\n" in capsys.readouterr().out
    for override in ("dci.use=false", "dci.ablation=no_full_prompt"):
        sample_run(small_generator, small_world.sample_config("steps=2", override), [PROMPT], tmp_path)
        assert captions[0].endswith("(seed 5)") and "auxiliary noun:" not in capsys.readouterr().out


# Refusals.

@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_dci_that_would_do_nothing_is_refused(small_world: SmallWorld, small_generator: Generator,
                                              sampler: str) -> None:
    """Refused exactly where a run has no step of four rows."""
    refused = []
    for steps, agg_time in ((1, 0.5), (1, 1.0), (2, 0.3), (3, 0.3), (4, 0.3), (2, 0.0)):
        config = small_world.sample_config(f"sampler={sampler}", f"steps={steps}", f"dci.agg_time={agg_time}")
        calls: list[int] = []
        handle = small_generator.model.model.diffusion_model.register_forward_hook(
            lambda module, args, eps, calls=calls: calls.append(len(eps)))
        draw(small_generator, config, Request(PROMPT, 5, 1.0))
        handle.remove()
        try:
            small_generator.requests([PROMPT], config)
        except UserError as error:
            assert f"with steps={steps} and agg_time={agg_time:g} no step has two branches" in str(error)
            refused.append((steps, agg_time))
        assert (4 in calls) == ((steps, agg_time) not in refused)
    assert refused == ([(2, 0.0)] if sampler == "dpm_solver" else [(1, 0.5), (2, 0.3), (3, 0.3), (2, 0.0)])
    few = ("steps=2", "dci.agg_time=0.3")
    plain = small_generator.requests([PROMPT], small_world.sample_config(*few, "dci.use=false"))
    assert plain == [Request(PROMPT, 5, None)]
    with pytest.raises(UserError, match="with steps=3"):       # so many are left of 4
        small_generator.requests([PROMPT], small_world.sample_config("dci.agg_time=0.3", "dci.match_cost=true"))


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_is_told_in_a_sentence(small_world: SmallWorld, small_generator: Generator, monkeypatch,
                                                    error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(small_generator, "latents", fail)
    many = "memory does not hold 3 image\\(s\\) at once; try batch_size=1, then --precision bf16"
    with pytest.raises(UserError, match=many):
        next(small_generator.generate([PROMPT], small_world.sample_config("n_samples=3")))
    with pytest.raises(UserError, match="memory does not hold 1 image\\(s\\) at once; try --precision bf16"):
        small_generator.masks(Request(PROMPT, 5, 1.0), small_world.sample_config())
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        next(small_generator.generate([PROMPT], small_world.sample_config()))


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [
    (False, False, "cpu"), (True, False, "cuda"), (False, True, "mps"), (True, True, "cuda")])
def test_the_device_that_is_there_is_chosen(monkeypatch, cuda: bool, mps: bool, chosen: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == chosen and choose_device("cpu").type == "cpu"
    for name, there in (("cuda", cuda), ("cuda:0", cuda), ("mps", mps)):
        if there:
            assert choose_device(name) == torch.device(name)
        else:
            with pytest.raises(UserError, match=f"device '{name[:4].rstrip(':')}' was asked for but this machine"):
                choose_device(name)
    with pytest.raises(UserError, match="use auto, cpu, cuda or mps"):
        choose_device("tpu")


@pytest.mark.parametrize(("override", "message"), [
    ("sampler=euler", "sampler 'euler' is unknown; use one of ddim, plms, dpm_solver"),
    ("dci.guidance=both", "dci.guidance"), ("dci.noise=none", "dci.noise"), ("dci.ablation=all", "dci.ablation"),
    ("precision=half", "precision"), ("dci.agg_lambda=[51]", "agg_lambda 51.0 is out of range"),
    ("dci.agg_lambda=[.nan]", "agg_lambda nan"), ("dci.agg_time=1.1", "agg_time 1.1"),
    ("dci.agg_time=.nan", "agg_time nan"), ("eta=2", "eta 2.0"), ("scale=.inf", "scale inf"),
    ("n_samples=0", "n_samples is 0"), ("seed=9223372036854775807", "seed is 9223372036854775807; give .* to 9223"),
    ("steps=0", "steps is 0"),
    ("steps=1001", "steps is 1001; ddim takes at most 1000"),
    ("width=20", "W is 20 px; this model needs a multiple of 16"), ("height=0", "H is 0 px"),
    ("precision=fp16", "fp16 has no use on a CPU")])
def test_settings_out_of_range(small_world: SmallWorld, small_generator: Generator, override: str,
                               message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(small_generator.generate([PROMPT], small_world.sample_config(override)))


def test_the_largest_seed(small_world: SmallWorld, small_generator: Generator) -> None:
    config = small_world.sample_config("seed=9223372036854775805", "n_samples=2", "steps=2")
    assert len(images(small_generator, config)) == 4


def test_contradictory_settings(small_world: SmallWorld, small_generator: Generator) -> None:
    with pytest.raises(UserError, match="plms' is deterministic"):
        small_generator.requests([PROMPT], small_world.sample_config("sampler=plms", "eta=1.0"))
    with pytest.raises(UserError, match="nothing to draw"):
        small_generator.requests([PROMPT], small_world.sample_config("plain=false", "dci.agg_lambda=[]"))
    with pytest.raises(UserError, match="does not mention the concept"):
        small_generator.requests(["a dog"], small_world.sample_config())
    with pytest.raises(UserError, match="is the class noun itself"):
        small_generator.requests([PROMPT], small_world.sample_config("dci.replace_noun=cat"))


def test_other_sizes(small_world: SmallWorld, small_generator: Generator) -> None:
    (sample, _) = small_generator.generate([PROMPT], small_world.sample_config("height=48", "width=16"))
    assert sample.image.size == (16, 48)


# Files.

def test_a_image_can_be_drawn_again_from_its_settings(small_world: SmallWorld, small_generator: Generator,
                                                       tmp_path: Path) -> None:
    config = small_world.sample_config("eta=1.0", "dci.guidance=shared", "dci.noise=common", "dci.match_cost=true",
                                       "dci.replace_noun=dog", "dci.token_gain=9.0", "scale=2.5")
    for sample in small_generator.generate([PROMPT], config):
        path = save_png(sample.image, tmp_path / "image.png", sample.settings)
        settings = read_settings(path)
        assert settings == sample.settings
        names = ("sampler", "steps", "eta", "scale", "height", "width", "precision", "dci")
        own = {name: settings[name] for name in names}
        again = merge(SampleConfig, [], extra=small_world.sample_config() | own)
        row = Request(settings["prompt"], settings["seed"], settings["strength"])
        assert row == sample.request
        latents = draw(small_generator, again, row)
        assert torch.equal(latents, draw(small_generator, config, row))
        assert settings["concept"] == {"words": ["<new1>", "<new2>"], "class_noun": "cat", "step": 2}
        assert settings["base"] == small_generator.identity
        assert settings["text"] == "a <new1> <new2> cat in the snow"
        assert settings.get("auxiliary_text") == (None if row.strength is None else "a dog in the snow")
        with Image.open(path) as image:
            text = json.dumps(image.text)
        assert str(tmp_path.parent) not in text and str(small_world.folder) not in text
        assert image.text["parameters"].startswith("a <new1> <new2> cat in the snow\nSteps: 4, Sampler: ddim")
    (tmp_path / "plain.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_settings(tmp_path / "plain.png") == {}


def test_sheet_sizes() -> None:
    red = Image.new("RGB", (20, 20), (255, 0, 0))
    wide = Image.new("RGB", (40, 20), (0, 0, 255))
    page = sheet(["one", "two", "three"], [("first", [red, None, wide]), ("second", [None, red, None])], cell=64)
    pixels = np.asarray(page).reshape(-1, 3)
    assert page.width == 3 * (64 + 8) + 8
    assert (pixels == (255, 0, 0)).all(axis=1).sum() == 2 * 64 * 64
    assert (pixels == (0, 0, 255)).all(axis=1).sum() == 64 * 32
    titled = sheet(["one", "two", "three"], [("first", [red, None, wide])], cell=64, title="step 7")
    assert titled.width == page.width and titled.height < page.height


@pytest.mark.parametrize(("sizes", "columns", "rows", "side"), [
    ([64, 64, 64], 3, 1, 160), ([512, 512, 512], 3, 1, 512), ([512] * 9, 9, 1, 436), ([512] * 9, 9, 60, 192),
    ([512] * 9, 9, 90, 160), ([3000, 64, 64], 3, 1, 160), ([3000, 512, 512], 3, 1, 512), ([], 3, 1, 160)])
def test_a_sheet_shows_images_in_their_own_size_while_the_page_has_room(sizes: list[int], columns: int, rows: int,
                                                                          side: int) -> None:
    # Room is 4000 / columns - 8 across and 12000 / rows - 8 down; the median image decides; 160 is the least.
    assert cell_side([None, *(Image.new("L", (side, side // 2)) for side in sizes)], columns, rows, 160) == side


def test_sheets_have_letters_beyond_ascii() -> None:
    text = "café, São, Łódź, λ, кот, Việt, – × → ≤ “so”"
    assert readable(text) == text and readable("cafe\u0301") == "café"
    assert readable("a 猫\ufffe") == "a [U+732B][U+FFFE]"
    known = pytest.importorskip("fontTools.ttLib").TTFont(FONT).getBestCmap()
    assert {ord(letter) for letter in text} <= known.keys() and 0x732b not in known
    assert all((readable(chr(code)) == chr(code)) == (code in known) for code in range(0x20, 0x2400)
               if unicodedata.is_normalized("NFC", chr(code)))


def test_lines_fit_whatever_the_words() -> None:
    face = font(13)
    words = f"one {'overlong' * 9} two"
    lines = wrap(words, 100, face)
    assert max(map(face.getlength, lines)) <= 100 and "".join(lines).replace(" ", "") == words.replace(" ", "")


def test_draw_run_writes_every_image_and_a_sheet(small_world: SmallWorld, small_run: Run,
                                                   small_generator: Generator, tmp_path: Path) -> None:
    config = small_world.sample_config("n_samples=2", "dci.agg_lambda=[0.0,1.0]")
    written = sample_run(small_generator, config, [PROMPT, "{}", PROMPT], tmp_path, [small_run.concept], masks=True)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert written.images == len(names) == 2 * 2 * 3 and "000-01-a-in-the-snow-lambda+1.00.png" in names
    assert [path.relative_to(tmp_path).as_posix() for path in written.sheets] == \
        ["grid.png", "masks/000.png", "masks/001.png"]
    with Image.open(tmp_path / "grid.png") as page:            # reference | fine-tuned | two strengths; four rows
        assert page.width == 4 * (160 + 8) + 8 and page.height > 4 * 160
    again = merge(SampleConfig, [tmp_path / "config.yaml"])
    assert again == config


def test_a_preview_ends_with_the_joint_phase(small_world: SmallWorld, small_generator: Generator,
                                             tmp_path: Path) -> None:
    """T_a = 0.5 of 4 steps: two joint ones of 4 rows an image; the plain image takes as many, of 2 rows."""
    config = small_world.sample_config("dci.agg_lambda=[0.0,1.0]", "dci.preview=true", "steps=4", "sampler=ddim")
    rows: list[int] = []
    handle = small_generator.model.model.diffusion_model.register_forward_hook(
        lambda module, args, eps: rows.append(len(eps)))
    written = sample_run(small_generator, config, ["{}"], tmp_path)
    handle.remove()
    assert rows == [2, 2, 8, 8]
    assert [path.name for path in written.files] == [
        "000-00--plain-preview.png", "000-00--lambda+0.00-preview.png", "000-00--lambda+1.00-preview.png"]


def test_words_the_embedded_model_never_saw_are_named(small_world: SmallWorld, small_generator: Generator,
                                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    config = small_world.sample_config("dci.use=false", "steps=2")
    sample_run(small_generator, config, ["a {} on a pizza"], tmp_path, grid=False)
    assert "pizza" not in capsys.readouterr().out                     # another model may well know it
    monkeypatch.setitem(small_generator.identity, "name", "embedded")
    sample_run(small_generator, config, ["a {} on a pizza", "a {} in the snow"], tmp_path, grid=False)
    assert "the embedded model never saw the word pizza and" in capsys.readouterr().out


def test_near_strengths_have_names_of_their_own(small_world: SmallWorld, small_generator: Generator,
                                                tmp_path: Path) -> None:
    config = small_world.sample_config("dci.agg_lambda=[1,1.002,0.999,-0.5]", "plain=false", "steps=2")
    written = sample_run(small_generator, config, ["{}"], tmp_path, grid=False)
    assert [path.name for path in written.files] == [
        f"000-00--lambda{text}.png" for text in ("+1.00", "+1.002", "+0.999", "-0.50")]
    assert [read_settings(path)["strength"] for path in written.files] == [1.0, 1.002, 0.999, -0.5]


def test_a_second_run_into_a_folder_replaces_nothing(small_world: SmallWorld, small_generator: Generator,
                                                     tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, other = (small_world.sample_config("steps=2", "plain=false", f"scale={scale}") for scale in (3, 2))
    sample_run(small_generator, config, [PROMPT, "{}"], tmp_path, masks=True)
    assert "already" not in capsys.readouterr().out
    before = contents(tmp_path)
    assert before.keys() >= {"grid.png", "config.yaml", "masks/001.png"}
    sample_run(small_generator, other, [PROMPT], tmp_path, masks=True)
    assert f"'{tmp_path}' holds images already; those of this run are numbered from 002" in capsys.readouterr().out
    sample_run(small_generator, other, ["{}"], tmp_path, grid=False)
    after = contents(tmp_path)
    assert after.items() >= before.items() and after.keys() - before.keys() == {
        "samples/002-00-a-in-the-snow-lambda+1.00.png", "masks/002.png", "grid-0001.png", "config-0001.yaml",
        "samples/003-00--lambda+1.00.png", "config-0002.yaml"}
    assert merge(SampleConfig, [tmp_path / "config-0001.yaml"]) == other
