"""Tests of runs that end early and go on: signals at every stage, values that are not finite, other bases, photos."""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Call, SmallWorld, contents, run_until
from PIL import Image
from pytorch_lightning.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file

from ldm.customization.delta import Concept
from ldm.customization.finetune import ConceptFinetune
from ldm.saving import save_safetensors
from ldm.signals import ENDING, Interrupt, heeded
from ldm.training.callbacks import Preview
from ldm.training.run import Run, fine_tune
from ldm.training.run_folder import claim_run_folder
from ldm.training.trainer import global_rank
from ldm.util import UserError

STEPS = 5


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C be heard also where the tests run in the background, whose jobs the shell tells to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal when a method is called for the `call`-th time."""
    original, calls = getattr(owner, name), []

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, method)


def same_tensors(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of five steps of two micro-steps that nobody interrupts."""
    return fine_tune(small_world.train_config(tmp_path_factory.mktemp("whole"), f"method.steps={STEPS}",
                                              "method.accumulate=2", "trainer.save_every=10"))


# Signals.

@pytest.mark.parametrize(("owner", "name", "call", "number", "step"), [
    (ConceptFinetune, "training_step", 7, signal.SIGTERM, 3),                  # at the first half of step 4: at once
    (ConceptFinetune, "training_step", 6, signal.SIGINT, 2),                   # at the second half of step 3
    (ConceptFinetune, "on_before_optimizer_step", 3, signal.SIGTERM, 3),       # step 3 is finished first
    (ConceptFinetune, "on_before_optimizer_step", 4, signal.SIGUSR1, 4),
    (Concept, "save", 1, signal.SIGTERM, 2), (Preview, "draw", 1, signal.SIGTERM, 4)])
def test_a_run_ended_by_a_signal_goes_on_as_if_it_had_not_been(
        small_world: SmallWorld, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str,
        call: int, number: int, step: int) -> None:
    """To the bit, wherever in a step of two micro-steps the signal comes."""
    every = 2 if owner is Concept else 4
    config = small_world.train_config(
        tmp_path, f"method.steps={STEPS}", "method.accumulate=2", f"trainer.save_every={every}", "preview.every=4",
        *(["preview.prompts=['a {} in the snow']"] if owner is Preview else []))
    before = [signal.getsignal(number) for number in ENDING]
    with monkeypatch.context() as patch, pytest.raises(Interrupt) as ended:
        signal_at(patch, owner, name, call, number)
        fine_tune(config)
    (folder,) = tmp_path.iterdir()
    assert ended.value.status == 128 + number and [signal.getsignal(number) for number in ENDING] == before
    assert str(ended.value) == (f"interrupted and saved at step {step}; go on with: bash train.sh -r {folder}   "
                                f"(or: python scripts/train.py -r {folder})")
    assert (folder / "checkpoints" / f"step-{step:06d}.safetensors").exists() and not list(folder.rglob("*.part"))
    resumed = fine_tune(config, resume=folder)
    assert same_tensors(resumed.concept, whole.concept)
    states = [torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True) for run in (resumed, whole)]
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert all(torch.equal(moments[0][index][key], value) for index, state in moments[1].items()
               for key, value in state.items())


@pytest.mark.parametrize(("owner", "name"), [(ConceptFinetune, "_moments"), (ConceptFinetune, "__init__")])
def test_a_signal_before_the_first_step_saves_nothing(small_world: SmallWorld, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch, call_script: Call, owner: type,
                                                      name: str) -> None:
    signal_at(monkeypatch, owner, name, 1)
    outcome = call_script("train", "-b", *small_world.training_files, "-l", tmp_path)
    *bar, sentence = outcome.err.splitlines()
    assert outcome.status == 143 and "Traceback" not in outcome.err
    assert sentence.startswith("interrupted") and not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("*.part"))
    assert ("before the first step" in sentence) == (name == "_moments")


def test_an_error_a_signal_caused_is_not_told_as_one(call_script: Call, small_world: SmallWorld,
                                                     monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the middle of reading a file, safetensors makes a ValueError of any exception."""
    def torn(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise UserError("checkpoint 'x' cannot be read") from None

    monkeypatch.setattr("ldm.training.setup.build_model", torn)
    outcome = call_script("train", "-b", *small_world.training_files, "-l", tmp_path)
    assert (outcome.status, outcome.err) == (130, "interrupted; what was saved before is intact.\n")


def test_ctrl_c_while_a_script_imports_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    code = f"import sys; from ldm import cli; sys.path.insert(0, {str(tmp_path)!r}); import torch"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode in (130, -signal.SIGINT)
    assert ended.stderr == "interrupted; what was saved before is intact.\n"


def test_a_full_disk_at_the_end_is_said(small_world: SmallWorld, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.saving.save_file", full)
    signal_at(monkeypatch, ConceptFinetune, "training_step", 2)
    with pytest.raises(Interrupt, match="interrupted, and .* could not be written .*No space left") as ended:
        fine_tune(small_world.train_config(tmp_path, "trainer.save_every=9"))
    assert ended.value.status == 143 and not list(tmp_path.rglob("*.ckpt"))


IMPORTING = """
import sys
from ldm import cli
from ldm.signals import heeded

def main(arguments):
    with heeded():
        import interrupted_meanwhile
    print("it went on")

cli.run(main)
"""


def test_a_signal_while_a_module_is_imported_ends_the_process(tmp_path: Path) -> None:
    """A module of C++ would abort it where an exception reaches it as it loads, so nothing is raised there."""
    module = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nfinally:\n    print('it was raised')\n"
    (tmp_path / "interrupted_meanwhile.py").write_text(module)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", IMPORTING], env=os.environ | {"PYTHONPATH": path}, text=True,
                          capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted; what was saved before is intact.\n")


def test_what_the_starter_told_a_process_to_ignore_is_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_slurms_signal_saves_and_does_not_requeue(small_world: SmallWorld, tmp_path: Path, monkeypatch) -> None:
    """Lightning would write a file of its own that nothing goes on from, and call scontrol."""
    for name, value in (("JOB_NAME", "train"), ("NTASKS", "1"), ("JOB_ID", "7"), ("PROCID", "0"), ("LOCALID", "0"),
                        ("NODEID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SLURMEnvironment.detect()
    requeue = "pytorch_lightning.trainer.connectors.signal_connector.call"
    monkeypatch.setattr(requeue, lambda *_: pytest.fail("it called scontrol"))
    signal_at(monkeypatch, ConceptFinetune, "training_step", 2, signal.SIGUSR1)
    with pytest.raises(Interrupt, match="saved at step 1"):
        fine_tune(small_world.train_config(tmp_path, "trainer.save_every=9"))
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_a_job_that_slurm_starts_again_goes_on_with_its_own_run(small_world: SmallWorld, whole: Run, tmp_path: Path,
                                                                 monkeypatch, capsys) -> None:
    config = small_world.train_config(tmp_path, f"method.steps={STEPS}", "method.accumulate=2",
                                      "trainer.save_every=10")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with monkeypatch.context() as patch, pytest.raises(Interrupt, match=r"\(or: scontrol requeue 4711\)"):
        signal_at(patch, ConceptFinetune, "training_step", 7, signal.SIGUSR1)
        fine_tune(config)
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [*sys.argv, "another command"])
        patch.setenv("SLURM_RESTART_COUNT", "1")
        assert fine_tune(config).folder != folder
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    resumed = fine_tune(config)
    assert resumed.folder == folder and same_tensors(resumed.concept, whole.concept)
    capsys.readouterr()
    assert fine_tune(config).concept == resumed.concept and "is finished" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")       # the same command in the same job, but never started again
    assert fine_tune(config).folder != folder


@pytest.mark.parametrize(("environment", "rank"), [
    ({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"NODE_RANK": "2", "LOCAL_RANK": "1"}, 5),
    ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3",
      "SLURM_LOCALID": "1"}, 3),
    ({"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, 2)])
def test_processes_are_counted_over_all_machines(environment: dict[str, str], rank: int, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert global_rank(2) == rank


def test_two_machines_share_a_folder_a_voice_and_class_pictures(small_world: SmallWorld, tmp_path: Path) -> None:
    """As `srun` starts the script on two nodes, here on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
           "SLURM_NNODES": "2", "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0", "MASTER_PORT": str(port),
           "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    options = ["trainer.num_nodes=2", "method.steps=2", "preview.prompts=[]", "data.reg.mode=generate",
               "data.reg.num=2", "data.reg.steps=2", f"data.reg.root={tmp_path}", "-l", tmp_path / "logs"]
    command = [sys.executable, ROOT / "scripts" / "train.py", "-b", *small_world.training_files, *options]
    nodes = [subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=os.environ | job | {"SLURM_PROCID": rank, "SLURM_NODEID": rank})
             for rank in ("0", "1")]
    (first, first_err), (second, second_err) = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], first_err + second_err
    (folder,) = (tmp_path / "logs").iterdir()
    (images,) = (tmp_path / "generated").iterdir()
    assert first.count(f"concept file: {folder}/checkpoints/step-000002.safetensors") == 1 and second == ""
    assert first_err.count("drawing 'photo of") and "drawing" not in second_err
    assert (folder / "checkpoints" / "step-000002.safetensors").is_file()
    assert (images / "images.txt").read_text().count("\n") == 2


def test_states_are_equal_to_the_byte_and_need_no_other_folder(small_world: SmallWorld, whole: Run, tmp_path: Path,
                                                              monkeypatch) -> None:
    """Lightning would write them to TMPDIR first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    again = fine_tune(small_world.train_config(tmp_path / "again", f"method.steps={STEPS}", "method.accumulate=2",
                                               "trainer.save_every=10"))
    states = [run.folder / "checkpoints" / "last.ckpt" for run in (whole, again)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_what_comes_to_nothing_leaves_no_folder(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        fine_tune(small_world.train_config(tmp_path / "logs", f"concepts.0.regularization={tmp_path / 'none'}"))
    assert not list((tmp_path / "logs").iterdir())


def test_runs_of_one_second_and_name_have_folders_of_their_own(small_world: SmallWorld, tmp_path: Path) -> None:
    config = small_world.train_config(tmp_path)
    folders = [claim_run_folder(config) for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


def test_a_killed_process_leaves_what_the_next_goes_on_from(small_world: SmallWorld, tmp_path: Path) -> None:
    """SIGTERM from outside, anywhere in training."""
    settings = ["method.steps=12", "preview.prompts=[]", "trainer.save_every=3"]
    stopped = run_until(["scripts/train.py", "-b", *small_world.training_files, *settings, "-l", tmp_path / "logs"],
                        lambda: any(tmp_path.rglob("last.ckpt")), signal.SIGTERM)
    (folder,) = (tmp_path / "logs").iterdir()
    assert stopped.returncode == 143 and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("go on with: bash train.sh -r") == 1
    configs = small_world.train_config(tmp_path, *settings), small_world.train_config(tmp_path / "whole", *settings)
    resumed, whole = fine_tune(configs[0], resume=folder), fine_tune(configs[1])
    assert same_tensors(resumed.concept, whole.concept)


# Values that are not finite.

def test_a_loss_that_is_not_finite_stops_the_run(small_world: SmallWorld, tmp_path: Path, call_script: Call,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of step 3 loses its number; what step 2 left is kept to the byte."""
    original, calls = ConceptFinetune.training_step, []

    def step(self: ConceptFinetune, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(self, *arguments) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(ConceptFinetune, "training_step", step)
    outcome = call_script("train", "-b", *small_world.training_files, "method.steps=4", "method.accumulate=2",
                          "trainer.save_every=2", "preview.prompts=[]", "-l", tmp_path)
    (folder,) = tmp_path.iterdir()
    kept = folder / "checkpoints" / "step-000002.safetensors"
    assert outcome.status == 1 and outcome.err.splitlines()[-1] == (
        f"error: the loss is nan in step 3 at learning rate 0.001 and 0.01 ('{kept}' and last.ckpt are kept); lower "
        "method.learning_rate.")
    assert set(contents(folder / "checkpoints")) == {"step-000002.safetensors", "last.ckpt"} and len(calls) == 6
    assert torch.load(kept.parent / "last.ckpt", weights_only=True)["global_step"] == 2
    fine_tune(small_world.train_config(tmp_path, "method.steps=3"), resume=folder)


def test_a_rate_that_is_too_high_ends_in_a_sentence(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(loss is (nan|inf)|values that are not finite).*nothing was saved before"):
        fine_tune(small_world.train_config(tmp_path, "method.learning_rate=1e20", "method.steps=9",
                                           "trainer.save_every=9"))
    assert not list(tmp_path.rglob("*.safetensors")) + list(tmp_path.rglob("*.ckpt"))


def test_a_value_lost_in_the_last_step_is_not_written(small_world: SmallWorld, tmp_path: Path, monkeypatch) -> None:
    """Its loss was finite: it was computed before the step."""
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Callable) -> Any:
        loss = original(self, closure)
        group = self.param_groups[1]
        if self.state[group["params"][0]]["step"] == 2:
            group["params"][0].data[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="the state of step 2 at .*step-000001.safetensors' and last.ckpt are kept.* in "
                                        "words.0;"):
        fine_tune(small_world.train_config(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert set(contents(folder / "checkpoints")) == {"step-000001.safetensors", "last.ckpt"}


@pytest.fixture
def run_copy(small_run: Run, tmp_path: Path) -> Path:
    """A run of two steps that a test may change."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    return tmp_path / "run"


def change_state(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what a run goes on from."""
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state["state_dict"]["words.0"].fill_(float("nan")), "values that are not finite, in words.0;"),
    (lambda state: state["optimizer_states"][0]["state"][1]["exp_avg"].fill_(float("inf")),
     "values that are not finite, in optimizer.1.exp_avg;"),
    (lambda state: state.pop("optimizer_states"), "was not written by a run"),
    (lambda state: state.update(global_step=-5), "was not written by a run"),
    (lambda state: state.update(global_step="many"), "was not written by a run"),
    (lambda state: state.update(loops=[]), "was not written by a run"),
    (lambda state: state.update(ConceptData={"base": 1}), "was not written by a run"),
    (lambda state: state.update(ConceptData={"base": {"key": 1, "text": "small"}}), "was not written by a run"),
    (lambda state: state.update(state_dict={"words.0": "a"}), "was not written by a run")])
def test_a_broken_state_is_refused_before_any_work(small_world: SmallWorld, run_copy: Path, tmp_path: Path, change,
                                                   message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_state(run_copy, change)
    monkeypatch.setattr("ldm.training.setup.build_model", lambda *_: pytest.fail("it built a model"))
    with pytest.raises(UserError, match=message):
        fine_tune(small_world.train_config(tmp_path, "method.steps=3"), resume=run_copy)


def test_a_finished_run_is_told_at_once(small_world: SmallWorld, small_run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ldm.training.setup.build_model", lambda *_: pytest.fail("it built a model"))
    with pytest.raises(UserError, match="is at step 2 already; method.steps is 2"):
        fine_tune(small_world.train_config(tmp_path), resume=small_run.folder)


# The same run.

def another_base(world: SmallWorld, folder: Path) -> str:
    state = load_file(world.checkpoint)
    name = "model.diffusion_model.out.2.bias"
    save_safetensors(folder / "other.safetensors", state | {name: state[name] + 0.1})
    return f"base.ckpt={folder / 'other.safetensors'}"


def photos(folder: Path, first: int) -> Path:
    """Writes two photos; those of another `first` color differ in nothing else."""
    folder.mkdir(parents=True)
    for index in range(2):
        Image.fromarray(np.full((32, 32, 3), first + index, np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("earlier_version", [False, True])
@pytest.mark.parametrize("changed", ["base", "noun", "words", "photos", "class images"])
def test_a_run_goes_on_as_the_same_only(small_world: SmallWorld, run_copy: Path, tmp_path: Path, capsys,
                                        changed: str, earlier_version: bool) -> None:
    """An earlier version's state does not say what it is about; the concept file beside it does, but for images."""
    if earlier_version:
        change_state(run_copy, lambda state: state.pop("ConceptData"))
    other = photos(tmp_path / "photos", 70)
    override, message = {
        "base": (another_base(small_world, tmp_path), r"the base 'small' \(\w{16}\), and this is 'small' \(\w{16}\)"),
        "noun": ("concepts.0.class_noun=dog",
                 "the concepts '<new1> <new2> cat', and this is '<new1> <new2> dog'"),
        "words": ("concepts.0.words=[<a>,<b>]", "the concepts '<new1> <new2> cat', and this is '<a> <b> cat'"),
        "photos": (f"concepts.0.images={other}", r"the photos 2 \(\w{16}\), and this is 2 \("),
        "class images": (f"concepts.0.regularization={other}", r"the class images 3 \(\w{16}\), and this is 2 \("),
    }[changed]
    config = small_world.train_config(tmp_path, "method.steps=3", override)
    unknown = earlier_version and changed in ("photos", "class images")
    before = contents(run_copy)
    if not unknown:
        with pytest.raises(UserError, match=f"was trained with {message}.*; give what .* with --insist"):
            fine_tune(config, resume=run_copy)
        assert contents(run_copy) == before
    fine_tune(config, resume=run_copy, insist=True)
    assert (f"warning: the run in '{run_copy}' was trained with" in capsys.readouterr().out) == (not unknown)


def test_the_same_base_under_another_name_is_the_same(small_world: SmallWorld, run_copy: Path, tmp_path: Path) -> None:
    copy = shutil.copy(small_world.checkpoint, tmp_path / "copy.safetensors")
    fine_tune(small_world.train_config(tmp_path, "method.steps=3", f"base.ckpt={copy}", "base.name=copy"),
              resume=run_copy)


def test_insisting_from_the_command_line(small_world: SmallWorld, run_copy: Path, call_script: Call) -> None:
    arguments = ["-r", run_copy, "method.steps=3", "--class_noun", "dog"]
    assert "with --insist" in call_script("train", *arguments).error
    assert call_script("train", *arguments, "--insist").status == 0
