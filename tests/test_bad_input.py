"""Tests that what the scripts cannot use ends in one sentence and exit status 1, with earlier results intact."""
from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import Call, SmallWorld, contents
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm.sampling
import ldm.saving
from ldm.training.run import Run, fine_tune


class Malicious:
    """A pickle that would run code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def bad(small_world: SmallWorld, small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things no script should accept."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "unreadable", "one_good", "torn_run", "malicious_run"):
        (folder / name).mkdir()
    (folder / "unreadable" / "a.png").write_bytes(b"no image")
    (folder / "unreadable" / "b.jpg").write_bytes(b"")
    shutil.copy(small_world.photos / "0.png", folder / "one_good" / "good.png")
    (folder / "one_good" / "broken.jpg").write_bytes((small_world.photos / "0.png").read_bytes()[:200])
    weights = small_world.checkpoint.read_bytes()
    (folder / "truncated.safetensors").write_bytes(weights[: len(weights) // 2])
    torch.save({"state_dict": load_file(small_world.checkpoint)}, folder / "whole.ckpt")
    other = load_file(small_world.checkpoint)
    save_file({name: -value if ".attn2." in name else value for name, value in other.items()},
              folder / "other.safetensors")
    whole = (folder / "whole.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.ckpt").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {"a": Malicious(folder / "executed")}}, folder / "malicious.ckpt")
    (folder / "latin.txt").write_bytes(b"caf\xe9 {}\n")
    for name in ("torn_run", "malicious_run"):
        shutil.copytree(small_run.folder, folder / name, dirs_exist_ok=True)
    state = (small_run.folder / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "torn_run" / "checkpoints" / "last.ckpt").write_bytes(state[: len(state) // 2])
    shutil.copy(folder / "malicious.ckpt", folder / "malicious_run" / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize(("arguments", "message"), [
    (["concepts.0.images=BAD/none"], "image folder 'BAD/none' does not exist"),
    (["concepts.0.images=BAD/empty"], "holds no usable image (it is empty)"),
    (["concepts.0.images=BAD/unreadable"], "'a.png' is not a readable image; 'b.jpg' is empty"),
    (["concepts.0.regularization=BAD/none"], "'BAD/none' does not exist"),
    (["--datapath", "BAD/one_good"], "concepts.0.class_noun is not set"),
    (["concepts=[]"], "no concept is configured"),
    (["--ckpt", "BAD/none.ckpt"], "checkpoint 'BAD/none.ckpt' does not exist"),
    (["--ckpt", "BAD/empty.ckpt"], "is empty"), (["--ckpt", "BAD/noise.ckpt"], "cannot be read"),
    (["--ckpt", "BAD/truncated.safetensors"], "is damaged"), (["--ckpt", "BAD/truncated.ckpt"], "cannot be read"),
    (["--ckpt", "BAD/malicious.ckpt"], "names code that is not tensor data"),
    (["model.params.unet_config.params.model_channels=64"], "does not fit this architecture"),
    (["model.params={}"], "the model cannot be built from its configuration"),
    (["model.target=torch.nn.Identity"], "model.target must be a LatentDiffusion"),
    (["--resume", "BAD/empty"], "holds no run to resume"), (["--resume", "BAD/torn_run"], "resume state"),
    (["--resume", "BAD/malicious_run"], "names code that is not tensor data"),
    (["--modifier_token", "new1"], "must be in angle brackets"),
    (["--modifier_token", "<a>+<a>"], "all different"),
    (["--caption", "photo of a cat"], "must contain the concept words"),
    (["--caption", "a <new1> cat", "--modifier_token", "<new2>"], "contradicts --caption"),
    (["--gpus", "many"], "--gpus 'many'"), (["--gpus", "1,2"], "CUDA_VISIBLE_DEVICES"),
    (["--gpus", "0"], "devices is 0"), (["trainer.accelerator=abacus"], "use one of auto, cpu, gpu"),
    (["trainer.precision=64"], "use one of 32-true"), (["trainer.save_dtype=fp8"], "use fp16 or fp32"),
    (["trainer.logger=paper"], "trainer.logger 'paper' is unknown"),
    (["method.learning_rate=-1"], "method.learning_rate is -1.0"),
    (["method.prior_weight=.nan"], "prior_weight is nan"),
    (["method.steps=0"], "method.steps is 0"), (["method.train=all"], "method.train 'all' is unknown"),
    (["trainer.seed=-1"], "trainer.seed is -1; give a whole number from 0 to 4294967295"),
    (["--seed", "4294967296"], "trainer.seed is 4294967296"), (["preview.seed=-1"], "preview.seed is -1"),
    (["data.reg.seed=9223372036854775800"], "data.reg.seed is 9223372036854775800"),
    (["method.prefix_length=3"], "method.prefix_length is 3 but method.prefix 'a' has 1 tokens"),
    (["trainer.image_size=30"], "trainer.image_size is 30"),
    (["method.stepz=3"], "did you mean 'method.steps'?"), (["--seed", "one"], "--seed: invalid int value: 'one'"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"), (["-b", "BAD/none.yaml"], "does not exist"),
    (["-b", "configs/method/ico.yaml", "--datapath", "x", "--class_noun", "y"], "no model is configured")])
def test_bad_input_in_training(call_script: Call, small_world: SmallWorld, bad: Path, tmp_path: Path,
                               arguments: Sequence[str], message: str) -> None:
    logs = tmp_path / "logs"
    (logs / "earlier").mkdir(parents=True)
    (logs / "earlier" / "result").write_text("kept")
    files = [] if {"-b", "--resume"} & set(arguments) else ["-b", *small_world.training_files]
    outcome = call_script("train", *files, *(item.replace("BAD", str(bad)) for item in arguments), "-l", logs)
    assert message.replace("BAD", str(bad)) in outcome.error
    assert contents(logs)["earlier/result"] == b"kept"
    assert not [path for path in contents(logs) if path.endswith((".safetensors", ".ckpt", ".part"))]
    assert not (bad / "executed").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "there is nothing to draw"), (["--prompt", "a dog"], "'a dog' does not mention the concept"),
    (["--prompt", "a {} and a <new9>"], "unknown word <new9>; known new words: <new1>, <new2>"),
    (["--prompt", "{}", "--replace_noun", "Cat"], "auxiliary noun 'Cat' is the class noun itself"),
    (["--prompt", "{}", "--replace_noun", " "], "the auxiliary noun is empty"),
    (["--prompt", "{}", "--agg_lambda", "strong"], "--agg_lambda: invalid strength value: 'strong'"),
    (["--prompt", "{}", "--agg_lambda", "nan"], "agg_lambda nan is out of range"),
    (["--prompt", "{}", "--agg_lambda", "99"], "agg_lambda 99.0 is out of range"),
    (["--prompt", "{}", "--agg_time", "early"], "--agg_time: invalid float value"),
    (["--prompt", "{}", "--agg_time", "1.5"], "agg_time 1.5 is out of range"),
    (["--prompt", "{}", "--agg_time", "-0.1"], "agg_time -0.1 is out of range"),
    (["--prompt", "{}", "dci.agg_time=soon"], "Value 'soon'"),
    (["--prompt", "{}", "--use_dci", "maybe"], "neither true"),
    (["--prompt", "{}", "--plms", "--dpm_solver"], "exclude each other"),
    (["--prompt", "{}", "--plms", "--ddim_eta", "1"], "deterministic"),
    (["--prompt", "{}", "--seed", "100000000000000000000", "--ckpt", "BAD/none.ckpt"], "seed is 1000000000000"),
    (["--prompt", "{}", "--seed", "-1", "--ckpt", "BAD/none.ckpt"], "seed is -1; give a whole number from 0 to 922"),
    (["--prompt", "{}", "--H", "20"], "H is 20 px"), (["--prompt", "{}", "--ddim_steps", "1001"], "steps is 1001"),
    (["--from-file", "BAD/none.txt"], "does not exist"), (["--from-file", "BAD/latin.txt"], "is not UTF-8 text"),
    (["--prompt", "{}", "--delta_ckpt", "BAD/none.ckpt"], "concept file 'BAD/none.ckpt' does not exist"),
    (["--prompt", "{}", "--delta_ckpt", "BAD/truncated.safetensors"], "is damaged"),
    (["--prompt", "{}", "--delta_ckpt", "BAD/malicious.ckpt"], "names code that is not tensor data"),
    (["--prompt", "{}", "--delta_ckpt", "BAD/whole.ckpt"], "is no concept"),
    (["--prompt", "{}", "--ckpt", "BAD/truncated.ckpt"], "cannot be read"),
    (["--prompt", "{}", "--ckpt", "BAD/malicious.ckpt"], "names code that is not tensor data"),
    (["--prompt", "{}", "-b", "configs/sample/tiny.yaml"], "no model is configured"),
    (["--prompt", "{}", "-b", "configs/model/tiny.yaml", "SAMPLING", "base.ckpt=SMALL"],
     "the concept was made for the base 'small' and does not fit this model: 20 tensors differ"),
    (["--prompt", "{}", "-b", "configs/model/tiny.yaml", "SAMPLING"], "the concept was made for the base 'small'"),
    (["--prompt", "{}", "-b", "MODEL", "SAMPLING", "base.ckpt=OTHER"],
     "the concept was made for the base 'small' (")])
def test_bad_input_in_sampling(call_script: Call, small_world: SmallWorld, small_run: Run, bad: Path,
                               tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    names = {"BAD": bad, "SMALL": small_world.checkpoint, "SAMPLING": small_world.sampling_files[1],
             "MODEL": small_world.sampling_files[0], "OTHER": bad / "other.safetensors"}

    def spelled(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "earlier.png").write_text("kept")
    files = [] if "-b" in arguments else ["-b", *small_world.sampling_files]
    concept = [] if "--delta_ckpt" in arguments else ["--delta_ckpt", small_run.concept]
    outcome = call_script("sample", *files, *concept, "--outdir", tmp_path, *map(spelled, arguments))
    assert spelled(message) in outcome.error
    assert contents(tmp_path) == {"samples/earlier.png": b"kept"}
    assert not (bad / "executed").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompt", "{}", "--prompt", "a dog"], "'a dog' does not mention the concept"),
    (["--prompt", "{} and <new9>"], "unknown word <new9>"), (["--prompt", "{}", "--H", "20"], "H is 20 px"),
    (["--prompt", "snow " * 80 + "{}"], "the concept '<new1> <new2> cat' is cut off"),
    (["--prompt", "{}", "--ddim_steps", "1001"], "ddim takes at most 1000"),
    (["--prompt", "{}", "--ddim_steps", "1"], "with steps=1 and agg_time=0.5 no step has two branches"),
    (["--prompt", "{}", "--save_masks", "--use_dci", "false"], "there are no masks to draw: no image uses DCI"),
    (["--prompt", "{}", "--replace_noun", "auto", "--prompt", "a dog", "--show_tokens"], "'a dog' does not mention"),
    (["--prompt", "{}", "-b", "configs/model/tiny.yaml"], "for the base 'small' and does not fit this model")])
def test_cheap_mistakes_are_told_before_weights_are_read(call_script: Call, small_world: SmallWorld, small_run: Run,
                                                         monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                         arguments: Sequence[str], message: str) -> None:
    def build(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(ldm.sampling, "build_model", build)
    files = [] if "-b" in arguments else ["-b", *small_world.sampling_files]
    outcome = call_script("sample", *files, "--delta_ckpt", small_run.concept, "--outdir", tmp_path / "out", *arguments)
    assert message in outcome.error and not (tmp_path / "out").exists()


def test_tokens_are_shown_without_weights(call_script: Call, small_world: SmallWorld, small_run: Run) -> None:
    """Only to choose a noun by the context they are needed, and the table is the same."""
    given = ["-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--prompt", "a {}", "--show_tokens"]
    missing = "base.ckpt=none.ckpt"
    shown = call_script("sample", *given, missing, "--replace_noun", "fish")
    assert [line.split()[2:] for line in shown.out.splitlines()[-2:]] == [
        ["a", "S^a:", "context"], ["fish", "auxiliary", "noun"]]
    assert "'none.ckpt' does not exist" in call_script("sample", *given, missing, "--replace_noun", "auto").error
    assert "S^c: concept" in call_script("sample", *given, "--replace_noun", "auto").out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without CUDA")
def test_cuda_asked_for_and_absent(call_script: Call, small_world: SmallWorld, tmp_path: Path) -> None:
    train = ["train", "-b", *small_world.training_files, "--gpus", "1", "-l", tmp_path]
    sample = ["sample", "-b", *small_world.sampling_files, "device=cuda", "--prompt", "x", "--outdir", tmp_path]
    for command in (train, sample):
        assert "device 'cuda' was asked for but this machine" in call_script(*command).error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a test puts packages that are found before those installed."""
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "packages"


@pytest.mark.parametrize(("key", "message"), [("", "needs a login; run 'wandb login', or set WANDB_MODE=offline"),
                                              ("0123", None)])
def test_wandb_wants_its_login_before_any_work(call_script: Call, small_world: SmallWorld, packages: Path,
                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str,
                                               message: str | None) -> None:
    (packages / "wandb").mkdir(parents=True)
    (packages / "wandb" / "__init__.py").write_text(f"class api:\n    api_key = '{key}'\n")
    monkeypatch.setattr("ldm.training.setup.build_model", lambda *_: pytest.fail("it built a model"))
    arguments = ["train", "-b", *small_world.training_files, "trainer.logger=wandb", "-l", tmp_path / "logs",
                 "concepts.0.images=none"]                                              # what is refused next
    assert (message or "image folder 'none' does not exist") in call_script(*arguments).error
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "image folder 'none' does not exist" in call_script(*arguments).error
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed(call_script: Call, small_world: SmallWorld, packages: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A folder of the package's name, which W&B leaves where it has run, is no package."""
    (packages / kind).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(packages), *(path for path in sys.path if "site-packages" not in path)])
    arguments = ["train", "-b", *small_world.training_files, f"trainer.logger={kind}", "-l", tmp_path / "logs"]
    assert f"trainer.logger '{kind}' needs the package '{kind}'; install it" in call_script(*arguments).error
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("accelerator", "device"), [("auto", "auto"), ("cpu", "cpu"), ("gpu", "cuda"),
                                                     ("cuda", "cuda"), ("mps", "mps")])
def test_training_asks_for_the_device_that_sampling_would(small_world: SmallWorld, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch, accelerator: str,
                                                          device: str) -> None:
    asked: list[str] = []

    def choose(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr("ldm.training.setup.choose_device", choose)
    fine_tune(small_world.train_config(tmp_path, f"trainer.accelerator={accelerator}", "method.steps=1"))
    assert asked == [device]


def test_unreadable_images_are_named_and_the_rest_used(call_script: Call, small_world: SmallWorld, bad: Path,
                                                         tmp_path: Path) -> None:
    outcome = call_script("train", "-b", *small_world.training_files, f"concepts.0.images={bad / 'one_good'}",
                          "method.steps=1", "preview.prompts=[]", "-l", tmp_path)
    assert outcome.status == 0, outcome.err
    assert "thing: skipped 'broken.jpg' is truncated or cannot be read" in outcome.out
    assert "references: 1, regularization images: 3" in outcome.out


def full_disk(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


def test_disk_full_while_training(call_script: Call, small_run: Run, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    before = contents(folder)
    for owner, name in ((ldm.saving, "save_file"), (pl.Trainer, "save_checkpoint")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            outcome = call_script("train", "--resume", folder, "method.steps=3")
        *bar, last = outcome.err.splitlines()
        assert outcome.status == 1 and last.startswith("error: ") and "No space left" in last
        assert "Traceback" not in outcome.err and not any(line.startswith("error") for line in bar)
        after = contents(folder)
        assert all(after[name] == content for name, content in before.items() if name.startswith("checkpoints/"))
        assert not [name for name in after if name.endswith(".part")]
    outcome = call_script("train", "--resume", folder, "method.steps=3")            # the disk has space again
    assert outcome.status == 0 and (folder / "checkpoints" / "step-000003.safetensors").exists()


def test_disk_full_while_sampling(call_script: Call, small_world: SmallWorld, small_run: Run, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--prompt", "{}",
                 "--outdir", tmp_path]
    assert call_script("sample", *arguments).status == 0
    before = contents(tmp_path)
    monkeypatch.setattr(Image.Image, "save", full_disk)
    outcome = call_script("sample", *arguments, "--scale", "2")
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    after = contents(tmp_path)
    assert after.pop("config-0001.yaml") and after == before       # what that run would have drawn, by its numbers
