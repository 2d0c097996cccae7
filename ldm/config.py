"""Configuration: typed schemas, files merged left to right, overrides, unknown keys refused in words."""
from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.files import write_text
from ldm.text import is_unicode, literal, looks_up, read_text
from ldm.util import UserError, folder_name, shipped

MOST_YAML, MOST_NODES, MOST_DEEP = 4_000_000, 100_000, 50      # bytes, values and levels of a configuration file
RETRIEVING = ("url", "index", "clip", "threshold", "allow_private")     # keys of data.reg in earlier versions
LARGEST = 10 ** 300    # what whole numbers stay below


@dataclass
class MethodConfig:
    """What is learned and how: configs/method/*.yaml."""

    name: str = "ico"
    words: list[str] = field(default_factory=lambda: ["<new1>", "<new2>"])   # concept contexts "V", n of them
    initial_words: list[str] = field(default_factory=lambda: ["pll", "ktn"])
    prefix: str = "photo of a"            # words the prefix contexts start from, or "random", or "" for none
    prefix_length: int | None = None      # p where prefix is "random"
    suffix: str = "."
    suffix_length: int | None = None      # s where suffix is "random"
    template: str = "{}"                  # fixed words around the concept; "photo of a {}" is the manual baseline
    train: str = "crossattn-kv"           # crossattn-kv | crossattn | none (words only)
    detach_first_token: bool = True       # no gradient through the start token's keys and values
    steps: int = 900
    batch_size: int = 3                   # reference images per device and step; as many regularization images
    accumulate: int = 1                   # micro-steps per optimizer step
    learning_rate: float = 6.0e-5         # of K/V and concept words
    context_lr_factor: float = 10.0       # image-specific contexts learn this much faster
    scale_lr: bool = False                # multiply by devices x nodes x 2 batch_size x accumulate, as the release does
    weight_decay: float = 0.01            # of K/V; words have none
    prior_weight: float = 1.0             # weight of regularization images in the loss
    flip: bool = True                     # mirror images at random


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


@dataclass
class PreviewConfig:
    """The grid drawn during training."""

    every: int = 0                        # steps between grids; 0 draws one at the end
    prompts: list[str] = field(default_factory=lambda: ["a photo of a {} in the snow", "a photo of a {} on the beach"])
    steps: int = 25                       # DDIM steps, without noise
    scale: float = 6.0
    agg_lambda: list[float] = field(default_factory=lambda: [0.0, 1.0])   # DCI's strengths beside the plain image
    agg_time: float = 0.3
    seed: int = 0


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


@dataclass
class DataConfig:
    """How images are read."""

    crop: str = "center"                  # center cuts the middle square out; pad keeps everything, its edges uncounted
    background: str = "white"             # color behind what is transparent and beside what is padded; or '#rrggbb'
    alpha_mask: bool = False              # leave transparent pixels out of the loss
    trim_bars: bool = False               # crop black bars off the images first; --inspect shows before and after
    captions: bool = False                # use captions beside the references, around the concept, as templates
    reg: RegularizationConfig = field(default_factory=RegularizationConfig)


@dataclass
class TrainConfig:
    """A whole training run."""

    model: Any = MISSING
    base: BaseConfig = field(default_factory=BaseConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    concepts: list[ConceptConfig] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    name: str | None = None               # of the run; null is the first concept's


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
    token_gain: float = 10.0
    spatial_gain: float = 10.0
    mask_sum: float = 500.0


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
    batch_size: int = 4                   # rows sampled together; does not change the images
    seed: int = 42                        # of a prompt's first image; the next ones count on
    plain: bool = True                    # draw the fine-tuned model without DCI too
    precision: str = "full"               # full | bf16 | fp16, of the weights; autocast leaves them in full
    compile: bool = False                 # compile the U-Net: minutes once, then faster; for many images of a size
    device: str = "auto"                  # auto | cpu | cuda | mps


def meanings(schema: type, path: str = "") -> dict[str, str]:
    """Returns what each dotted key of a schema means: the comment in its margin, "" where there is none."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
    found = {}
    for name, kind in get_type_hints(schema).items():
        found[f"{path}{name}"] = comments.get(name, "")
        if dataclasses.is_dataclass(kind):
            found |= meanings(kind, f"{path}{name}.")
    return found


def merge(schema: type, files: Sequence[str | Path], overrides: Sequence[str] = (), extra: DictConfig | None = None,
          data: bool = False) -> DictConfig:
    """Merges YAML files left to right, then `extra`, then `key=value` overrides, into `schema`.

    Args:
        data: nobody named the files as configurations, as with a run's folder: they may look nothing up.

    Raises:
        UserError: a file is missing or no YAML; a key is unknown (the nearest is named) or a value has another type.
    """
    config = OmegaConf.structured(schema)
    parts = [(str(path), _read_yaml(Path(path))) for path in files]
    for _, part in parts if data else ():
        _upgrade(part)
    for source, part in parts if data else ():
        if looks_up(OmegaConf.to_container(part, resolve=False)):
            raise UserError(f"{source}: holds ${{...}}, which is looked up in configuration files given with -b alone; "
                            "write the value itself.")
    if extra is not None:
        parts.append(("the options", extra))
    for source, part in parts:
        try:
            for key in _unknown_keys(part, config):
                raise UserError(f"{source}: unknown key '{key}'{_nearest(key, config)}")
            config = OmegaConf.merge(config, part)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(f"{source}: {_first_line(error)}") from error
    for item in overrides:
        _override(config, item)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{', '.join(map(str, files))}: {_first_line(error)}") from error
    for key, value in _values(values):
        if isinstance(value, str) and not is_unicode(value):
            raise UserError(f"'{key}' is '{value}', which is not Unicode text; type it again, or rename what it names.")
        if isinstance(value, int) and abs(value) >= LARGEST:     # Python prints no number of 4,300 digits
            raise UserError(f"'{key}' is a whole number of more than 300 digits; give a smaller one.")
    OmegaConf.set_readonly(config, True)
    return config


def _upgrade(part: DictConfig) -> None:
    """Rewrites the configuration of an earlier version's run, whose training retrieved images of the class itself."""
    settings = OmegaConf.select(part, "data.reg")
    if not isinstance(settings, DictConfig):
        return
    for key in RETRIEVING:
        settings.pop(key, None)
    if settings.get("mode") == "retrieve":
        settings.mode = "folder"
        for concept in part.get("concepts", []):
            concept.regularization = f"{settings.root}/samples_{folder_name(concept.class_noun)}"


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the texts and numbers of a configuration with their dotted keys, and those keys' own names."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, name
            yield from _values(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _values(item, f"{key}.{number}")
    else:
        yield key, value


def _override(config: DictConfig, item: str) -> None:
    """Sets one key=value (or --key=value); the key must exist, list entries are numbered: concepts.0.images."""
    key, equals, _ = item.lstrip("-").partition("=")
    if not is_unicode(item):
        raise UserError(f"override '{item}' is not Unicode text; type it again, or rename what it names.")
    if not equals:
        raise UserError(f"'{item}' is neither an option nor an override; overrides are written key=value.")
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    known = node.keys() if isinstance(node, DictConfig) else \
        [str(index) for index in range(len(node))] if isinstance(node, ListConfig) else ()
    if name not in known:
        raise UserError(f"unknown key '{key}'{_nearest(key, config)}")
    try:
        value = OmegaConf.from_dotlist([f"value={literal(item.partition('=')[2])}"]).value
        OmegaConf.update(config, key, literal(value) if isinstance(value, str) else value, merge=False)
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"override '{item}': {_first_line(error)}") from error


def _read_yaml(path: Path) -> DictConfig:
    path = shipped(path)
    text = read_text(path, "configuration file", MOST_YAML)
    try:
        _check_size(yaml.compose(text, yaml.SafeLoader))
        config = OmegaConf.load(StringIO(text))
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"configuration file '{path}' is no YAML ({_first_line(error)}).") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"configuration file '{path}' must hold keys and values.")
    return config


def _check_size(root: yaml.Node | None) -> None:
    """Counts what a YAML file holds once its aliases are written out, each of which may hold others.

    Raises:
        ValueError: that is more than any configuration has, or has no end.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above or len(above) > MOST_DEEP:
            raise ValueError("it is nested without end")
        if id(node) not in sizes:
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [child if isinstance(child, tuple) else (child,) for child in children]
            sizes[id(node)] = 1 + sum(size(child, above | {id(node)}) for pair in pairs for child in pair)
        if sizes[id(node)] > MOST_NODES:
            raise ValueError(f"it holds more than {MOST_NODES:,} values")
        return sizes[id(node)]

    if root is not None:
        size(root, frozenset())


def _first_line(error: Exception) -> str:
    message = str(error).splitlines()
    key = getattr(error, "full_key", None)
    return (f"'{key}': " if key else "") + (message[0] if message else type(error).__name__)


def _unknown_keys(part: DictConfig, schema: DictConfig, path: str = "") -> Iterator[str]:
    """Yields the keys of `part` that the schema lacks; below `model` anything may stand.

    Raises:
        TypeError: a section of the schema is given as something else.
    """
    for key in part:
        full = f"{path}{key}"
        if key not in schema.keys():   # `in` would deny keys that are missing a value
            yield full
            continue
        if full == "model":
            continue
        value = part._get_node(key)
        node = schema._get_node(key)
        if isinstance(node, DictConfig):
            if OmegaConf.get_type(node) is dict:      # its keys are the user's to name
                continue
            if not isinstance(value, DictConfig):
                raise TypeError(f"'{full}' must hold keys and values.")
            yield from _unknown_keys(value, node, f"{full}.")
        if isinstance(value, ListConfig) and full == "concepts":
            entry_schema = OmegaConf.structured(ConceptConfig)
            for index, entry in enumerate(value):
                yield from _unknown_keys(entry, entry_schema, f"{full}.{index}.")


def require(concept: DictConfig, index: int, key: str) -> None:
    """Refuses a concept, number `index` of `concepts`, without a value it needs, naming all ways to give it.

    Raises:
        UserError: it has none.
    """
    if not OmegaConf.is_missing(concept, key):
        return
    ways = {"images": "DATAPATH for train.sh, or --datapath", "class_noun": "CLASS_NOUN for train.sh, or --class_noun"}
    how = f"; give {ways[key]}" if key in ways and index == 0 else "; set it in the concept's file"
    raise UserError(f"concepts.{index}.{key} is not set{how}.")


def all_keys(schema: DictConfig, path: str = "") -> list[str]:
    """Returns all dotted keys of a schema."""
    keys = []
    for key in schema:
        node = schema._get_node(key)
        keys.append(f"{path}{key}")
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            keys += all_keys(node, f"{path}{key}.")
    return keys


def _nearest(key: str, schema: DictConfig) -> str:
    """Ends an error's sentence with the key probably meant: a sibling, a like path, the same name elsewhere."""
    known = all_keys(schema)
    if "concepts" in schema:
        known += [f"concepts.0.{entry.name}" for entry in dataclasses.fields(ConceptConfig)]
    parent, _, leaf = key.rpartition(".")
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    close = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, 1)] \
        or difflib.get_close_matches(key, known, 1, 0.85) \
        or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1)]
    return f"; did you mean '{close[0]}'?" if close else f"; the main keys are {', '.join(schema.keys())}."


def save_config(config: Any, path: Path, head: str = "", new: bool = False) -> None:
    """Writes a resolved configuration that can be run again, below comment lines `head`.

    Raises:
        UserError, NameTaken: as `ldm.files.write_atomically` does.
    """
    container = OmegaConf.to_container(config if OmegaConf.is_config(config) else OmegaConf.structured(config),
                                       resolve=True)
    write_text(path, head + OmegaConf.to_yaml(OmegaConf.create(literal(container))), new)
