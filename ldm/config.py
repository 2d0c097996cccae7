"""Settings: the typed schemas of training and sampling, with their ranges and choices beside the fields.

Files of them are read and merged by `ldm/config_files.py`. Objects of these classes check themselves when they are
made; a configuration that is still being merged becomes one through `typed`.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from ldm.modules.dbim_gains import MASK_SUM, SPATIAL_GAIN, TOKEN_GAIN
from ldm.util import UserError

T = TypeVar("T")
MAX_SEED = 2 ** 63 - 1
NUMPY_SEED = 2 ** 32 - 1     # numpy's generator takes no more
MAX_STRENGTH = 50.0          # beyond it the auxiliary branch is off, or all there is, at every scale
MAX_IMAGES = 100_000         # of one run, which are listed before the first is made
MAX_TOKENS = 75              # of a prompt, beside its start and end


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a value, called `name`, that is none of the choices."""
    if value not in choices:
        raise UserError(f"{name} '{value}' is unknown; use one of {', '.join(choices)}.")


def check_seed(name: str, seed: int, most: int = MAX_SEED) -> None:
    """Refuses a seed, called `name`, that random generators do not take."""
    if not 0 <= seed <= most:
        raise UserError(f"{name} is {seed}; give a whole number from 0 to {most}.")


def check_ranges(section: str, settings: object, least: Mapping[str, float], most: Mapping[str, float]) -> None:
    """Refuses numbers of a section outside their range; None says that none is set."""
    for key, limit in least.items():
        value = getattr(settings, key)
        if value is not None and not limit <= value < math.inf:
            raise UserError(f"{section}.{key} is {value}; give a finite number, at least {limit}.")
    for key, limit in most.items():
        value = getattr(settings, key)
        if value is not None and value > limit:
            raise UserError(f"{section}.{key} is {value}; give at most {limit}.")


@dataclass
class MethodConfig:
    """What is learned and how; what has no value here has it in configs/method/ico.yaml, the default method."""

    name: str = MISSING
    words: list[str] = MISSING            # concept contexts "V", n of them
    initial_words: list[str] = MISSING    # rare tokens the words start from, in order; "random" draws one
    prefix: str = MISSING                 # words the prefix contexts start from, or "random", or "" for none
    prefix_length: int | None = None      # p where prefix is "random"
    suffix: str = MISSING                 # likewise behind the concept
    suffix_length: int | None = None      # s where suffix is "random"
    template: str = MISSING               # fixed words around the concept; "photo of a {}" is the manual baseline
    train: str = MISSING                  # crossattn-kv | crossattn | none (words only)
    detach_first_token: bool = MISSING    # no gradient through the start token's keys and values
    steps: int = MISSING
    batch_size: int = MISSING             # reference images per device and step; as many regularization images
    accumulate: int = 1                   # micro-steps per optimizer step
    learning_rate: float = MISSING        # of concept words
    kv_lr_factor: float = 1.0             # K/V, or whatever is trained of the network, learns this much faster
    context_lr_factor: float = MISSING    # image-specific contexts likewise
    scale_lr: bool = False                # multiply by devices x nodes x 2 batch_size x accumulate, as the release does
    weight_decay: float = MISSING         # of K/V; words have none
    prior_weight: float = MISSING         # weight of regularization images in the loss
    flip: bool = True                     # mirror images at random

    def __post_init__(self) -> None:
        if self.name == MISSING:
            return                        # the schema itself, of which OmegaConf makes an object
        check_ranges("method", self,
                     least={"steps": 1, "batch_size": 1, "accumulate": 1, "learning_rate": 0, "kv_lr_factor": 0,
                            "context_lr_factor": 0, "weight_decay": 0, "prior_weight": 0, "prefix_length": 0,
                            "suffix_length": 0},
                     # Beyond these even the plan of a step is too large.
                     most={"batch_size": 4096, "accumulate": 65536, "prefix_length": MAX_TOKENS,
                           "suffix_length": MAX_TOKENS})


@dataclass
class ConceptConfig:
    """Whose images: configs/concept/*.yaml."""

    name: str = MISSING
    images: str = MISSING                 # folder of reference photos, or a list of them (images.txt)
    class_noun: str = MISSING
    words: list[str] | None = None        # null: method.words; in joint runs numbered on, <new3> <new4> ...
    regularization: str | None = None     # real_reg folder, or any folder of images of the class
    regularization_caption: str | None = None


@dataclass
class BaseConfig:
    """The pretrained model."""

    ckpt: str | None = None               # .ckpt or .safetensors; null is the embedded model of ldm/tiny
    name: str | None = None               # how it is called in concept files; null is the file's name
    vae: str | None = None                # file of another autoencoder, such as vae-ft-mse; null is the checkpoint's
    any_base: bool = False                # use concepts that were made for another base, too, with a warning


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")      # Lightning's names
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
LOGGERS = ("csv", "tensorboard", "wandb")


@dataclass
class TrainerConfig:
    """How a run is carried out."""

    accelerator: str = "auto"             # auto | cpu | gpu (CUDA) | mps (Apple)
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"            # Lightning's names: 32-true, bf16-mixed, 16-mixed
    cache: bool = True                    # encode images and fixed captions once, then drop the VAE's encoder
    checkpointing: bool | None = None     # recompute activations in the backward pass; null is the model file's
    memory_gb: float | None = None        # the GPU's memory: prints an estimate there, and refuses what exceeds it
    seed: int = 23                        # of everything random in a run
    save_every: int = 100                 # steps between concept files
    save_dtype: str = "fp16"              # fp16 | fp32, of K/V in concept files
    logdir: str = "logs"
    logger: str = "csv"                   # csv | tensorboard | wandb
    image_size: int | None = None         # images' side in px; null is the model's own

    def __post_init__(self) -> None:
        check_ranges("trainer", self, least={"devices": 1, "num_nodes": 1, "save_every": 1},
                     most={"devices": 1024, "num_nodes": 1024})
        if self.save_dtype not in ("fp16", "fp32"):
            raise UserError(f"trainer.save_dtype '{self.save_dtype}' is unknown; use fp16 or fp32.")
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_seed("trainer.seed", self.seed, NUMPY_SEED)
        check_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        check_choice("trainer.logger", self.logger, LOGGERS)


@dataclass
class PreviewConfig:
    """The grid drawn during training."""

    every: int = 0                        # steps between grids; 0 draws one at the end
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {} in the snow", "a photo of a {} on the beach"])
    steps: int = 25                       # DDIM steps, without noise
    scale: float = 6.0
    agg_lambda: list[float] = field(default_factory=lambda: [0.0, 1.0])   # DCI's strengths beside the plain image
    agg_time: float = 0.3
    mask_sum: float = MASK_SUM
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("preview.seed", self.seed)


REGULARIZATION_MODES = ("folder", "generate", "none")


@dataclass
class RegularizationConfig:
    """Where images of the class come from; see real_reg/README.md."""

    mode: str | None = None               # folder | generate | none; null: a concept's folder, if it has one
    num: int = 200                        # images to generate per concept
    root: str = "real_reg"                # below which generated sets are kept for the next run
    prompt: str | None = None             # generate: {} is the class noun; null is "photo of a {}"
    steps: int = 50                       # generate: DDIM steps, guidance and noise as Custom Diffusion has them
    scale: float = 6.0
    eta: float = 1.0
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode == "retrieve":       # the release's training did; here it is a command of its own
            raise UserError("data.reg.mode is 'retrieve', and training reads folders only; retrieve images first, with "
                            "scripts/retrieve.py, and give their folder with --reg_datapath.")
        if self.mode is not None:
            check_choice("data.reg.mode", self.mode, REGULARIZATION_MODES)
        for name in ("num", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.reg.{name} is {getattr(self, name)}; give at least 1.")
        check_seed("data.reg.seed", self.seed, MAX_SEED - self.num)     # every image adds 1 to it


CROPS = ("center", "pad")


@dataclass
class DataConfig:
    """How images are read."""

    crop: str = "center"                  # center cuts the middle square out; pad keeps everything, its edges uncounted
    background: str = "white"             # color behind what is transparent and beside what is padded; or '#rrggbb'
    alpha_mask: bool = False              # leave transparent pixels out of the loss
    trim_bars: bool = False               # crop black bars off the images first; --inspect shows before and after
    captions: bool = False                # use captions beside the references, around the concept, as templates
    reg: RegularizationConfig = field(default_factory=RegularizationConfig)

    def __post_init__(self) -> None:
        check_choice("data.crop", self.crop, CROPS)


@dataclass
class TrainConfig:
    """A whole training run."""

    DEFAULTS: ClassVar[tuple[str, ...]] = ("configs/method/ico.yaml",)     # files that come before all others

    model: Any = MISSING
    base: BaseConfig = field(default_factory=BaseConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    concepts: list[ConceptConfig] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    name: str | None = None               # of the run; null is the first concept's


CHOICE_METRICS = ("small_clip", "clip_b32", "clip_l14")
CHOICE_STRENGTHS = (-1.0, 0.0, 1.0, 2.0)     # what `--agg_lambda auto` chooses among, where no strengths follow it


@dataclass
class ChoiceConfig:
    """Lambda chosen by the program, for each prompt and seed: `--agg_lambda auto`."""

    use: bool = False                     # keep one of dci.agg_lambda, the weakest one that follows the prompt
    # Differences of cosines; those of larger CLIPs are smaller, and want smaller values.
    margin: float = 0.5                   # how much less like the references than the plain image it may be
    tolerance: float = 0.02               # how much less like the prompt than the best one it may be
    metric: str = "small_clip"            # which CLIP judges: small_clip (embedded model) | clip_b32 | clip_l14
    weights: str | None = None            # that CLIP's file; the small one ships
    references: str | None = None         # folder of photos of the concept; null: those beside the concept file

    def __post_init__(self) -> None:
        check_choice("dci.choice.metric", self.metric, CHOICE_METRICS)
        check_ranges("dci.choice", self, least={"margin": 0, "tolerance": 0}, most={"margin": 2, "tolerance": 2})


@dataclass
class DCIConfig:
    """Dual-branch sampling (paper section 3.3)."""

    use: bool = True
    agg_lambda: list[float] = field(default_factory=lambda: [0.0])   # strengths, one image each; about -2 to 2
    agg_time: float = 0.3                 # share of the schedule with two branches, from the noisy end
    replace_noun: str | None = None       # auxiliary noun; null: from a list, auto: by the context
    guidance: str = "separate"            # separate | shared unconditional prediction
    noise: str = "independent"            # independent | common noise of the two branches
    match_cost: bool = False              # fewer steps, so that the work equals plain guidance with `steps`
    ablation: str = "none"                # none | no_mask | no_full_prompt | last_layer | base_weights
    token_gain: float = TOKEN_GAIN
    spatial_gain: float = SPATIAL_GAIN
    mask_sum: float = MASK_SUM
    preview: bool = False                 # stop where the joint phase ends, and show what is predicted there
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)

    def __post_init__(self) -> None:
        check_choice("dci.guidance", self.guidance, ("separate", "shared"))
        check_choice("dci.noise", self.noise, ("independent", "common"))
        check_choice("dci.ablation", self.ablation, ("none", "no_mask", "no_full_prompt", "last_layer", "base_weights"))
        for strength in self.agg_lambda:
            if not abs(strength) <= MAX_STRENGTH:
                raise UserError(f"agg_lambda {strength} is out of range; give numbers between -{MAX_STRENGTH:g} and "
                                f"{MAX_STRENGTH:g} (useful: -2 to 2).")
        if not 0.0 <= self.agg_time <= 1.0:
            raise UserError(f"agg_time {self.agg_time} is out of range; give a share of the steps between 0 and 1.")
        if self.choice.use and len(set(self.agg_lambda)) < max(2, len(self.agg_lambda)):
            raise UserError(f"dci.agg_lambda {self.agg_lambda} leaves nothing to choose; name several strengths, all "
                            "different, as in --agg_lambda auto -1 0 1.")


@dataclass
class SampleConfig:
    """A whole sampling run."""

    model: Any = MISSING
    base: BaseConfig = field(default_factory=BaseConfig)
    dci: DCIConfig = field(default_factory=DCIConfig)
    sampler: str = "ddim"                 # ddim | plms | dpm_solver
    steps: int = 200                      # sampling steps; more take longer
    eta: float = 1.0                      # DDIM's noise, 0 to 1
    scale: float = 6.0                    # guidance; 1 is none
    height: int | None = None             # of images in px; null is the model's own
    width: int | None = None              # of images in px; null is the model's own
    n_samples: int = 3                    # images per prompt and iteration
    n_iter: int = 1                       # iterations, numbered on by seed
    batch_size: int = 4                   # images sampled together; does not change them
    seed: int = 42                        # of a prompt's first image; the next ones count on
    plain: bool = True                    # draw the fine-tuned model without DCI too
    padding: str = "concepts"             # whose K/V prompts' ends take, with several files: concepts | base
    precision: str = "full"               # full | bf16 | fp16, of the weights; autocast leaves them in full
    compile: bool = False                 # compile the U-Net: minutes once, then faster; for many images of a size
    device: str = "auto"                  # auto | cpu | cuda | mps

    def __post_init__(self) -> None:
        check_choice("sampler", self.sampler, ("ddim", "plms", "dpm_solver"))
        check_choice("precision", self.precision, ("full", "bf16", "fp16", "autocast"))
        check_choice("padding", self.padding, ("concepts", "base"))
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta {self.eta} is out of range; give a number between 0 and 1.")
        if self.eta > 0 and self.sampler != "ddim":
            raise UserError(f"the sampler '{self.sampler}' is deterministic; set eta to 0 (--ddim_eta 0) or use ddim.")
        if not math.isfinite(self.scale):
            raise UserError(f"scale {self.scale} is not a finite number.")
        if self.dci.use and not (self.dci.agg_lambda or self.plain):
            raise UserError("there is nothing to draw: dci.agg_lambda is empty and plain is false; give --agg_lambda.")
        for name in ("n_samples", "n_iter", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.n_samples * self.n_iter > MAX_IMAGES:
            raise UserError(f"n_samples {self.n_samples} times n_iter {self.n_iter} are too many images; a run "
                            f"draws up to {MAX_IMAGES:,}.")
        check_seed("seed", self.seed, MAX_SEED - self.n_samples * self.n_iter)    # every image adds 1 to it


def typed(config: T | DictConfig) -> T:
    """Returns a configuration as an object of its class, whose fields have been checked; objects come back as they are.

    The node `model`, which a class of the user's may read, stays OmegaConf's.

    Raises:
        UserError: a value is outside its range, or one that has no default is missing.
    """
    if not isinstance(config, DictConfig):
        return config
    kind, config = OmegaConf.get_type(config), copy.copy(config)
    model = None if OmegaConf.is_missing(config, "model") else config.model
    if kind is TrainConfig:
        check_complete(config)
    OmegaConf.set_readonly(config, False)
    config.model = None
    made = OmegaConf.to_object(config)
    made.model = model
    return made


def check_complete(config: DictConfig) -> None:
    """Refuses a training run that lacks model or concepts, or a concept's name, images or class noun."""
    if OmegaConf.is_missing(config, "model"):
        raise UserError("no model is configured; add configs/model/*.yaml with -b.")
    if not config.concepts:
        raise UserError("no concept is configured; add configs/concept/*.yaml with -b, or give --datapath and "
                        "--class_noun.")
    for index, concept in enumerate(config.concepts):
        for key in ("name", "images", "class_noun"):
            require(concept, index, key)


def require(concept: DictConfig, index: int, key: str) -> None:
    """Refuses a concept, number `index` of `concepts`, without a value it needs, naming all ways to give it.

    Raises:
        UserError: it has none.
    """
    if not OmegaConf.is_missing(concept, key):
        return
    how = "set it in the concept's file"
    if index == 0 and key == "images":
        how = "give DATAPATH for train.sh, or --datapath"
    elif index == 0 and key == "class_noun":
        how = "give CLASS_NOUN for train.sh, or --class_noun"
    raise UserError(f"concepts.{index}.{key} is not set; {how}.")
