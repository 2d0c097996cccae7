"""Which generated images belong to which prompts: our own folders, and the layouts of other people's results."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.listing import entries_of, list_images
from ldm.records import load_json
from ldm.sheets import read_settings
from ldm.text import read_lines
from ldm.util import UserError, shipped


@dataclass(frozen=True)
class Found:
    """An image file, its prompt where it is known, and what its file says of how it was drawn."""

    path: Path
    prompt: str | None
    settings: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Reads a file of prompts, one per line, each of which must mention the concept as {}.

    Raises:
        UserError: the file is missing or empty, or a prompt lacks {}.
    """
    lines = [line for line in read_lines(shipped(path), "prompt file") if line]
    prompts = tuple(dict.fromkeys(lines))          # a repeated one would be measured twice
    if not prompts:
        raise UserError(f"prompt file '{path}' is empty; write one prompt per line, with {{}} for the concept.")
    for prompt in prompts:
        if "{}" not in prompt:
            raise UserError(f"prompt file '{path}': '{prompt}' does not name the concept; write {{}} where it stands.")
    return prompts


def read_images(folder: Path, prompts: Path | None = None) -> list[Found]:
    """Finds a folder's images and their prompts.

    Prompts come from the file `prompts`: JSON {file name without suffix: prompt}, or text with a line per image in
    order of names. Without it they come from prompts.json beside the images or beside their folder samples/
    (CustomConcept101), from the names of sub-folders, one per prompt (as DreamBooth results are often kept), or from
    our images' own settings.

    Raises:
        UserError: nothing is there, or prompts and images do not match.
    """
    if not folder.is_dir():
        raise UserError(f"image folder '{folder}' does not exist; give the folder that holds the images.")
    # As our runs and CustomConcept101's lay them.
    inner = folder / "samples" if (folder / "samples").is_dir() else folder
    source = prompts
    for beside in (folder / "prompts.json", inner / "prompts.json"):
        if prompts is None and beside.is_file():
            source = beside                         # the inner one, where there are two
    if source is None:
        return _by_folder(inner) or sampled_images(_usable(inner))
    paths = _usable(inner, source)
    texts = _prompts_by_name(source, paths) if source.suffix == ".json" else _prompts_in_order(source, paths)
    return [Found(path, text, read_settings(path)) for path, text in zip(paths, texts, strict=True)]


def sampled_images(paths: Sequence[Path]) -> list[Found]:
    """Reads the prompts of images that were drawn here from the images themselves."""
    found = []
    for path in paths:
        settings = read_settings(path)
        found.append(Found(path, settings.get("prompt"), settings))
    return found


def _by_folder(folder: Path) -> list[Found]:
    """Reads sub-folders named by prompts, underscores for spaces; none where the folder holds images itself."""
    entries = [path for path in entries_of(folder) if not path.name.startswith(".")]
    if not entries or not all(path.is_dir() for path in entries):     # DreamBooth's results are often kept so
        return []
    found = []
    for entry in entries:
        prompt = entry.name.replace("_", " ")
        found += [Found(path, prompt) for path in _usable(entry)]
    return found


def _usable(folder: Path, prompts: Path | None = None) -> list[Path]:
    """Returns a folder's usable images, naming what is passed over beside their prompts."""
    paths, skipped = list_images(folder)
    for item in skipped:
        if item.path != prompts and not item.path.name.startswith("."):     # the prompts' own file, and hidden ones
            print(f"skipped {item}", flush=True)
    return paths


def _prompts_by_name(source: Path, paths: Sequence[Path]) -> list[str]:
    """Looks up each image's prompt in a JSON file."""
    table = load_json(source, "file")
    if not isinstance(table, dict):
        raise UserError(f"'{source}' must hold a JSON object.")
    texts, unmatched, unused = [], [], set(table)
    for path in paths:
        text = table.get(path.stem, table.get(path.name))
        if not isinstance(text, str):
            unmatched.append(path.name)
        texts.append(text)
        unused -= {path.stem, path.name}
    if unmatched or unused:
        what = f"no prompt for image '{unmatched[0]}'" if unmatched else f"no image for entry '{sorted(unused)[0]}'"
        raise UserError(f"'{source}' does not match the images of '{paths[0].parent}': {what} "
                        f"({len(unmatched)} images without prompt, {len(unused)} prompts without image); fix it.")
    return texts


def _prompts_in_order(source: Path, paths: Sequence[Path]) -> list[str]:
    """Reads one prompt per image."""
    texts = read_lines(source, "prompt file")
    if len(texts) != len(paths):     # an order that cannot be checked must at least be complete
        raise UserError(f"prompt file '{source}' has {len(texts)} lines but '{paths[0].parent}' holds {len(paths)} "
                        "images; give one line per image, in order of the images' names.")
    return texts

