"""One fine-tuning run from configuration to concept file: pictures, model, Lightning trainer, run folder."""
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from ldm.callbacks import KeepConstants, Preview, Progress, SaveConcept
from ldm.compute import out_of_memory
from ldm.config import require, save_config
from ldm.customization.contexts import PromptScheme, caption_template
from ldm.customization.finetune import ConceptFinetune, make_scheme
from ldm.data.concept import CaptionedImages, TrainingPlan
from ldm.data.images import CROPS, Framing, bars_advice, check_colour, has_black_bars, load_framed
from ldm.data.layouts import Captioned, captioned
from ldm.embedded import warn_of_photos
from ldm.files import make_folder, write_atomically
from ldm.memory import MIXED, advice, check_memory
from ldm.pictures import save_png, sheet
from ldm.pipeline import MAX_SEED, build_model, check_seed, choose_device, picture_side
from ldm.prior import MODES, join_masks, load_prior
from ldm.resume import Resumed, RunIdentity, identify, name_pictures, resume_state
from ldm.signals import Interrupt, Signals, heeded
from ldm.util import UserError, folder_name, from_here

RUN_VARIABLE = "DCI_ICO_RUN"   # tells the processes Lightning starts which folder the first one chose
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
    """Hands each device its share of the training plan, from the step a resumed run stands at."""

    def __init__(self, concept: CaptionedImages, regularization: CaptionedImages | None, config: DictConfig,
                 identity: RunIdentity):
        super().__init__()
        self.concept, self.regularization, self.config, self.identity = concept, regularization, config, identity

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
    for name, value, allowed in (("crop", data.crop, CROPS), ("reg.mode", data.reg.mode, (None, *MODES))):
        if value not in allowed:
            raise UserError(f"data.{name} '{value}' is unknown; use one of {', '.join(filter(None, allowed))}.")
    check_colour(data.background)
    for name in ("num", "steps", "batch_size"):
        if data.reg[name] < 1:
            raise UserError(f"data.reg.{name} is {data.reg[name]}; give at least 1.")


def framing(config: DictConfig, size: int) -> Framing:
    """Returns how pictures become squares of `size` px."""
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
    """Finds every concept's reference pictures, naming what is skipped and counting captions where they are wanted.

    Raises:
        UserError: a concept has none, or no picture has a caption though captions are wanted.
    """
    wanted = config.data.captions
    found = [captioned(Path(concept.images), captions=wanted) for concept in config.concepts]
    for concept, references in zip(config.concepts, found, strict=True):
        for item in references.skipped:
            print(f"{concept.name}: skipped {item}")
        if wanted:
            count = sum(map(bool, references.captions))
            print(f"{concept.name}: {count} of {len(references.paths)} pictures have a caption")
    if wanted and not any(caption for references in found for caption in references.captions):
        raise UserError("data.captions is true, but no reference picture has a caption; write a.txt beside a.jpg, or "
                        "metadata.csv or metadata.jsonl beside the pictures, or set data.captions to false.")
    return found


def caption_templates(found: Sequence[Captioned], schemes: Sequence[PromptScheme]) -> list[str | None]:
    """Returns the template each reference picture's own caption gives, None where it has none."""
    return [caption_template(caption, scheme) if caption else None
            for references, scheme in zip(found, schemes, strict=True) for caption in references.captions]


def load_references(found: Sequence[Captioned], captions: Sequence[str], how: Framing) -> CaptionedImages:
    """Reads the reference pictures of all concepts, warning of tiny ones and of black bars."""
    for path in (path for references in found for path in references.paths):
        with Image.open(path) as image:
            if min(image.size) < how.size:
                print(f"warning: '{path.name}' is {image.width} x {image.height} px and is enlarged to {how.size}; a "
                      "larger photo would show more.")
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
    """Carries out a run, or goes on with the one in folder `resume`.

    Args:
        insist: goes on although base, concepts or pictures are not what they were.

    Raises:
        UserError: anything the user can mend, before training where possible.
        Interrupt: a signal ended the run; it says where the run's state is, if a step was made.
    """
    check_config(config)
    device = choose_device(DEVICES[config.trainer.accelerator])
    resumed = resume_state(resume) if resume else None
    if resumed and resumed.step >= config.method.steps:
        raise UserError(f"the run in '{resume}' is at step {resumed.step} already; method.steps is "
                        f"{config.method.steps}.")
    if is_helper():
        sys.stdout = open(os.devnull, "w")         # the first process speaks for all
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
    size = picture_side(model, "trainer.image_size", config.trainer.image_size)
    warn_of_photos(base, (path for references in found for path in references.paths), size)
    schemes = [make_scheme(model, config.method, concept.class_noun, words, index)
               for index, (concept, words) in enumerate(zip(config.concepts, concept_words(config), strict=True))]
    identity = identify(base, schemes)
    if resumed:
        resumed.check(identity, insist)
    templates = caption_templates(found, schemes) if config.data.captions else ()
    regularization = load_prior(config, model, base, framing(config, size), device, not is_helper())
    learning_rate = effective_learning_rate(config)
    counts = [len(references.paths) for references in found]
    module = ConceptFinetune(model, config.method, schemes, counts, base, learning_rate, config.trainer.seed,
                             {"config": shareable(config), "versions": versions()}, templates)
    module.lighten(MIXED.get(config.trainer.precision), config.trainer.checkpointing)
    if device.type == "cuda":
        check_memory(config, module, size)
    references = load_references(found, module.captions, framing(config, size))
    pictures = RunIdentity(photos=name_pictures(references), class_pictures=name_pictures(regularization))
    if resumed:
        resumed.check(pictures, insist)
    folder = resumed.folder if resumed else start_folder(config)
    report(config, module, references, regularization, learning_rate, folder)
    if not is_helper():
        save_references(references, counts, config, folder)
    save = SaveConcept(folder / "checkpoints", config.trainer.save_every, config.trainer.save_dtype, signals)
    preview = Preview(folder / "images", config.preview,
                      "autocast" if config.trainer.precision in MIXED else "full")
    constants = [KeepConstants(decoder=bool(config.preview.prompts))] if config.trainer.cache else []
    trainer = make_trainer(config, folder, device, [Progress(save), save, preview, *constants])
    data = ConceptData(references, regularization, config,
                       replace(pictures, base=identity.base, concepts=identity.concepts))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed.state if resumed else None, weights_only=True)
    except (SystemExit, KeyboardInterrupt) as end:     # Lightning leaves by the first after the second
        interrupt = Interrupt(signals.number or signal.SIGINT, f"interrupted {way_on(folder, save.done)}")
        if trainer.is_global_zero:
            raise interrupt from end
        sys.exit(interrupt.status)
    except UserError as error:                         # all processes end for the same reason
        if not trainer.is_global_zero:
            sys.exit(1)
        if signals.number is not None:
            raise Interrupt(signals.number, f"interrupted, and {error}") from error
        raise
    return Run(folder, save.path(config.method.steps), next(reversed(preview.drawn.values()), None))


def way_on(folder: Path, step: int) -> str:
    """Says where an interrupted run stands and how it goes on."""
    if not (folder / "checkpoints" / "last.ckpt").exists():
        return f"before the first step; '{folder}' holds nothing to go on from."
    run = shlex.quote(str(folder))
    return (f"and saved at step {step}; go on with: bash {from_here('train.sh')} -r {run}   "
            f"(or: python {from_here('scripts/train.py')} -r {run})")


def is_helper() -> bool:
    """Says whether this is a further process that Lightning started on this machine for its share of the devices."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def shareable(config: DictConfig) -> dict[str, Any]:
    """Returns the configuration for a file others may get: without the paths of this machine."""
    content = OmegaConf.to_container(config, resolve=True)
    content["base"] |= {"ckpt": None, "vae": None}
    content["trainer"]["logdir"] = ""
    content["data"]["reg"] |= {"root": "", "url": None, "clip": None}
    for concept in content["concepts"]:
        concept["images"] = concept["regularization"] = ""
        concept["regularization_caption"] = None
    return content


def start_folder(config: DictConfig) -> Path:
    """Makes logs/<time>_<name>/ with the resolved configuration and the command, once for all processes."""
    if RUN_VARIABLE in os.environ and is_helper():
        return Path(os.environ[RUN_VARIABLE])
    name = folder_name(config.name or config.concepts[0].name, "run")
    stem = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{name}"
    logdir, attempt = Path(config.trainer.logdir), 0
    while (folder := logdir / (f"{stem}-{attempt}" if attempt else stem)).exists():
        attempt += 1
    try:
        make_folder(folder)
    except OSError as error:
        raise UserError(f"the run folder '{folder}' cannot be made ({error.strerror}); "
                        "choose another --logdir.") from error
    os.environ[RUN_VARIABLE] = str(folder)
    save_config(config, folder / "configs" / "project.yaml")
    command = " ".join(map(shlex.quote, sys.argv)) + "\n"
    write_atomically(folder / "command.txt", lambda part: part.write_text(command))
    return folder


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
                          logger=logger, callbacks=list(callbacks), log_every_n_steps=min(10, config.method.steps),
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
    earlier = len(list(folder.glob("metrics*"))) if not is_helper() else 0
    return CSVLogger(folder, name="", version=f"metrics-{earlier}" if earlier else "metrics")


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
              "of the concept's words": module.word_blocks, "of the pictures' contexts": module.context_blocks}
    size = "1 reference" if method.batch_size == 1 else f"{method.batch_size} references"
    print(f"base: {module.base['name']} ({module.base['hash']})")
    print(f"references: {len(references)}, regularisation pictures: {len(regularization) if regularization else 0}")
    print(f"method: {method.name}; each step: {size}" + (
        f" and as many regularisation pictures of weight {method.prior_weight:g}" if regularization else ""))
    print(f"concept: {scheme.concept} (words to learn: n = {len(scheme.words)}; then the class noun)")
    if scheme.prefix + scheme.suffix:
        print(f"contexts: p = {scheme.prefix} before and s = {scheme.suffix} after the concept, written <ctx-...>; "
              "they take up what is one picture's own, and are left out when drawing")
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
    pictures = [Image.fromarray(image.numpy()) for image in references.images]
    for index, picture in enumerate(pictures):
        save_png(picture, folder / "images" / "references" / f"{index:03d}.png")
    rows, start, columns = [], 0, max(counts)
    for concept, count in zip(config.concepts, counts, strict=True):
        cells = pictures[start:start + count]
        rows.append((f"{concept.name} ({concept.class_noun})", cells + [None] * (columns - count)))
        start += count
    save_png(sheet([str(index) for index in range(columns)], rows, 128), folder / "images" / "references.png")
