"""Tests of scripts/train.py and scripts/sample.py: what they write, familiar flags, house rules."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, Call, Outcome, SmallWorld, contents
from omegaconf import OmegaConf
from PIL import Image

from ldm.config import SampleConfig, TrainConfig
from ldm.config_files import merge
from ldm.customization.delta import load_concept
from ldm.sheets import read_settings
from ldm.training.run import Run


def start(*arguments: object) -> Outcome:
    """Runs Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    return Outcome(result.returncode, result.stdout, result.stderr)


# End to end.

@pytest.fixture(scope="module")
def trained(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of scripts/train.py as a process, with a preview at each of its two steps."""
    logs = tmp_path_factory.mktemp("my logs")
    outcome = start("scripts/train.py", "-b", *small_world.training_files, "preview.every=1", "-l", logs,
                    "-n", "my run/1")
    assert outcome.status == 0, outcome.err
    (folder,) = logs.iterdir()
    return folder, outcome


def test_training_from_the_command_line(trained: tuple[Path, Outcome], small_world: SmallWorld) -> None:
    folder, outcome = trained
    assert set(contents(folder)) == {
        "checkpoints/step-000001.safetensors", "checkpoints/step-000002.safetensors", "checkpoints/last.ckpt",
        "configs/project.yaml", "command.txt", "images/references.png", "images/references/000.png",
        "images/references/001.png", "images/preview-000001.png", "images/preview-000002.png",
        "metrics/metrics.csv"}
    assert folder.name.endswith("_my_run_1")
    command = (folder / "command.txt").read_text()
    assert "scripts/train.py -b" in command and "preview.every=1" in command and "'my run/1'" in command
    header, row = (folder / "metrics" / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert values["step"] == "1" and 0.1 < float(values["loss"]) < 100
    assert float(values["learning_rate"]) == pytest.approx(1e-3) and float(values["seconds_per_step"]) > 0
    moved = {kind: float(values[f"moved_{kind}"]) for kind in ("weights", "words", "contexts")}
    lines = outcome.out.splitlines()
    assert f"concept file: {folder / 'checkpoints' / 'step-000002.safetensors'}" in lines
    assert f"images:     {folder / 'images' / 'preview-000002.png'}" in lines
    assert lines[-1] == (f"next:         CKPT={small_world.checkpoint} "
                         f"CONCEPT='{folder / 'checkpoints' / 'step-000002.safetensors'}' bash inference.sh")
    assert any(line.startswith("thing: regularization: 3 image(s)") for line in lines)
    assert "method: ico; each step: 1 reference and as many regularization images of weight 1" in lines
    assert "effective learning rate: 0.001 for K/V, 0.001 for words, 0.01 for contexts; 2 steps" in lines
    assert (f"moved, as shares of their norm: K/V {100 * moved['weights']:.1f} %, words {100 * moved['words']:.1f} %, "
            f"contexts {100 * moved['contexts']:.1f} %") in lines
    assert load_concept(folder / "checkpoints" / "step-000002.safetensors").info["moved"] == pytest.approx(moved)
    assert "fine-tuning: 100%" in outcome.err and "loss=" in outcome.err and "warning" not in outcome.err.lower()
    with Image.open(folder / "images" / "preview-000002.png") as page:     # fine-tuned, and DCI at two strengths
        assert page.width == 3 * (160 + 8) + 8


def test_the_saved_configuration_is_the_run(trained: tuple[Path, Outcome], small_world: SmallWorld) -> None:
    folder, _ = trained
    config = merge(TrainConfig, [folder / "configs" / "project.yaml"])
    assert config == merge(TrainConfig, small_world.training_files,
                           ["preview.every=1", f"trainer.logdir={folder.parent}", "name=my run/1"])


def test_sampling_from_the_command_line(trained: tuple[Path, Outcome], small_world: SmallWorld,
                                        tmp_path: Path) -> None:
    folder, _ = trained
    prompts, outdir = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a {} in the snow\n\na <new1> <new2> cat on the beach\n")
    outcome = start("scripts/sample.py", "-b", *small_world.sampling_files, "dci.agg_lambda=[0.0,1.0]",
                    "--from-file", prompts, "--delta_ckpt", folder / "checkpoints" / "step-000002.safetensors",
                    "--outdir", outdir, "--save_masks", "--share_guidance", "false")
    assert outcome.status == 0, outcome.err
    texts = ("000-00-a-in-the-snow", "001-00-a-cat-on-the-beach")
    images = [f"samples/{text}-{way}.png" for text in texts for way in ("plain", "lambda+0.00", "lambda+1.00")]
    assert set(contents(outdir)) == {*images, "grid.png", "masks/000.png", "masks/001.png", "config.yaml"}
    assert f"images: 6 in {outdir / 'samples'}" in outcome.out
    assert f"sheet:    {outdir / 'grid.png'}" in outcome.out
    assert "warning" not in outcome.err.lower() and "sampling: 100%" in outcome.err
    settings = read_settings(outdir / images[2])
    assert (settings["strength"], settings["seed"], settings["dci"]["guidance"]) == (1.0, 5, "separate")
    with Image.open(outdir / images[0]) as image:
        assert image.size == (32, 32)
    with Image.open(outdir / "grid.png") as page:                           # reference, fine-tuned, two strengths
        assert page.width == 4 * (160 + 8) + 8
    merge(SampleConfig, [outdir / "config.yaml"])


def test_importing_the_commands_is_light_and_errors_are_one_line(small_world: SmallWorld) -> None:
    code = ("import runpy, sys, ldm.cli, ldm.config\n"
            "print(sorted({'open_clip', 'clip_retrieval', 'wandb', 'diffusers', 'cv2'} & set(sys.modules)))\n"
            "sys.argv[:] = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    outcome = start("-c", code, "scripts/sample.py", "-b", *small_world.sampling_files, "--prompt", "a cat",
                    "--ckpt", small_world.folder / "none.ckpt")
    assert outcome.out == "[]\n"
    assert "checkpoint" in outcome.error and "does not exist" in outcome.error


@pytest.mark.parametrize(("script", "entry"), [
    ("sample", "--ddim_steps DDIM_STEPS sampling steps; more take longer (steps; default: 50; SD v1: 200)"),
    ("sample", "--H H of images in px; null is the model's own (height) --W"),
    ("sample", "(dci.agg_lambda; default: [0.0, 1.0, 2.0]; SD v1: [0.0])"),
    ("sample", "left out: configs/sample-tiny.yaml; SD v1: configs/sample-sd-v1.yaml"),
    ("sample", "--from_file FROM_FILE a file with one prompt per line"), ("sample", "--skip_grid write no sheet --"),
    ("train", "--init_ctx INIT_CTX words the prefix contexts start from (method.prefix; default: a) --"),
    ("train", "where run folders go (trainer.logdir; default: logs) -s"),
    ("train", "what the thing is, e.g. 'tortoise plushy' (concepts.0.class_noun; default: teapot)"),
    ("evaluate", "images per prompt, by seeds (n_samples; default: 1)"),
    ("evaluate", "(default: outputs/evaluation)"),
    ("tradeoff", "usage: tradeoff.py [claim NAME ...] [options] [key=value ...]")])
def test_help_says_what_keys_mean_and_what_will_be_used(call_script: Call, script: str, entry: str) -> None:
    outcome = call_script(script, "--help")
    text = " ".join(outcome.out.split())
    assert outcome.status == 0 and entry in text
    assert "default: None" not in text and "default: False" not in text


def test_help_is_the_same_from_another_folder(call_script: Call, monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path) -> None:
    here = call_script("sample", "--help").out
    monkeypatch.setattr("conftest.ROOT", tmp_path)       # where scripts are called from
    assert call_script("sample", "--help").out == here


def test_what_all_commands_import_brings_no_torch() -> None:
    assert start("-c", "import sys, ldm.cli; print('torch' in sys.modules)").out == "False\n"


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with the two commands, whose Python writes down its arguments and does nothing else."""
    folder = tmp_path / "the repository"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "environment.sh").write_text(f"PYTHON={shlex.quote(str(folder / 'python'))}\n")
    (folder / "python").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" > arguments\n")
    (folder / "python").chmod(0o755)
    for name in ("train.sh", "inference.sh"):
        shutil.copy(ROOT / name, folder)
    return folder


def shell(folder: Path, command: str) -> tuple[list[str], list[str]]:
    """Runs a command line and returns what it prints and the arguments that Python got."""
    result = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.splitlines(), (folder / "arguments").read_text().splitlines()


def next_line(lines: Sequence[str]) -> str:
    """Returns the command a run ends with."""
    return next(line for line in lines if line.startswith("next:")).removeprefix("next:")


def test_what_the_commands_print_can_be_run(commands: Path) -> None:
    """Base, further options and odd file names are in the lines they print."""
    first = "CKPT='my sd.ckpt' CONCEPT='logs/my run/checkpoints/a.ckpt' bash inference.sh --class_noun 'plush toy'"
    lines, arguments = shell(commands, first)
    assert shlex.split(lines[0]) == ["+", "python", *arguments] and arguments[0] == "scripts/sample.py"
    assert arguments[arguments.index("--outdir") + 1] == "outputs/my run" and lines[-1].startswith("next:")
    file, prompt = ["--from-file", "configs/prompts/tiny.txt"], ["--prompt", "a {} in the forest"]
    place = arguments.index("--from-file")
    expected = [*arguments[:place], *prompt, *arguments[place + 2:]]
    lines, arguments = shell(commands, next_line(lines))
    assert arguments == expected and arguments[place:place + 2] != file
    lines, arguments = shell(commands, next_line(lines))              # after a prompt: more strengths of the same
    assert arguments == [*expected[:place + 2], "--agg_lambda", "-1", "0", "1", "2", *expected[place + 2:]]
    lines, arguments = shell(commands, next_line(lines))              # after those: what DCI does inside
    assert arguments[-1] == "--save_masks" and not any(line.startswith("next:") for line in lines)
    for concept, other in (("logs/x/checkpoints/a.ckpt", "striped_cat"), ("striped_cat.ckpt", "checkered_car")):
        lines, _ = shell(commands, f"CONCEPT={concept} bash inference.sh")
        arguments = shell(commands, lines[-1].removeprefix("or:"))[1]
        assert arguments[:3] == ["scripts/train.py", "-b", "configs/tiny.yaml"]
        assert arguments[-1] == f"configs/concept/brick_wall/{other}.yaml"
    lines, arguments = shell(commands, "bash train.sh")
    assert lines == ["+ python scripts/train.py"] and arguments == ["scripts/train.py"]
    lines, arguments = shell(commands, "CLASS_NOUN='plush toy' bash train.sh --caption 'a <new1> plush toy'")
    assert shlex.split(lines[0]) == ["+", "python", *arguments] and arguments[-1] == "a <new1> plush toy"


def test_the_commands_work_from_any_folder(commands: Path, tmp_path: Path) -> None:
    """What the user names is seen from where the user stands, and the lines they print can be run there."""
    home = tmp_path / "my home"
    home.mkdir()
    called = f"bash {shlex.quote(str(commands / 'train.sh'))}"
    lines, arguments = shell(home, f"CKPT=sd.ckpt DATAPATH=my_cat {called} -l runs")
    assert arguments == [str(commands / "scripts" / "train.py"), "-b", "configs/sd-v1.yaml", "--ckpt", "sd.ckpt",
                         "--datapath", "my_cat", "-l", "runs"]
    assert shlex.split(lines[0]) == ["+", "python", *arguments]
    lines, arguments = shell(home, f"CONCEPT=a.ckpt {called.replace('train', 'inference')}")
    assert arguments == [str(commands / "scripts" / "sample.py"), "--delta_ckpt", "a.ckpt", "--outdir", "outputs/a",
                         "--from-file", "configs/prompts/tiny.txt"]
    assert shell(home, next_line(lines))[1][:3] == arguments[:3]


def test_the_newest_concept_is_drawn_and_named(commands: Path) -> None:
    """Newest by its file's time, however deep its run lies; logs/ may be a link."""
    result = subprocess.run(["bash", "inference.sh"], cwd=commands, capture_output=True, text=True)
    assert result.returncode == 1 and f"no concept under '{commands}/logs'; give CONCEPT=FILE" in result.stderr
    logs = commands.parent / "elsewhere"
    (commands / "logs").symlink_to(logs)
    for age, name in enumerate(("cup/mug run", "z", "a")):
        path = logs / name / "checkpoints" / "step-000002.safetensors"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    lines, arguments = shell(commands, "bash inference.sh")
    concept = "logs/cup/mug run/checkpoints/step-000002.safetensors"
    assert arguments[1:5] == ["--delta_ckpt", concept, "--outdir", "outputs/mug run"]
    assert lines[0] == f"concept:  {concept} (the newest under logs/; CONCEPT=FILE draws another)"


# Familiar flags.

def train_settings(call_script: Call, *arguments: object):
    outcome = call_script("train", *arguments, "--print_config")
    assert outcome.status == 0, outcome.err
    return OmegaConf.create(outcome.out)


def sample_settings(call_script: Call, *arguments: object):
    outcome = call_script("sample", *arguments, "--print_config")
    assert outcome.status == 0, outcome.err
    return OmegaConf.create(outcome.out)


def test_familiar_training_flags(call_script: Call) -> None:
    config = train_settings(
        call_script, "-b", "configs/model/sd-v1.yaml", "configs/method/ico.yaml", "method.steps=7", "--ckpt",
        "sd.ckpt", "--datapath", "photos", "--reg_datapath", "real_reg/samples_x", "--reg_caption", "toy",
        "--class_noun", "plush toy", "--modifier_token", "<new1>+<new2>+<new3>", "--init_ctx", "photo of",
        "--ctx_end_init", ".", "--logdir", "runs", "--name", "me", "--seed", "3", "--method.batch_size=2")
    assert config.concepts == [{"name": "plush_toy", "images": "photos", "class_noun": "plush toy", "words": None,
                                "regularization": "real_reg/samples_x", "regularization_caption": "toy"}]
    assert config.base.ckpt == "sd.ckpt" and config.trainer.logdir == "runs" and config.trainer.seed == 3
    assert config.name == "me" and config.method.steps == 7 and config.method.batch_size == 2
    assert config.method.words == ["<new1>", "<new2>", "<new3>"]
    assert (config.method.prefix, config.method.suffix) == ("photo of", ".")


def test_untouched_training_is_the_embedded_example(call_script: Call) -> None:
    config = train_settings(call_script)
    assert config.base.ckpt is None and len(config.method.words) == 6
    assert config.concepts[0].name == "ringed_teapot"
    assert train_settings(call_script, "--class_noun", "dog").concepts[0].images == config.concepts[0].images
    assert train_settings(call_script, "--gpus", "0,").trainer.devices == 1
    assert all(train_settings(call_script, "--gpus", text).trainer.devices == 3 for text in ("0,1,2", "3"))


@pytest.mark.parametrize(("arguments", "words", "template"), [
    (["photo of a <new1> cat"], ["<new1>"], "photo of a {}"),
    (["<new1> <new2> <new3> cat"], ["<new1>", "<new2>", "<new3>"], "{}"),
    (["a <new1>+<new2> cat, outside", "--modifier_token", "<new1>+<new2>"], ["<new1>", "<new2>"], "a {}, outside"),
    (["photo of a <new1> plush toy", "--class_noun", "plush toy"], ["<new1>"], "photo of a {}")])
def test_captions_in_custom_diffusions_form(call_script: Call, small_world: SmallWorld, arguments: list[str],
                                            words: list[str], template: str) -> None:
    config = train_settings(call_script, "-b", *small_world.training_files, "--caption", *arguments)
    assert config.method.words == words and config.method.template == template


@pytest.mark.parametrize(("flags", "strengths", "chosen"), [
    (["auto"], [-1.0, 0.0, 1.0, 2.0], True), (["auto", -2, 0.5], [-2.0, 0.5], True), ([1], [1.0], False)])
def test_strengths_are_named_or_left_to_the_program(call_script: Call, flags: list, strengths: list[float],
                                                    chosen: bool) -> None:
    config = sample_settings(call_script, "--agg_lambda", *flags)
    assert (list(config.dci.agg_lambda), config.dci.choice.use) == (strengths, chosen)


def test_strengths_to_preview(call_script: Call) -> None:
    config = sample_settings(call_script, "--preview_lambda", -2, 0.5)
    assert (list(config.dci.agg_lambda), config.dci.preview) == ([-2.0, 0.5], True)
    outcome = call_script("sample", "--preview_lambda", 1, "--agg_lambda", 1, "--print_config")
    assert outcome.status == 1 and "--agg_lambda and --preview_lambda exclude each other" in outcome.err


def test_familiar_sampling_flags(call_script: Call) -> None:
    config = sample_settings(
        call_script, "--ckpt", "sd.ckpt", "--ddim_steps", 9, "--ddim_eta", 0.5, "--scale", 2, "--n_samples", 5,
        "--n_iter", 3, "--H", 64, "--W", 128, "--seed", 8, "--precision", "autocast", "--use_dci", "True",
        "--replace_noun", "dog", "--agg_lambda", -1, 0.5, "--agg_time", 0.2, "--share_guidance", "false",
        "--config", "configs/sample/paper.yaml", "dci.noise=common")
    assert (config.base.ckpt, config.steps, config.eta, config.scale) == ("sd.ckpt", 9, 0.5, 2.0)
    assert (config.n_samples, config.n_iter, config.height, config.width) == (5, 3, 64, 128)
    assert (config.seed, config.precision) == (8, "autocast")
    assert config.dci.agg_lambda == [-1.0, 0.5] and (config.dci.use, config.dci.agg_time) == (True, 0.2)
    assert (config.dci.replace_noun, config.dci.guidance, config.dci.noise) == ("dog", "separate", "common")
    assert sample_settings(call_script, "--share-guidance", "true").dci.guidance == "shared"
    assert sample_settings(call_script, "--use_dci=false").dci.use is False        # "false" is not a true text
    config = sample_settings(call_script, "--agg_lambda", 0, -1, "steps=3", "-b", "configs/model/tiny.yaml",
                             "n_samples=2", "--dci.agg_time=0.7", "--scale=2", "eta=0.5")
    assert config.dci.agg_lambda == [0.0, -1.0] and (config.steps, config.n_samples) == (3, 2)
    assert (config.dci.agg_time, config.scale, config.eta) == (0.7, 2.0, 0.5)
    for flag, sampler in (("--plms", "plms"), ("--dpm_solver", "dpm_solver")):
        config = sample_settings(call_script, "--config", "configs/sample/paper.yaml", flag)
        assert (config.sampler, config.eta) == (sampler, 0.0)


def test_spellings_and_switches_of_a_whole_run(call_script: Call, small_world: SmallWorld, small_run: Run,
                                               tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("{}\n")
    arguments = ["-b", *small_world.sampling_files, "--delta-ckpt", small_run.concept, "--skip-grid"]
    outcome = call_script("sample", *arguments, "--from_file", tmp_path / "prompts.txt", "--outdir", tmp_path / "a",
                          "--plms", "--use_dci", "0")
    assert outcome.status == 0 and set(contents(tmp_path / "a")) == {"samples/000-00--plain.png", "config.yaml"}
    outcome = call_script("sample", *arguments, "--prompt", "a {}", "--outdir", tmp_path / "b", "--dpm_solver",
                          "plain=false", "--agg-lambda=0.5")
    name = "samples/000-00-a-lambda+0.50.png"
    assert outcome.status == 0 and set(contents(tmp_path / "b")) == {name, "config.yaml"}
    assert read_settings(tmp_path / "b" / name)["sampler"] == "dpm_solver"
    outcome = call_script("sample", *arguments, "--prompt", "a {} in the snow", "--outdir", tmp_path / "c",
                          "--show_tokens")
    assert outcome.status == 0 and not (tmp_path / "c").exists()
    assert "'a <new1> <new2> cat in the snow'" in outcome.out and "'a dog in the snow'" in outcome.out
    assert [line.split()[2] for line in outcome.out.splitlines() if line.endswith("S^c: concept")] == \
        ["<new1>", "<new2>", "cat"]


def test_ctrl_c_says_how_to_go_on(call_script: Call, small_run: Run, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my run"
    shutil.copytree(small_run.folder, folder)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.training.callbacks.Progress.on_train_batch_end", interrupt)
    outcome = call_script("train", "-r", folder, "method.steps=4")
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == \
        f"interrupted and saved at step 3; go on with: bash train.sh -r '{folder}'   (or: python scripts/train.py -r " \
        f"'{folder}')"


def test_resuming_takes_no_other_configuration(call_script: Call, small_run: Run) -> None:
    outcome = call_script("train", "-r", small_run.folder, "-b", "configs/model/tiny.yaml")
    assert outcome.status == 1 and "-b has no place beside it" in outcome.err


def test_resuming_from_the_command_line(call_script: Call, small_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    before = contents(folder)
    outcome = call_script("train", "--resume", folder / "checkpoints" / "last.ckpt", "method.steps=3")
    assert outcome.status == 0, outcome.err
    after = contents(folder)
    assert after.keys() - before.keys() >= {"checkpoints/step-000003.safetensors", "metrics-1/metrics.csv"}
    assert {name for name in before if before[name] != after[name]} <= \
        {"checkpoints/last.ckpt", "images/references.png", *(f"images/references/00{i}.png" for i in (0, 1))}
    assert int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]) == 3


# House rules.

def test_scripts_are_short() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        if path.name != "environment.py":       # runs before ldm can be imported, so all it does is in it
            assert len(path.read_text().splitlines()) <= 100, path
    for name in SCRIPTS:
        assert len((ROOT / "scripts" / f"{name}.py").read_text().splitlines()) < 100


def test_pickles_are_only_loaded_restricted() -> None:
    for folder in ("ldm", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "weights_only=False" not in text and "pickle.load" not in text, path
            assert "torch.load(" not in text or path == ROOT / "ldm" / "checkpoint.py", path


def test_images_say_how_they_were_made_without_paths(small_world: SmallWorld, small_run: Run, call_script: Call,
                                                       tmp_path: Path) -> None:
    call_script("sample", "-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept, "--prompt", "{}",
                "--outdir", tmp_path, "--use_dci", "false")
    (path,) = (tmp_path / "samples").iterdir()
    text = json.dumps(read_settings(path))
    assert str(tmp_path) not in text and str(small_world.folder) not in text and '"steps": 4' in text


def test_two_samplings_into_one_folder_at_once_lose_nothing(small_world: SmallWorld, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/sample.py", "-b", *small_world.sampling_files, "--outdir", tmp_path,
               "--prompt", "a cat in the snow", "dci.use=false", "n_samples=3", "batch_size=1"]
    both = [subprocess.Popen([*map(str, command), f"seed={seed}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for seed in (10, 20)]
    ends = [process.communicate(timeout=600)[0] for process in both]
    assert all(f"images: 3 in {tmp_path}" in out for out in ends)
    images = sorted((tmp_path / "samples").iterdir())
    assert [path.name[:6] for path in images] == [f"00{run}-0{number}" for run in range(2) for number in range(3)]
    seeds = [read_settings(path)["seed"] for path in images]
    assert seeds in ([10, 11, 12, 20, 21, 22], [20, 21, 22, 10, 11, 12])
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "config-0001.yaml", "config.yaml", "grid-0001.png", "grid.png"]
