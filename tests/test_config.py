"""Tests of configuration: keys and types refused in words, files merged in order, all files of configs/ legal."""
from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from experiments.jobs import SweepConfig, subjects, training_of
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from ldm.config import SampleConfig, TrainConfig
from ldm.config_files import all_keys, meanings, merge, save_config
from ldm.data.captions import captioned
from ldm.data.regularization import read_regularization
from ldm.flags import set_keys
from ldm.util import UserError, allow_targets, folder_name, from_here, instantiate_from_config, shipped

CONFIGS = ROOT / "configs"
MODELS, METHODS, CONCEPTS, SAMPLES = (sorted((CONFIGS / part).rglob("*.yaml"))
                                      for part in ("model", "method", "concept", "sample"))
CONCEPT = "concepts: [{name: thing, images: photos, class_noun: cat}]"


def written(folder: Path, *texts: str) -> list[Path]:
    """Writes configuration files."""
    paths = [folder / f"{index}.yaml" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def names(paths: list[Path]) -> set[str]:
    return {path.stem for path in paths}


# Refusals.

@pytest.mark.parametrize(("text", "message"), [
    ("methd: {}", "unknown key 'methd'; did you mean 'method'?"),
    ("method: {stepz: 3}", "unknown key 'method.stepz'; did you mean 'method.steps'?"),
    ("method: {lr: 3}", "unknown key 'method.lr'; the main keys are model, base, method, concepts, data, trainer"),
    ("trainer: {save_evry: 3}", "did you mean 'trainer.save_every'?"),
    ("steps: 3", "unknown key 'steps'; did you mean"),
    ("concepts: [{name: a, image: b}]", "unknown key 'concepts.0.image'; did you mean 'concepts.0.images'?"),
    ("concepts: [{name: a}, {class_nuon: b}]", "'concepts.1.class_nuon'; did you mean 'concepts.0.class_noun'?"),
    ("method: {steps: many}", "'method.steps': Value 'many'"),
    ("method: {flip: sometimes}", "'method.flip': Value 'sometimes'"),
    ("method: {words: 3}", "words"), ("concepts: 7", "concepts"),
    ("method: [1, 2]", "'method' must hold keys and values"), ("method:", "'method' must hold keys and values"),
    ("concepts: [7]", "1.yaml: "), ("concepts: null", "concepts"),
    ("preview: {agg_lambda: [x]}", "Value 'x'"),
    ("[1, 2]", "must hold keys and values"), ("a: [", "is no YAML"), ("just words", "unknown key 'just words'")])
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    paths = written(tmp_path, CONCEPT, text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        merge(TrainConfig, paths)
    assert str(paths[1]) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("override", "message"), [
    ("method.stepz=3", "unknown key 'method.stepz'; did you mean 'method.steps'?"),
    ("nothing.at.all=3", "unknown key 'nothing.at.all'; the main keys are"),
    ("methd.batch_size=3", "did you mean 'method.batch_size'?"),
    ("save_every=3", "did you mean 'trainer.save_every'?"),
    ("method.steps=many", "override 'method.steps=many': "), ("method.steps=[1", "override 'method.steps=[1': "),
    ("method.words=word", "override 'method.words=word': "), ("concepts.1.name=a", "unknown key 'concepts.1.name'"),
    ("concepts.0.nam=a", "did you mean 'concepts.0.name'?"), ("method.steps", "overrides are written key=value"),
    ("=3", "unknown key ''")])
def test_a_wrong_override_is_refused_in_words(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        merge(TrainConfig, written(tmp_path, CONCEPT), [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("trainer: {seed: 0x" + "f" * 5000 + "}", "'trainer.seed' is a whole number of more"),
    ("trainer: {seed: " + "59:" * 4000 + "1}", "'trainer.seed' is a whole number of more"),       # of base 60
    ("model: {params: {a: [1, -" + "9" * 400 + "]}}", "'model.params.a.1' is a whole number of more"),
    ("trainer: {seed: " + "9" * 5000 + "}", "is no YAML"), ("name: 0x" + "f" * 5000, "4300 digits"),
    ('method: {prefix: "\\ud83d"}', "is no YAML"),
    ('model: {params: {"\\udc80": 1}}', "is no YAML")],
    ids=lambda text: text[:20])
def test_numbers_and_texts_that_no_file_could_hold(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        merge(TrainConfig, written(tmp_path, text))


def test_overrides_that_are_no_text() -> None:
    with pytest.raises(UserError, match="override 'name=caf\udce9' is not Unicode text"):
        merge(TrainConfig, [], ["name=caf\udce9"])
    with pytest.raises(UserError, match="4300 digits"):
        merge(TrainConfig, [], ["name=0x" + "f" * 5000])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'.*none.yaml' does not exist"):
        merge(TrainConfig, [tmp_path / "none.yaml"])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        merge(TrainConfig, [tmp_path / "bytes.yaml"])
    with pytest.raises(UserError, match="unknown key 'trainer'"):
        merge(SampleConfig, written(tmp_path, "trainer: {seed: 3}"))       # a training file is no sampling file


# Merging.

def test_later_files_win_and_options_and_overrides_after_them(tmp_path: Path) -> None:
    paths = written(tmp_path, "method: {steps: 1, flip: false, words: [<a>, <b>]}\n" + CONCEPT,
                    "method: {steps: 2, words: [<c>]}", "trainer: {seed: 4}")
    config = merge(TrainConfig, paths)
    method = config.method
    assert (method.steps, method.flip, method.words, config.trainer.seed) == (2, False, ["<c>"], 4)
    assert merge(TrainConfig, paths[::-1]).method.steps == 1
    extra = OmegaConf.create({"method": {"steps": 3}})
    assert merge(TrainConfig, paths, extra=extra).method.steps == 3
    overrides = ["method.steps=4", "concepts.0.images=other", "--method.prefix_length=null"]
    last = merge(TrainConfig, paths, overrides, extra)
    assert last.method.steps == 4 and last.concepts[0].images == "other" and last.method.prefix_length is None
    # What nobody mentions keeps its default.
    assert last.method.batch_size == merge(TrainConfig, []).method.batch_size


def test_a_merged_configuration_is_frozen() -> None:
    config = merge(TrainConfig, [])
    with pytest.raises(ReadonlyConfigError):
        config.method.steps = 3


def test_values_become_the_type_of_the_schema(tmp_path: Path) -> None:
    config = merge(SampleConfig, written(tmp_path, "{scale: 3, dci: {agg_lambda: [1, -2]}, base: {name: 7}}"))
    assert config.scale == 3.0 and isinstance(config.scale, float) and config.base.name == "7"
    assert config.dci.agg_lambda == [1.0, -2.0]


def test_the_model_may_have_any_key(tmp_path: Path) -> None:
    (path,) = written(tmp_path, "model: {target: some.Class, params: {anything: 1}}")
    config = merge(TrainConfig, [path], ["model.params.anything=2"])
    assert config.model.params.anything == 2
    with pytest.raises(UserError, match="'model.params.anythin'; did you mean 'model.params.anything'?"):
        merge(TrainConfig, [path], ["model.params.anythin=2"])


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_a_saved_configuration_runs_again(tmp_path: Path, schema: type) -> None:
    files = [MODELS[0], *((METHODS[0], CONCEPTS[0]) if schema is TrainConfig else SAMPLES[:1])]
    config = merge(schema, files, ["base.ckpt=some/file.ckpt"])
    save_config(config, tmp_path / "deep" / "project.yaml")
    assert merge(schema, [tmp_path / "deep" / "project.yaml"]) == config


# What is text, and what is not.

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 3000, "a: {b: " * 60 + "1" + "}" * 60,
                                  "seed: " + "9" * 5000],
                         ids=["bomb", "endless", "deep", "deeper than any", "digits"])
def test_bombs_are_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is no YAML"):
        merge(SampleConfig, written(tmp_path, text))


def test_aliases_are_yaml(tmp_path: Path) -> None:
    files = written(tmp_path, "dci: {agg_lambda: &few [1, 2]}\nmodel: {a: *few, b: *few}")
    assert merge(SampleConfig, files).model.b == [1, 2]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is no file"):
        merge(SampleConfig, [tmp_path / "pipe.yaml"])


@pytest.mark.parametrize("text", ["${x}", "${oc.env:SECRET}", "a ${", r"\${x}", r"\\${oc.env:SECRET}", "}${"])
def test_only_files_of_configuration_look_things_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Flags, overrides and what files of data say is text, here, in what is saved, and when that is read again."""
    monkeypatch.setenv("SECRET", "hunter2")
    flags = set_keys({"name": text, "concepts": [{"name": "a", "images": "b", "class_noun": text}]})
    config = merge(TrainConfig, [], [f"method.prefix='{text}'"], flags)
    assert (config.name, config.concepts[0].class_noun, config.method.prefix) == (text, text, text)
    save_config(config, tmp_path / "project.yaml")
    assert merge(TrainConfig, [tmp_path / "project.yaml"], data=True) == merge(TrainConfig, [tmp_path / "project.yaml"])
    assert merge(TrainConfig, [tmp_path / "project.yaml"]).concepts[0].class_noun == text
    assert "hunter2" not in (tmp_path / "project.yaml").read_text()


def test_a_configuration_file_looks_things_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "here")
    files = written(tmp_path, "{name: '${oc.env:PLACE}', trainer: {logdir: '${name}/logs'}}")
    assert merge(TrainConfig, files).trainer.logdir == "here/logs"
    with pytest.raises(UserError, match="looked up in configuration files given with -b alone"):
        merge(TrainConfig, files, data=True)
    with pytest.raises(UserError, match="nowhere"):
        merge(TrainConfig, written(tmp_path, "name: '${nowhere}'"))


# What may be called.

@pytest.mark.parametrize("target", ["os.mkdir", "os.system", "torch.load", "torch.hub.load", "ldm.text.read_text",
                                    "ldm.models.autoencoder.torch.load", "ldm.models.diffusion.ddpm.np", "print", "",
                                    "ldm.models..x", "torch.nn.functional.relu", "ldm.models.diffusion.ddpm", 7, None])
def test_configurations_call_networks_only(tmp_path: Path, target: object) -> None:
    with pytest.raises(UserError, match="target '"):
        instantiate_from_config({"target": target, "params": {}})


def test_forks_name_their_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab.py").write_text("class Mine:\n    def __init__(self, x):\n        self.x = x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DCI_ICO_ALLOW_TARGET", "")
    node = {"target": "mylab.Mine", "params": {"x": 3}}
    with pytest.raises(UserError, match="allow it by name with --allow_target"):
        instantiate_from_config(node)
    assert "mylab" not in sys.modules                                  # not even imported
    allow_targets(["mylab"])
    assert instantiate_from_config(node).x == 3
    assert instantiate_from_config({"target": "torch.nn.Identity"}) is not None


# What is shipped.

def test_the_shipped_files_are_the_known_ones() -> None:
    """A new folder or file needs a line in the tests below."""
    assert names(MODELS) == {"sd-v1", "tiny"} and len(CONCEPTS) == 5 * 7 and names(SAMPLES) == {"paper", "tiny"}
    assert names(METHODS) == {"custom_diffusion", "ico", "ico_for_dci", "tiny"}
    assert {path.name for path in CONFIGS.iterdir()} == {
        "captions", "concept", "method", "model", "prompts", "sample", "sweep", "trainer",
        "tiny.yaml", "sd-v1.yaml", "sd-v1-custom-diffusion.yaml", "sample-tiny.yaml", "sample-sd-v1.yaml"}
    assert {path.suffix for path in CONFIGS.rglob("*") if path.is_file()} == {".yaml", ".txt"}


@pytest.mark.parametrize(("model", "concept"), [*itertools.product(MODELS, CONCEPTS)], ids=lambda path: path.stem)
def test_every_combination_merges(model: Path, concept: Path) -> None:
    for method, *settings in [*zip(METHODS), *itertools.product(METHODS[:-1], ["tiny.yaml"])]:
        files = [model, method, *(CONFIGS / "method" / name for name in settings), concept]
        config = merge(TrainConfig, files)
        assert len(config.concepts) == 1 and config.method.words and config.model.target
        assert list((ROOT / config.concepts[0].images).glob("*.png"))
        assert (ROOT / config.concepts[0].regularization).is_dir()


@pytest.mark.parametrize(("model", "sample"), [*itertools.product(MODELS, SAMPLES)], ids=lambda path: path.stem)
def test_sampling_files_merge(model: Path, sample: Path) -> None:
    assert merge(SampleConfig, [model, sample]).steps == OmegaConf.load(sample).steps


@pytest.mark.parametrize("added", [[], ["brick_wall"], ["brick_walls"], ["brick_wall", "contexts"], ["quick"],
                                   ["hats"]])
def test_sweep_files_merge(added: list[str]) -> None:
    config = merge(SweepConfig, [CONFIGS / "sweep" / f"{name}.yaml" for name in ["tiny", *added]])
    for method in config.methods:
        training = training_of(config, method)
        assert training.method.words == [f"<new{number + 1}>" for number in range(len(training.method.words))]
    for subject in subjects(config):
        assert len(captioned(Path(subject.training(config, config.method).concepts[0].images)).paths) == 5


def test_the_files_of_whole_runs_are_their_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, and whatever else a file says wins over what it includes."""
    parts = {"tiny": ("model/tiny", "method/ico_for_dci", "method/tiny", "concept/brick_wall/ringed_teapot"),
             "sd-v1": ("model/sd-v1", "method/ico_for_dci"),
             "sd-v1-custom-diffusion": ("model/sd-v1", "method/custom_diffusion")}
    monkeypatch.chdir(tmp_path)
    for name, included in parts.items():
        files = [f"configs/{part}.yaml" for part in included]
        assert merge(TrainConfig, [f"configs/{name}.yaml"]) == merge(TrainConfig, files)
    for name, included in {"sample-tiny": ("model/tiny", "sample/tiny"),
                           "sample-sd-v1": ("model/sd-v1", "sample/paper")}.items():
        files = [f"configs/{part}.yaml" for part in included]
        assert merge(SampleConfig, [f"configs/{name}.yaml"]) == merge(SampleConfig, files)
    (tmp_path / "inner.yaml").write_text("steps: 3\neta: 0.5\n")
    (tmp_path / "outer.yaml").write_text("include: [inner.yaml]\nsteps: 4\n")
    config = merge(SampleConfig, ["outer.yaml"])
    assert (config.steps, config.eta) == (4, 0.5)


@pytest.mark.parametrize(("text", "message"), [
    ("include: [a.yaml]", "a.yaml: it includes itself"), ("include: b.yaml", "include must be a list"),
    ("include: [none.yaml]", "'none.yaml' does not exist"), ("include: [[]]", "include must be a list")])
def test_what_cannot_be_included(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        merge(SampleConfig, [tmp_path / "a.yaml"])
    with pytest.raises(UserError, match="unknown key 'include'"):
        merge(SampleConfig, [tmp_path / "a.yaml"], data=True)      # a run's folder names no other files


def test_prompts_name_the_concept() -> None:
    for path in (CONFIGS / "prompts").iterdir():
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert lines and all("{}" in line for line in lines) and len(set(lines)) == len(lines)


def test_numbers_of_the_papers_release() -> None:
    """Rates, batch, steps and sampling as the release of the paper's authors runs them on three GPUs."""
    ico = merge(TrainConfig, [CONFIGS / "method" / "ico.yaml"]).method
    assert ico == merge(TrainConfig, []).method                              # the default method is ICO
    assert (ico.learning_rate, ico.learning_rate * ico.context_lr_factor) == pytest.approx((6e-5, 6e-4))
    assert (ico.steps, 2 * ico.batch_size, ico.prior_weight, ico.weight_decay) == (900, 6, 1.0, 0.01)
    for_dci = merge(TrainConfig, [CONFIGS / "method" / name for name in ("ico.yaml", "ico_for_dci.yaml")]).method
    assert [len(method.words) for method in (ico, for_dci)] == [2, 3]
    assert [len(method.prefix.split()) for method in (ico, for_dci)] == [3, 1]
    manual = merge(TrainConfig, [CONFIGS / "method" / "custom_diffusion.yaml"]).method
    rare = ["ucd</w>", "pll", "ktn"]                                         # the last word starts from the last
    assert all(method.initial_words == rare[-len(method.words):] for method in (ico, for_dci, manual))
    paper = merge(SampleConfig, [CONFIGS / "sample" / "paper.yaml"])
    assert (paper.steps, paper.eta, paper.scale, paper.dci.agg_time) == (200, 1.0, 6.0, 0.3)
    assert (paper.dci.token_gain, paper.dci.spatial_gain, paper.dci.mask_sum) == (10.0, 10.0, 500.0)


@pytest.mark.parametrize("schema", [SampleConfig, TrainConfig])
def test_what_keys_mean_stands_in_their_margin(schema: type) -> None:
    found = meanings(schema)
    assert list(found) == all_keys(OmegaConf.structured(schema))
    assert found["base.ckpt"] == ".ckpt or .safetensors; null is the embedded model of ldm/tiny" and found["base"] == ""


def test_a_margin_may_hold_any_sign() -> None:
    assert meanings(TrainConfig)["data.background"].endswith("padded; or '#rrggbb'")
    assert meanings(SampleConfig)["dci.agg_lambda"] == "strengths, one image each; about -2 to 2"


# Paths and names.

def test_what_ships_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration files, the paths inside them, and lists of images and prompts; the user's own come first."""
    monkeypatch.chdir(ROOT)
    here = [len(subject.prompts) for subject in subjects(merge(SweepConfig, ["configs/sweep/tiny.yaml"]))]
    assert from_here("train.sh") == "train.sh"
    monkeypatch.chdir(tmp_path)
    assert from_here("train.sh") == str(ROOT / "train.sh")
    (concept,) = merge(TrainConfig, ["configs/concept/striped_cat.yaml"]).concepts
    assert len(captioned(Path(concept.images)).paths) == 5
    assert read_regularization(Path(concept.regularization), "cat").paths
    sweep = subjects(merge(SweepConfig, ["configs/sweep/tiny.yaml"]))
    assert [len(subject.prompts) for subject in sweep] == here
    assert all(subject.references.is_dir() for subject in sweep)
    for name in ("train.sh", "docs", "tests/fixtures", "configs/model/none.yaml"):      # does not ship, or is not there
        assert shipped(name) == Path(name)
    with pytest.raises(UserError, match="'configs/model/none.yaml' does not exist"):
        merge(SampleConfig, ["configs/model/none.yaml"])
    (tmp_path / "configs" / "sample").mkdir(parents=True)
    (tmp_path / "configs" / "sample" / "tiny.yaml").write_text("steps: 3")
    assert merge(SampleConfig, ["configs/sample/tiny.yaml"]).steps == 3
    assert shipped(ROOT / "configs") == ROOT / "configs"


@pytest.mark.parametrize(("text", "name"), [
    ("cat", "cat"), ("teddy bear", "teddy_bear"), ("cup/mug", "cup_mug"), ("../../etc", "etc"), ("..", "run"),
    ("a\x00b\nc", "a_b_c"), ("C:\\x", "C_x"), ("кошка-1", "кошка-1"), ("", "run"), ("x" * 300, "x" * 120),
    ("猫" * 300, "猫" * 40)])
def test_any_text_names_one_folder(tmp_path: Path, text: str, name: str) -> None:
    assert folder_name(text, "run") == name
    (tmp_path / f"2026-01-31T12-00-00_{name}-12").mkdir()
