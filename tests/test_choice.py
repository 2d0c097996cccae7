"""Tests of lambda chosen by the program: the rule by hand, its scores against those of evaluations, whole runs."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SmallWorld
from PIL import Image

from ldm.choice import Chooser, Score, choose, load_chooser
from ldm.config import ChoiceConfig, DCIConfig
from ldm.customization.delta import load_concept
from ldm.evaluation.scoring import load_scorer, plain_text
from ldm.pipeline import Generator, Sample
from ldm.sampling import chooser_for, sample_run
from ldm.sheets import read_settings
from ldm.training.run import Run
from ldm.util import UserError

PLAIN = Score(0.3, 0.6)


@pytest.mark.parametrize(("scores", "chosen"), [
    ({-1.0: (0.4, 0.58), 0.0: (0.5, 0.51), 1.0: (0.6, 0.49)}, 0.0),      # 1.0 is 0.11 less like the references
    ({-1.0: (0.4, 0.58), 0.0: (0.2, 0.60), 1.0: (0.3, 0.70)}, -1.0),     # more alike is no reason
    ({-1.0: (0.4, 0.40), 0.0: (0.5, 0.45), 1.0: (0.9, 0.10)}, 0.0),      # none is close: the most alike
    ({1.0: (0.50, 0.6), -1.0: (0.46, 0.6), 0.0: (0.48, 0.6)}, 0.0),      # 0.02 less is little, 0.04 is not
    ({0.0: (0.4, 0.60), -1.0: (0.4, 0.60)}, -1.0)])                      # of equals the weakest
def test_the_weakest_strength_that_follows_the_prompt_and_stays_like_the_references(scores: dict,
                                                                                   chosen: float) -> None:
    candidates = {strength: Score(*pair) for strength, pair in scores.items()}
    assert choose(PLAIN, candidates, margin=0.1, tolerance=0.03) == chosen


@pytest.fixture(scope="module")
def chooser(metric_files: dict[str, Path], small_world: SmallWorld) -> Chooser:
    settings = ChoiceConfig(use=True, weights=str(metric_files["small_clip"]))
    references = [Image.open(path).convert("RGB") for path in sorted(small_world.photos.glob("*.png"))]
    return load_chooser(settings, references, torch.device("cpu"))


@pytest.fixture(scope="module")
def generator(small_world: SmallWorld, small_run: Run) -> Generator:
    generator = Generator(*small_world.build())
    generator.load(load_concept(small_run.concept))
    return generator


@pytest.fixture(scope="module")
def samples(small_world: SmallWorld, generator: Generator) -> list[Sample]:
    config = small_world.sample_config("n_samples=2", "dci.agg_lambda=[0.0,1.0,2.0]", "dci.choice.use=true",
                                       "plain=false", "steps=2")
    return list(generator.generate(["a {} in the snow", "{}"], config))


def test_scores_are_those_of_evaluations(chooser: Chooser, samples: Sequence[Sample], small_world: SmallWorld,
                                         metric_files: dict[str, Path]) -> None:
    scorer = load_scorer(["small_clip"], {"small_clip": metric_files["small_clip"]})
    references = [Image.open(path).convert("RGB") for path in sorted(small_world.photos.glob("*.png"))]
    rows = scorer.rows([sample.image for sample in samples], [sample.settings["text"] for sample in samples], "cat",
                       scorer.features(references))
    for sample, row in zip(samples, rows, strict=True):
        (score,) = chooser.score([sample.image], plain_text(sample.settings["text"], "cat"))
        assert score.agreement == pytest.approx(row["small_clip_t"], abs=1e-5)
        assert score.likeness == pytest.approx(row["small_clip_i"], abs=1e-5)


def test_one_strength_is_kept_for_each_prompt_and_seed(chooser: Chooser, samples: Sequence[Sample]) -> None:
    """The plain images are drawn to compare with, and passed on only where they are asked for."""
    assert [sample.request.strength for sample in samples] == [None] * 4 + [0.0, 1.0, 2.0] * 4
    kept = list(chooser.keep(samples, 3, plain=False))
    assert [(sample.request.prompt, sample.request.seed) for sample in kept] == [
        ("a {} in the snow", 5), ("a {} in the snow", 6), ("{}", 5), ("{}", 6)]
    for sample in kept:
        said = sample.settings["choice"]["scores"]
        assert list(said) == ["plain", "0", "1", "2"]
        rule = {strength: Score(**said[f"{strength:g}"]) for strength in (0.0, 1.0, 2.0)}
        assert sample.request.strength == choose(Score(**said["plain"]), rule, chooser.margin, chooser.tolerance)
    with_plain = list(chooser.keep(samples, 3, plain=True))
    assert with_plain[:4] == samples[:4] and len(with_plain) == 8


def test_a_run_writes_the_chosen_images_with_their_scores(chooser: Chooser, generator: Generator, small_run: Run,
                                                          small_world: SmallWorld, tmp_path: Path) -> None:
    config = small_world.sample_config("n_samples=2", "dci.agg_lambda=[0.0,1.0]", "dci.choice.use=true", "steps=2")
    written = sample_run(generator, config, ["a {} in the snow"], tmp_path, [small_run.concept], masks=True,
                         chooser=chooser)
    assert written.images == len(written.files) == 4                       # plain and chosen, of two seeds
    for path in written.files[2:]:
        settings = read_settings(path)
        assert set(settings["choice"]["scores"]) == {"plain", "0", "1"} and settings["strength"] in (0.0, 1.0)
        assert settings["choice"]["metric"] == "small_clip" and "weights" not in str(settings["dci"])
    assert [path.name for path in written.sheets] == ["grid.png", "000.png"]
    with Image.open(tmp_path / "grid.png") as page:
        assert page.width == 3 * (160 + 8) + 8                             # reference | fine-tuned | chosen


def test_what_lambda_cannot_be_chosen_by_is_refused(small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\[1.0\] leaves nothing to choose"):
        DCIConfig(agg_lambda=[1.0], choice=ChoiceConfig(use=True))
    with pytest.raises(UserError, match=r"\[1.0, 1.0\] leaves nothing to choose"):
        DCIConfig(agg_lambda=[1.0, 1.0], choice=ChoiceConfig(use=True))
    with pytest.raises(UserError, match="margin is -1"):
        ChoiceConfig(margin=-1)
    with pytest.raises(UserError, match="tolerance is 2.1"):
        ChoiceConfig(tolerance=2.1)
    wanted = small_world.sample_config("dci.choice.use=true", "dci.agg_lambda=[0.0,1.0]")
    with pytest.raises(UserError, match="knows the embedded model's world only; give another"):
        chooser_for(wanted, [small_run.concept])
    with pytest.raises(UserError, match=r"weights of 'clip_b32'.* name their file with dci.choice.weights=FILE"):
        chooser_for(small_world.sample_config("dci.choice.use=true", "dci.agg_lambda=[0.0,1.0]",
                                              "dci.choice.metric=clip_b32"), [small_run.concept])
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(small_run.concept.read_bytes())
    wanted = small_world.sample_config("dci.choice.use=true", "dci.agg_lambda=[0.0,1.0]", "base.ckpt=null")
    with pytest.raises(UserError, match=r"there are none beside '.*alone.safetensors'; name their folder"):
        chooser_for(wanted, [alone])
    assert chooser_for(small_world.sample_config(), [small_run.concept]) is None

