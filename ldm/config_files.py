"""Configuration files: included, merged left to right, overridden; unknown keys refused in words; written again."""
from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.config import ConceptConfig
from ldm.files import write_text
from ldm.text import literal, looks_up, read_text
from ldm.util import UserError, folder_name, shipped
from ldm.words import is_unicode

MOST_YAML, MOST_NODES, MOST_DEEP = 4_000_000, 100_000, 50      # bytes, values and levels of a configuration file
MOST_INCLUDED = 100      # files that one includes, and those include
RETRIEVING = ("url", "index", "clip", "threshold", "allow_private")     # keys of data.reg in earlier versions
LARGEST = 10 ** 300      # what whole numbers stay below: Python prints none of 4,300 digits


def meanings(schema: type, path: str = "") -> dict[str, str]:
    """Returns what each dotted key of a schema means: the comment in its margin, "" where there is none."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
    found = {}
    kinds = get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name, kind = entry.name, kinds[entry.name]
        found[f"{path}{name}"] = comments.get(name, "")
        if dataclasses.is_dataclass(kind):
            found |= meanings(kind, f"{path}{name}.")
    return found


def merge(schema: type, files: Sequence[str | Path], overrides: Sequence[str] = (), extra: DictConfig | None = None,
          data: bool = False) -> DictConfig:
    """Merges YAML files left to right, then `extra`, then `key=value` overrides, into `schema`.

    A file's `include` lists further files, which come before it.

    Args:
        data: nobody named the files as configurations, as with a run's folder: they may look nothing up, and include
            nothing.

    Raises:
        UserError: a file is missing or no YAML; a key is unknown (the nearest is named) or a value has another type.
    """
    parts: list[tuple[str, DictConfig]] = []
    for path in getattr(schema, "DEFAULTS", ()):     # whatever else is given merges over them
        parts.append((path, _read_yaml(Path(path))))
    for path in files:
        if data:
            parts.append((str(path), _read_yaml(Path(path))))
        else:
            parts += _read_including(Path(path))
    if data:
        for source, part in parts:
            _upgrade(part)     # runs of earlier versions stay resumable
            _refuse_looking_up(source, part)
    if extra is not None:
        parts.append(("the options", extra))
    config = OmegaConf.structured(schema)
    for source, part in parts:
        config = _merge_part(config, source, part)
    for item in overrides:
        _override(config, item)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{', '.join(map(str, files))}: {_first_line(error)}") from error
    _check_values(values)
    OmegaConf.set_readonly(config, True)     # what is resolved and printed is what is used
    return config


def _read_including(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """Reads a file and those it includes, which come first, each with its name.

    Raises:
        UserError: a file includes itself, or is no list of files.
    """
    part = _read_yaml(path)
    if "include" not in part:
        return [(str(path), part)]
    included = part.pop("include")
    if not isinstance(included, ListConfig) or not all(isinstance(name, str) for name in included):
        raise UserError(f"{path}: include must be a list of configuration files.")
    place = shipped(path).resolve()
    if place in above or len(included) > MOST_INCLUDED or len(above) > MOST_DEEP:
        raise UserError(f"{path}: it includes itself, or too many files; take that out of include.")
    parts: list[tuple[str, DictConfig]] = []
    for name in included:
        beside = place.parent / name     # a file's own neighbors, else the repository's
        inner = beside if beside.exists() else Path(name)
        parts += _read_including(inner, (*above, place))
    return [*parts, (str(path), part)]


def _refuse_looking_up(source: str, part: DictConfig) -> None:
    """Refuses ${...} in a file that nobody named as a configuration: it could read environment variables."""
    if looks_up(OmegaConf.to_container(part, resolve=False)):
        raise UserError(f"{source}: holds ${{...}}, which is looked up in configuration files given with -b alone; "
                        "write the value itself.")


def _merge_part(config: DictConfig, source: str, part: DictConfig) -> DictConfig:
    """Merges one file, or the options, into what came before."""
    try:
        for key in _unknown_keys(part, config):
            raise UserError(f"{source}: unknown key '{key}'{_nearest(key, config)}")
        return OmegaConf.merge(config, part)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"{source}: {_first_line(error)}") from error


def _check_values(values: Any) -> None:
    """Refuses texts and numbers that could be neither printed nor saved."""
    for key, value in _values(values):
        if isinstance(value, str) and not is_unicode(value):
            raise UserError(f"'{key}' is '{value}', which is not Unicode text; type it again, or rename what it names.")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise UserError(f"'{key}' is a whole number of more than 300 digits; give a smaller one.")


def _upgrade(part: DictConfig) -> None:
    """Rewrites the configuration of an earlier version's run, whose training retrieved images of the class itself."""
    settings = OmegaConf.select(part, "data.reg")
    if not isinstance(settings, DictConfig):
        return
    for key in RETRIEVING:
        settings.pop(key, None)     # retrieving is a command of its own now
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
    known: list[str] = []
    if isinstance(node, DictConfig):
        known = list(node.keys())
    elif isinstance(node, ListConfig):
        known = [str(index) for index in range(len(node))]
    if name not in known:
        raise UserError(f"unknown key '{key}'{_nearest(key, config)}")
    try:
        # Numbers, lists and truth values as YAML writes them.
        value = OmegaConf.from_dotlist([f"value={literal(item.partition('=')[2])}"]).value
        if isinstance(value, str):
            value = literal(value)
        OmegaConf.update(config, key, value, merge=False)
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"override '{item}': {_first_line(error)}") from error


def _read_yaml(path: Path) -> DictConfig:
    path = shipped(path)
    text = read_text(path, "configuration file", MOST_YAML)
    try:
        _check_size(yaml.compose(text, yaml.SafeLoader))     # before objects are made: aliases multiply
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
    sizes: dict[int, int] = {}     # by node: an alias is the node it stands for, counted once and added up often

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above or len(above) > MOST_DEEP:
            raise ValueError("it is nested without end")
        if id(node) not in sizes:
            count = 1
            for child in children_of(node):
                count += size(child, above | {id(node)})
            sizes[id(node)] = count
        if sizes[id(node)] > MOST_NODES:
            raise ValueError(f"it holds more than {MOST_NODES:,} values")
        return sizes[id(node)]

    def children_of(node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            return [part for pair in node.value for part in pair]
        return list(node.value) if isinstance(node, yaml.SequenceNode) else []

    if root is not None:
        size(root, frozenset())


def _first_line(error: Exception) -> str:
    """Returns what OmegaConf or YAML says first; further lines repeat keys and classes."""
    message = (str(error).splitlines() or [type(error).__name__])[0]
    key = getattr(error, "full_key", None)
    return f"'{key}': {message}" if key else message


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
        if full == "model":     # classes of the user's have keys of their own
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
        for entry in dataclasses.fields(ConceptConfig):
            known.append(f"concepts.0.{entry.name}")
    parent, _, leaf = key.rpartition(".")
    siblings, by_leaf = {}, {}
    for name in known:
        above, _, last = name.rpartition(".")
        by_leaf.setdefault(last, name)          # the first key of a name is the one nearest to the top
        if above == parent:
            siblings.setdefault(last, name)
    whole = dict(zip(known, known, strict=True))
    for names, wanted, cutoff in ((siblings, leaf, 0.6), (whole, key, 0.85), (by_leaf, leaf, 0.6)):
        for close in difflib.get_close_matches(wanted, names, 1, cutoff):
            return f"; did you mean '{names[close]}'?"
    return f"; the main keys are {', '.join(schema.keys())}."


def save_config(config: Any, path: Path, head: str = "", new: bool = False) -> None:
    """Writes a resolved configuration that can be run again, below comment lines `head`.

    Raises:
        UserError, NameTaken: as `ldm.files.write_atomically` does.
    """
    write_text(path, head + to_yaml(config), new)


def to_yaml(config: Any) -> str:
    """Returns a configuration, or an object of its schema, as YAML that can be read again."""
    return OmegaConf.to_yaml(OmegaConf.create(literal(to_dict(config))))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration, or an object of its schema, as plain dicts and lists."""
    if not OmegaConf.is_config(config):
        model = config.model                     # OmegaConf's already, which no structured field takes
        config = OmegaConf.structured(dataclasses.replace(config, model=None))
        config.model = model
    return OmegaConf.to_container(config, resolve=True)
