"""One fine-tuning run from configuration to concept file: images, model, Lightning trainer, run folder."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from ldm.base import build_model, image_side
from ldm.config import require, save_config
from ldm.customization.finetune import ConceptFinetune, make_scheme
from ldm.customization.ico import PromptScheme, caption_template
from ldm.data.batches import CaptionedImages, TrainingPlan
from ldm.data.captions import Captioned, captioned
from ldm.data.framing import CROPS, Framing, bars_advice, has_black_bars, load_framed
from ldm.data.images import check_color, size_of
from ldm.device import choose_device, out_of_memory
from ldm.embedded import warn_of_photos
from ldm.files import NameTaken, take_folder, write_text
from ldm.pipeline import MAX_SEED, check_seed
from ldm.sheets import save_png, sheet
from ldm.signals import Interrupt, Signals, heeded
from ldm.training.callbacks import KeepConstants, Lighten, Preview, Progress, SaveConcept, concept_file
from ldm.training.memory import MIXED, advice, check_memory
from ldm.training.regularization import MODES, join_masks, load_prior, make_prior
from ldm.training.resume import Named, Resumed, RunIdentity, StateFiles, identify, name_images, resume_state
from ldm.training.slurm import COMMAND, command_text, earlier_run, job
from ldm.util import UserError, folder_name, from_here

MOST = {"method": {"batch_size": 4096, "accumulate": 65536, "prefix_length": 75, "suffix_length": 75},
        "trainer": {"devices": 1024, "num_nodes": 1024}}     # beyond it even the plan of a step is too large
PRECISIONS = ("32-true", *MIXED)
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "mps": "mps"}     # by trainer.accelerator
LOGGERS = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}     # any of these packages


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its last concept file, its last preview."""

    folder: Path
    concept: Path
    preview: Path | None


class ConceptData(pl.LightningDataModule):
    """Gets the class images, and hands each device its share of the training plan.

    Lightning lets the first process of all `prepare_data` while the others wait, then has everyone `setup`. A plan
    starts at the step a resumed run stands at.

    Args:
        module: what is trained; the class images that its base draws are drawn before anything is learned.
        concept: the reference images.
        identity: what the run is about; `setup` adds the class images.
        ready: called with name and class images once these are known.
    """

    def __init__(self, module: ConceptFinetune, concept: CaptionedImages, config: DictConfig, identity: RunIdentity,
                 device: torch.device, ready: Callable[[Named, CaptionedImages | None], None]):
        super().__init__()
        self.module, self.concept, self.config, self.identity = module, concept, config, identity
        self.device, self.ready = device, ready
        self.side = concept.images.shape[1]
        self.regularization: CaptionedImages | None = None
        self.prepare_data_per_node = False      # the disk is shared: one process makes the images for all

    def prepare_data(self) -> None:
        make_prior(self.config, self.module.model, self.module.base, self.side, self.device)

    def setup(self, stage: str) -> None:
        self.regularization = load_prior(self.config, self.module.base, framing(self.config, self.side))
        class_pictures = name_images(self.regularization)
        self.identity = replace(self.identity, class_pictures=class_pictures)
        self.ready(class_pictures, self.regularization)

    def state_dict(self) -> dict[str, Any]:
        """Returns what Lightning saves beside the tensors: what the run is about."""
        return asdict(self.identity)

    def train_dataloader(self) -> DataLoader:
        method, trainer = self.config.method, self.trainer
        plan = TrainingPlan(self.concept, self.regularization, batch_size=method.batch_size,
                            prior_weight=method.prior_weight, flip=method.flip, seed=self.config.trainer.seed,
                            first=trainer.global_step * method.accumulate, rank=trainer.global_rank,
                            world_size=trainer.world_size)
        return DataLoader(plan, batch_size=None)


def check_config(config: DictConfig) -> None:
    """Refuses contradictions before anything is read."""
    if OmegaConf.is_missing(config, "model"):
        raise UserError("no model is configured; add configs/model/*.yaml with -b.")
    if not config.concepts:
        raise UserError("no concept is configured; add configs/concept/*.yaml with -b, or give --datapath and "
                        "--class_noun.")
    for index, concept in enumerate(config.concepts):
        for key in ("name", "images", "class_noun"):
            require(concept, index, key)
    least = {"method": {"steps": 1, "batch_size": 1, "accumulate": 1, "learning_rate": 0, "context_lr_factor": 0,
                        "weight_decay": 0, "prior_weight": 0, "prefix_length": 0, "suffix_length": 0},
             "trainer": {"devices": 1, "num_nodes": 1, "save_every": 1}}
    for part, limits in least.items():
        for key, limit in limits.items():
            value = config[part][key]
            if value is not None and not limit <= value < math.inf:
                raise UserError(f"{part}.{key} is {value}; give a finite number, at least {limit}.")
    for part, limits in MOST.items():
        for key, limit in limits.items():
            if (config[part][key] or 0) > limit:
                raise UserError(f"{part}.{key} is {config[part][key]}; give at most {limit}.")
    if config.trainer.save_dtype not in ("fp16", "fp32"):
        raise UserError(f"trainer.save_dtype '{config.trainer.save_dtype}' is unknown; use fp16 or fp32.")
    if config.trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision '{config.trainer.precision}' is unknown; "
                        f"use one of {', '.join(PRECISIONS)}.")
    check_data(config)
    check_seed("trainer.seed", config.trainer.seed, 2 ** 32 - 1)      # numpy's generator takes no more
    check_seed("preview.seed", config.preview.seed)
    check_seed("data.reg.seed", config.data.reg.seed, MAX_SEED - config.data.reg.num)
    if config.trainer.accelerator not in DEVICES:
        raise UserError(f"trainer.accelerator '{config.trainer.accelerator}' is unknown; "
                        f"use one of {', '.join(DEVICES)}.")
    check_logger(config.trainer.logger)


def check_data(config: DictConfig) -> None:
    """Refuses settings of `data` that mean nothing."""
    data = config.data
    if data.reg.mode == "retrieve":
        raise UserError("data.reg.mode is 'retrieve', and training reads folders only; retrieve images first, with "
                        "scripts/retrieve.py, and give their folder with --reg_datapath.")
    for name, value, allowed in (("crop", data.crop, CROPS), ("reg.mode", data.reg.mode, (None, *MODES))):
        if value not in allowed:
            raise UserError(f"data.{name} '{value}' is unknown; use one of {', '.join(filter(None, allowed))}.")
    check_color(data.background)
    for name in ("num", "steps", "batch_size"):
        if data.reg[name] < 1:
            raise UserError(f"data.reg.{name} is {data.reg[name]}; give at least 1.")


def framing(config: DictConfig, size: int) -> Framing:
    """Returns how images become squares of `size` px."""
    data = config.data
    return Framing(size, data.crop, data.background, data.alpha_mask, data.trim_bars)


def concept_words(config: DictConfig) -> list[list[str]]:
    """Returns every concept's words "V": its own, else the method's; a further concept's are numbered on."""
    taken = [word for concept in config.concepts for word in concept.words or ()]
    words = []
    for index, concept in enumerate(config.concepts):
        own = list(concept.words or (config.method.words if index == 0 else ()))
        fresh = (f"<new{number}>" for number in itertools.count(1))
        while not concept.words and len(own) < len(config.method.words):
            own.append(next(word for word in fresh if word not in taken and word not in config.method.words))
            taken.append(own[-1])
        words.append(own)
    return words


def read_references(config: DictConfig) -> list[Captioned]:
    """Finds every concept's reference images, naming what is skipped and counting captions where they are wanted.

    Raises:
        UserError: a concept has none, or no image has a caption though captions are wanted.
    """
    wanted = config.data.captions
    found = [captioned(Path(concept.images), captions=wanted) for concept in config.concepts]
    for concept, references in zip(config.concepts, found, strict=True):
        for item in references.skipped:
            print(f"{concept.name}: skipped {item}")
        if wanted:
            count = sum(map(bool, references.captions))
            print(f"{concept.name}: {count} of {len(references.paths)} images have a caption")
    if wanted and not any(caption for references in found for caption in references.captions):
        raise UserError("data.captions is true, but no reference image has a caption; write a.txt beside a.jpg, or "
                        "metadata.csv or metadata.jsonl beside the images, or set data.captions to false.")
    return found


def caption_templates(found: Sequence[Captioned], schemes: Sequence[PromptScheme]) -> list[str | None]:
    """Returns the template each reference image's own caption gives, None where it has none."""
    return [caption_template(caption, scheme) if caption else None
            for references, scheme in zip(found, schemes, strict=True) for caption in references.captions]


def load_references(found: Sequence[Captioned], captions: Sequence[str], how: Framing) -> CaptionedImages:
    """Reads the reference images of all concepts, warning of tiny ones and of black bars."""
    for path in (path for references in found for path in references.paths):
        width, height = size_of(path)
        if min(width, height) < how.size:
            print(f"warning: '{path.name}' is {width} x {height} px and is enlarged to {how.size}; a larger photo "
                  "would show more.")
    images, masks = zip(*(load_framed(references.paths, how) for references in found), strict=True)
    barred = [path.name for references, pixels in zip(found, images, strict=True)
              for path, one in zip(references.paths, pixels.numpy(), strict=True) if has_black_bars(one)]
    if barred:
        print(f"warning: {', '.join(barred)}: {bars_advice(how.trim_bars)}")
    groups = [index for index, references in enumerate(found) for _ in references.paths]
    return CaptionedImages(torch.cat(images), captions, join_masks(images, masks), groups)


def effective_learning_rate(config: DictConfig) -> float:
    """Returns the rate of K/V and concept words; scaled by the global batch only where asked for."""
    method, trainer = config.method, config.trainer
    rows = trainer.devices * trainer.num_nodes * 2 * method.batch_size * method.accumulate
    return method.learning_rate * (rows if method.scale_lr else 1)


def fine_tune(config: DictConfig, resume: Path | None = None, insist: bool = False) -> Run:
    """Carries out a run, or goes on with the one in folder `resume`; in a job that Slurm started again, with its own.

    Args:
        insist: goes on although base, concepts or images are not what they were.

    Raises:
        UserError: anything the user can fix, before training where possible.
        Interrupt: a signal ended the run; it says where the run's state is, if a step was made.
    """
    check_config(config)
    device = choose_device(DEVICES[config.trainer.accelerator])
    if global_rank(config.trainer.devices):
        sys.stdout = open(os.devnull, "w")         # the first process speaks for all
    begun = None if resume else earlier_run(Path(config.trainer.logdir))
    resume = resume or begun
    resumed = resume_state(resume) if resume else None
    if resumed and resumed.step >= config.method.steps:
        if begun:
            print(f"the run in '{begun}', which this job began, is finished")
            return Run(begun, concept_file(begun / "checkpoints", config.method.steps), None)
        raise UserError(f"the run in '{resume}' is at step {resumed.step} already; method.steps is "
                        f"{config.method.steps}.")
    try:
        with heeded() as signals:
            return _carry_out(config, device, resumed, insist, signals)
    except (RuntimeError, MemoryError, OSError) as error:
        if out_of_memory(error):
            raise UserError(f"memory ran out; {advice(config)}.") from error
        raise


def _carry_out(config: DictConfig, device: torch.device, resumed: Resumed | None, insist: bool,
               signals: Signals) -> Run:
    """Prepares a run and trains."""
    found = read_references(config)
    pl.seed_everything(config.trainer.seed, verbose=False)
    print(f"loading {config.base.ckpt or 'the embedded model'}", flush=True)
    model, base = build_model(config.model, config.base)
    size = image_side(model, "trainer.image_size", config.trainer.image_size)
    warn_of_photos(base, (path for references in found for path in references.paths), size)
    schemes = [make_scheme(model, config.method, concept.class_noun, words, index)
               for index, (concept, words) in enumerate(zip(config.concepts, concept_words(config), strict=True))]
    identity = identify(base, schemes)
    if resumed:
        resumed.check(identity, insist)
    templates = caption_templates(found, schemes) if config.data.captions else ()
    learning_rate = effective_learning_rate(config)
    counts = [len(references.paths) for references in found]
    module = ConceptFinetune(model, config.method, schemes, counts, base, learning_rate, config.trainer.seed,
                             {"config": shareable(config), "versions": versions()}, templates)
    if device.type == "cuda":
        check_memory(config, module, size)
    references = load_references(found, module.captions, framing(config, size))
    photos = name_images(references)
    if resumed:
        resumed.check(RunIdentity(photos=photos), insist)
    first = global_rank(config.trainer.devices) == 0
    folder = resumed.folder if resumed else claim_run_folder(config) if first else Path(config.trainer.logdir)

    def ready(class_pictures: Named, regularization: CaptionedImages | None) -> None:
        if resumed:
            resumed.check(RunIdentity(class_pictures=class_pictures), insist)
        report(config, module, references, regularization, learning_rate, folder)
        if first:
            describe_run(config, folder, fresh=resumed is None)
            save_references(references, counts, config, folder)

    save = SaveConcept(folder / "checkpoints", config.trainer.save_every, config.trainer.save_dtype, signals)
    preview = Preview(folder / "images", config.preview,
                      "autocast" if config.trainer.precision in MIXED else "full")
    constants = [KeepConstants(decoder=bool(config.preview.prompts))] if config.trainer.cache else []
    lighten = Lighten(MIXED.get(config.trainer.precision), config.trainer.checkpointing)
    trainer = make_trainer(config, folder, device, [lighten, Progress(save), save, preview, *constants])
    data = ConceptData(module, references, config, replace(identity, photos=photos), device, ready)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed.state if resumed else None, weights_only=True)
    except (SystemExit, KeyboardInterrupt) as end:     # Lightning leaves by the first after the second
        number = signals.number or signal.SIGINT
        if not trainer.is_global_zero:
            sys.exit(Interrupt(number).status)
        raise Interrupt(number, f"interrupted {way_on(folder, save.done)}") from end
    except UserError as error:                         # all processes end for the same reason
        if not trainer.is_global_zero:
            sys.exit(1)
        if signals.number is not None:
            raise Interrupt(signals.number, f"interrupted, and {error}") from error
        raise
    finally:
        if resumed is None and first:
            for empty in (folder / "metrics", folder):      # the logger's, and the run's where nothing came of it
                with suppress(OSError):
                    empty.rmdir()
    return Run(folder, save.path(config.method.steps), next(reversed(preview.drawn.values()), None))


def way_on(folder: Path, step: int) -> str:
    """Says where an interrupted run stands and how it goes on."""
    if not (folder / "checkpoints" / "last.ckpt").exists():
        return f"before the first step; '{folder}' holds nothing to go on from."
    run = shlex.quote(str(folder))
    return (f"and saved at step {step}; go on with: bash {from_here('train.sh')} -r {run}   "
            f"(or: python {from_here('scripts/train.py')} -r {run})" + (
                f"   (or: scontrol requeue {job()})" if job() else ""))


def global_rank(devices: int) -> int:
    """Returns this process's number among all of a run's, on all machines, as Lightning will count them.

    Args:
        devices: of one machine; where nobody else started its processes, Lightning does.
    """
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment):
        if kind.detect():
            return kind().global_rank()
    alone = LightningEnvironment()
    return alone.node_rank() * devices + alone.local_rank()


def shareable(config: DictConfig) -> dict[str, Any]:
    """Returns the configuration for a file others may get: without the paths of this machine."""
    content = OmegaConf.to_container(config, resolve=True)
    content["base"] |= {"ckpt": None, "vae": None}
    content["trainer"]["logdir"] = ""
    content["data"]["reg"]["root"] = ""
    for concept in content["concepts"]:
        concept["images"] = concept["regularization"] = ""
        concept["regularization_caption"] = None
    return content


def claim_run_folder(config: DictConfig) -> Path:
    """Makes logs/<time>_<name>/ for this run alone.

    Raises:
        UserError: it cannot be made.
    """
    name = folder_name(config.name or config.concepts[0].name, "run")
    stem = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{name}"
    logdir = Path(config.trainer.logdir)
    try:
        for attempt in itertools.count():
            with suppress(NameTaken):
                return take_folder(logdir / (f"{stem}-{attempt}" if attempt else stem))
    except OSError as error:
        raise UserError(f"the run folder '{logdir / stem}' cannot be made ({error.strerror}); "
                        "choose another --logdir.") from error
    raise AssertionError("there is always a free name")


def describe_run(config: DictConfig, folder: Path, fresh: bool) -> None:
    """Writes the resolved configuration and the command into a run's folder; what began the run stays."""
    if fresh:
        save_config(config, folder / "configs" / "project.yaml")
        write_text(folder / COMMAND, command_text())


def make_trainer(config: DictConfig, folder: Path, device: torch.device,
                 callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Builds the Lightning trainer.

    Raises:
        UserError: this machine does not have what the configuration names.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)    # its hints about other products, mostly
    settings = config.trainer
    several = settings.devices * settings.num_nodes > 1
    logger = make_logger(config, folder)
    try:
        return pl.Trainer(accelerator=device.type, devices=settings.devices, num_nodes=settings.num_nodes,
                          strategy="ddp" if several else "auto", precision=settings.precision,
                          max_steps=config.method.steps, accumulate_grad_batches=config.method.accumulate,
                          logger=logger, callbacks=list(callbacks), plugins=[StateFiles()],
                          log_every_n_steps=min(10, config.method.steps),
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                          use_distributed_sampler=False, default_root_dir=folder)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"the trainer cannot be set up ({' '.join(str(error).split())}); check trainer.accelerator, "
                        "devices and precision.") from error


def check_logger(kind: str) -> None:
    """Refuses a logger that could not log; W&B would ask for its key in the middle of the work.

    Raises:
        UserError: the logger is unknown, not installed, or nobody has logged in to W&B.
    """
    if kind not in LOGGERS:
        raise UserError(f"trainer.logger '{kind}' is unknown; use one of {', '.join(LOGGERS)}.")
    specs = [importlib.util.find_spec(package) for package in LOGGERS[kind]]
    if specs and not any(spec and spec.origin for spec in specs):       # a folder of that name has no origin
        raise UserError(f"trainer.logger '{kind}' needs the package '{kind}'; install it, or use trainer.logger=csv.")
    if kind == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb
        if not wandb.api.api_key:
            raise UserError("trainer.logger 'wandb' needs a login; run 'wandb login', or set WANDB_MODE=offline, or "
                            "use trainer.logger=csv.")


def make_logger(config: DictConfig, folder: Path) -> Logger:
    """Builds the logger; TensorBoard and W&B are imported only when asked for.

    A resumed run logs beside what there is: Lightning empties a folder it is given.
    """
    if config.trainer.logger == "tensorboard":
        return TensorBoardLogger(folder, name="", version="tensorboard")
    if config.trainer.logger == "wandb":
        return WandbLogger(name=folder.name, save_dir=folder)
    return CSVLogger(folder, name="", version=metrics_name(folder))


def metrics_name(folder: Path) -> str:
    """Returns the name of a run's next folder of metrics."""
    names = itertools.chain(["metrics"], (f"metrics-{number}" for number in itertools.count(1)))
    return next(name for name in names if not (folder / name).exists())


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide numbers."""
    names = ("torch", "pytorch-lightning", "numpy", "pillow", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def report(config: DictConfig, module: ConceptFinetune, references: CaptionedImages,
           regularization: CaptionedImages | None, learning_rate: float, folder: Path) -> None:
    """Says what is about to be trained."""
    method, scheme = config.method, module.schemes[0]
    weights = "of K/V (keys and values, by which the network reads the prompt)"
    counts = {weights if method.train == "crossattn-kv" else "of the network": module.trained.values(),
              "of the concept's words": module.word_blocks, "of the images' contexts": module.context_blocks}
    size = "1 reference" if method.batch_size == 1 else f"{method.batch_size} references"
    print(f"base: {module.base['name']} ({module.base['hash']})")
    print(f"references: {len(references)}, regularization images: {len(regularization) if regularization else 0}")
    print(f"method: {method.name}; each step: {size}" + (
        f" and as many regularization images of weight {method.prior_weight:g}" if regularization else ""))
    print(f"concept: {scheme.concept} (words to learn: n = {len(scheme.words)}; then the class noun)")
    if scheme.prefix + scheme.suffix:
        print(f"contexts: p = {scheme.prefix} before and s = {scheme.suffix} after the concept, written <ctx-...>; "
              "they take up what is one image's own, and are left out when drawing")
    print(f"first training prompt: {module.captions[0]}")
    for concept, further in zip(config.concepts[1:], module.schemes[1:], strict=True):
        print(f"{concept.name}: write {further.concept} in prompts")
    print("trained values: " + ", ".join(f"{sum(block.numel() for block in blocks):,} {name}"
                                            for name, blocks in counts.items()))
    print(f"effective learning rate: {learning_rate:g} for K/V and words, "
          f"{learning_rate * method.context_lr_factor:g} for contexts; {method.steps} steps")
    print(f"run folder: {folder}", flush=True)


def save_references(references: CaptionedImages, counts: Sequence[int], config: DictConfig, folder: Path) -> None:
    """Writes images/references/*.png and a contact sheet of them: exactly what the network sees."""
    images = [Image.fromarray(image.numpy()) for image in references.images]
    for index, image in enumerate(images):
        save_png(image, folder / "images" / "references" / f"{index:03d}.png")
    rows, start, columns = [], 0, max(counts)
    for concept, count in zip(config.concepts, counts, strict=True):
        cells = images[start:start + count]
        rows.append((f"{concept.name} ({concept.class_noun})", cells + [None] * (columns - count)))
        start += count
    save_png(sheet([str(index) for index in range(columns)], rows, 128), folder / "images" / "references.png")
