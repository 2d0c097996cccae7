"""What several test files share: a very small world that trains and samples in seconds, scripts run in-process."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ldm import cli
from ldm.base import build_model
from ldm.checkpoint import load_state
from ldm.config import SampleConfig, TrainConfig
from ldm.config_files import merge
from ldm.evaluation.judge import AttributeClassifier, Judge, save_judge
from ldm.evaluation.small_clip import TEXT_PREFIX, SmallCLIP, embedded, pack_small_clip
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.saving import save_safetensors
from ldm.training.run import Run, fine_tune
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
METHOD = """
method: {words: [<new1>, <new2>], initial_words: [ucd, random], prefix: a, suffix: ., steps: 2, batch_size: 1,
         learning_rate: 1.0e-3}
trainer: {accelerator: cpu, save_every: 1, save_dtype: fp32}
preview: {prompts: ["a {} in the snow"], steps: 2, agg_time: 0.5}
"""
SAMPLING = """
steps: 4
eta: 0.0
scale: 3.0
n_samples: 1
seed: 5
device: cpu
dci: {agg_lambda: [1.0], agg_time: 0.5}
"""

LABELS = {"noun": ("cat", "fish"), "scene": ("snow", "beach"), "style": ("photo",), "colour": ("red", "green")}
PHRASES = {"scene": {"snow": ["in the snow"], "beach": ["on the beach"]}, "style": {}, "colour": {"red": ["red"]}}
TEXT = {"version": "tiny", "width": 256, "layers": 4, "heads": 4}

SCRIPTS = {name: importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
           for name in ("train", "sample", "retrieve", "evaluate", "tradeoff", "convert", "compress", "merge", "export",
                        "benchmark")}

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"      # the processes that tests start compute with one thread too


@dataclass(frozen=True)
class SmallWorld:
    """A model of SD v1's classes at 32 px with random weights, two photos of a thing, three of its class."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The model's weights."""
        return self.folder / "small.safetensors"

    @property
    def photos(self) -> Path:
        """Folder of two reference photos."""
        return self.folder / "photos"

    @property
    def training_files(self) -> list[Path]:
        """The configuration files of a run of two steps."""
        return [self.folder / f"{name}.yaml" for name in ("model", "method", "concept")]

    @property
    def sampling_files(self) -> list[Path]:
        """The configuration files of a sampling run of four steps."""
        return [self.folder / f"{name}.yaml" for name in ("model", "sampling")]

    def train_config(self, logdir: Path, *overrides: str) -> DictConfig:
        """Merges the configuration of a training run without images to watch it by."""
        overrides = ("preview.prompts=[]", *overrides, f"trainer.logdir={logdir}")
        return merge(TrainConfig, self.training_files, overrides)

    def sample_config(self, *overrides: str) -> DictConfig:
        """Merges the configuration of a sampling run."""
        return merge(SampleConfig, self.sampling_files, overrides)

    def build(self) -> tuple[LatentDiffusion, dict[str, str]]:
        """Builds the model again, with its identity."""
        config = self.sample_config()
        return build_model(config.model, config.base)


def small_model_config() -> DictConfig:
    """Returns configs/model/tiny.yaml with everything made smaller."""
    config = OmegaConf.load(ROOT / "configs" / "model" / "tiny.yaml")
    params = config.model.params
    params.image_size, params.scale_factor = 8, 0.5
    params.unet_config.params.update(image_size=8, model_channels=32, num_head_channels=16, context_dim=32)
    params.first_stage_config.params.ddconfig.update(ch=8, resolution=32)
    params.cond_stage_config.params.update(width=32, layers=1, heads=2)
    return config


@torch.no_grad()
def random_weights(model: LatentDiffusion, seed: int) -> None:
    """Fills layers that start at zero with small values and makes cross-attention choosy, so that words matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if ".attn2.to_" in name:
            parameter.mul_(4.0)


def write_photos(folder: Path, count: int, seed: int) -> None:
    """Writes colorful photos of 40 x 32 px, no two alike."""
    folder.mkdir()
    for index, colors in enumerate(np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), np.uint8)):
        Image.fromarray(colors).resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return make_small_world(tmp_path_factory.mktemp("small_world"))


def make_small_world(folder: Path) -> SmallWorld:
    """Fills a folder with a model, images and configurations."""
    world = SmallWorld(folder)
    config = small_model_config()
    torch.manual_seed(11)
    model = instantiate_from_config(config.model)
    random_weights(model, seed=12)
    save_safetensors(world.checkpoint, model.state_dict())
    config.base = {"ckpt": str(world.checkpoint), "name": "small"}
    OmegaConf.save(config, world.folder / "model.yaml")
    write_photos(world.photos, 2, seed=1)
    write_photos(world.folder / "class", 3, seed=2)
    concept = {"name": "thing", "images": str(world.photos), "class_noun": "cat",
               "regularization": str(world.folder / "class")}
    OmegaConf.save({"concepts": [concept]}, world.folder / "concept.yaml")
    (world.folder / "method.yaml").write_text(METHOD)
    (world.folder / "sampling.yaml").write_text(SAMPLING)
    return world


@pytest.fixture(scope="session")
def small_run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two steps on the small world."""
    return fine_tune(small_world.train_config(tmp_path_factory.mktemp("small_run")))


@pytest.fixture(scope="session")
def metric_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_metric_files(tmp_path_factory.mktemp("metrics"))


def make_metric_files(folder: Path) -> dict[str, Path]:
    """Writes a judge and a small CLIP with random weights, the CLIP's text tower being the embedded model's."""
    torch.manual_seed(3)
    judge = save_judge(Judge(AttributeClassifier(LABELS), PHRASES, {"noun": 0.5}, 4), folder / "judge.safetensors")
    clip = SmallCLIP(FrozenCLIPEmbedder("tiny", width=256, layers=1, heads=4), 256, dim=8)
    state = {key: value for key, value in clip.state_dict().items() if not key.startswith("text.")}
    shipped = load_state(embedded("model.safetensors"))
    state |= {key.replace(TEXT_PREFIX, "text."): value for key, value in shipped.items() if key.startswith(TEXT_PREFIX)}
    return {"judge": judge, "small_clip": pack_small_clip(state, TEXT, folder / "clip.safetensors")}


@pytest.fixture
def metric_options(metric_files: dict[str, Path]) -> list[str]:
    return ["--metrics", "judge", "small_clip", "--metric_weights", *(f"{k}={v}" for k, v in metric_files.items())]


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, which must be an error's sentence."""
        assert self.status == 1, (self.status, self.out, self.err)
        (line,) = self.err.splitlines()
        assert line.startswith("error: ") and "Traceback" not in self.out
        return line


Call = Callable[..., Outcome]


def load_script(name: str) -> ModuleType:
    """Imports a script again, as a process of its own would."""
    script = importlib.util.module_from_spec(SCRIPTS[name])
    SCRIPTS[name].loader.exec_module(script)
    return script


@pytest.fixture
def call_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Returns a function that runs a script inside this process, as its command line would."""
    def run(name: str, *arguments: object) -> Outcome:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        script = load_script(name)
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.run(script.main)
        return Outcome(ended.value.code, *capsys.readouterr())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_until(command: Sequence[object], ready: Callable[[], bool], number: int) -> subprocess.CompletedProcess[str]:
    """Starts Python in the repository, sends it a signal when it is ready, and waits for the end of it."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while not ready() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
