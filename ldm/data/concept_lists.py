"""Lists of concepts, whoever wrote them: concept_list.json, CustomConcept101's JSON, DreamBooth's tree of folders."""
from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path
from typing import Any

from ldm.data.listing import entries_of
from ldm.records import load_json
from ldm.text import read_lines, read_text
from ldm.util import UserError
from ldm.words import NEW_WORD

CLASSES = "prompts_and_classes.txt"     # of DreamBooth's data set: a table of classes, then two lists of prompts
LIVE_CLASSES = ("cat", "dog")           # which have the second of these lists, all others the first
REQUIRED = ("instance_data_dir", "class_prompt")
COMPOSED = "prompt_filename_compose"    # third entry of CustomConcept101's pairs: the prompts that ask for both
# "a close-up photo of the cat" and "a cat" to "cat"; and words that no noun holds.
_PHOTO_OF = re.compile(r"^(?:(?:\S+ ){0,3}(?:photo|photograph|picture|image|painting|drawing|portrait|shot) of )?"
                       r"(?:(?:an?|the|one|my) )?", re.IGNORECASE)
_SENTENCE = re.compile(r"[,;:!?]|(?<![\w-])(?:an?|the|of|in|on|at|with|and|by|from|near|under|is|wearing)(?![\w-])",
                       re.IGNORECASE)


@dataclass(frozen=True)
class ListedConcept:
    """One concept of a list; empty where the list does not say.

    Attributes:
        name: its folder's.
        images: its folder of photos.
        class_noun: what it is.
        words: the new words its list calls it by.
        regularization: its folder of class images.
        prompts: what a data set asks of it, with {} for the concept.
    """

    name: str
    images: str
    class_noun: str
    words: tuple[str, ...] = ()
    regularization: str = ""
    prompts: tuple[str, ...] = ()

    def entry(self) -> dict[str, Any]:
        """Returns what the list says as an entry of a configuration's `concepts`."""
        return {"name": self.name, "images": self.images, "class_noun": self.class_noun,
                "words": list(self.words) or None, "regularization": self.regularization or None}


def read_concepts(path: Path, prompts: bool = False) -> list[ListedConcept]:
    """Reads all concepts of a list.

    Args:
        path: Custom Diffusion's concept_list.json; CustomConcept101's dataset.json or dataset_multiconcept.json; or a
            folder with one folder of images per concept, whose class nouns come from its prompts_and_classes.txt, as
            DreamBooth's data set has one, else from the folders' names.
        prompts: whether the prompts are wanted, which only data sets have.

    Raises:
        UserError: it is none of these, or a part of it is missing.
    """
    path = Path(path)
    if path.is_dir():
        return _tree(path, prompts)
    concepts = []
    for number, entry in enumerate(_entries(path), 1):
        concepts.append(_concept_of(entry, number, path, prompts))
    return concepts


def choose_concepts(path: Path, chosen: Sequence[str] = ()) -> list[ListedConcept]:
    """Reads the concepts to train: all of a concept_list.json; of what holds a data set, those that `chosen` names.

    Raises:
        UserError: as `read_concepts` does; or a chosen one is not there, or none is chosen among many.
    """
    path = Path(path)
    concepts = read_concepts(path)
    names = [concept.name for concept in concepts]
    unknown = [name for name in chosen if name not in names]
    if unknown or not (chosen or len(concepts) == 1 or not _is_dataset(path)):
        problem = f"has no subject '{unknown[0]}'" if unknown else f"holds {len(concepts)} subjects"
        some = ", ".join([*names[:8], "..."] if len(names) > 8 else names)
        raise UserError(f"'{path}' {problem}; choose with --subject among {some}.")
    if chosen:
        concepts = [concepts[names.index(name)] for name in chosen]
    # Of the chosen ones only: others' need not be there.
    concepts = [_with_classes(concept, path) for concept in concepts]
    words: list[str] = []
    for concept in concepts:
        words += concept.words
    if len(set(words)) < len(words):     # a data set calls every concept <new1>; together they need their own words
        concepts = [replace(concept, words=()) for concept in concepts]
    return concepts


def _is_dataset(path: Path) -> bool:
    """Says whether a list holds a data set, of which nobody wants all concepts in one run."""
    return path.is_dir() or any("prompt_filename" in entry for entry in _entries(path))


def _with_classes(concept: ListedConcept, path: Path) -> ListedConcept:
    """Drops a folder of class images that is not there, saying so."""
    if not concept.regularization or exists(concept.regularization):
        return concept
    warnings.warn(f"the class_data_dir '{concept.regularization}' of '{concept.name}' in '{path}' does not exist, "
                  "so no class images come from there; data.reg.mode=generate would draw some", stacklevel=3)
    return replace(concept, regularization="")


# --- JSON ---------------------------------------------------------------------------------------------------------

def _entries(path: Path) -> list[Mapping[str, Any]]:
    """Reads a JSON list's entries of one concept each; CustomConcept101's pairs come one after the other."""
    content = load_json(path, "list of concepts")
    entries = content if isinstance(content, list) else []
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, list):
            found += entry                  # a pair
        else:
            found.append(entry)
    concepts = [entry for entry in found if not _is_composed(entry)]
    if not concepts:
        raise UserError(f"'{path}' is no list of concepts; compare it with Custom Diffusion's concept_list.json.")
    for number, entry in enumerate(concepts, 1):
        if not isinstance(entry, dict) or not _has_texts(entry, REQUIRED):
            raise UserError(f"concept {number} of '{path}' lacks {' or '.join(REQUIRED)}; add them.")
    return concepts


def _is_composed(entry: object) -> bool:
    """Says whether an entry is the third of a pair, which names prompts for both concepts."""
    return isinstance(entry, dict) and set(entry) == {COMPOSED}


def _has_texts(entry: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Says whether an entry has a text under each of some keys."""
    return all(_is_text(entry.get(key)) for key in keys)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _concept_of(entry: Mapping[str, Any], number: int, path: Path, with_prompts: bool) -> ListedConcept:
    """Reads concept `number` of a JSON list."""
    images = _place(entry["instance_data_dir"], path)
    instance_prompt = str(entry.get("instance_prompt", ""))
    noun = _class_noun(entry["class_prompt"], instance_prompt)
    if noun is None:
        raise UserError(f"concept {number} of '{path}': the class noun cannot be told from class_prompt "
                        f"'{entry['class_prompt']}'; write the noun alone there, such as \"class_prompt\": \"cat\".")
    classes = ""
    if _is_text(entry.get("class_data_dir")):
        classes = str(_place(entry["class_data_dir"], path))
    prompts: tuple[str, ...] = ()
    if with_prompts:
        prompts = _prompts_of(entry, number, path)
    return ListedConcept(images.name, str(images), noun, tuple(NEW_WORD.findall(instance_prompt)), classes, prompts)


def _prompts_of(entry: Mapping[str, Any], number: int, path: Path) -> tuple[str, ...]:
    if not _is_text(entry.get("prompt_filename")):
        raise UserError(f"concept {number} of '{path}' lacks prompt_filename; is it CustomConcept101's dataset.json?")
    lines = read_lines(_place(entry["prompt_filename"], path), "prompt file")
    return tuple(filter(None, lines))


def _class_noun(class_prompt: str, instance_prompt: str) -> str | None:
    """Reads the class noun off a list's two prompts; None where they leave it open.

    Custom Diffusion's lists have the noun itself as class_prompt, DreamBooth's a sentence such as "a photo of a cat".
    What follows the new words in instance_prompt ("photo of a <new1> cat") confirms or decides.
    """
    said = " ".join(class_prompt.split()).rstrip(".")
    after = " ".join(NEW_WORD.split(instance_prompt)[-1].split()).rstrip(".")
    noun = _PHOTO_OF.sub("", said)
    if after == said or not _SENTENCE.search(noun):
        return noun or None
    follows = NEW_WORD.search(instance_prompt) and after and not _SENTENCE.search(after)
    if follows and re.search(rf"\b{re.escape(after)}\b", said, re.IGNORECASE):
        return after
    return None


def _place(text: str, path: Path) -> Path:
    """Returns what a JSON file names, seen from the current folder, the file's, or that one's parent."""
    for base in (Path(), path.parent, path.absolute().parent.parent):
        if exists(base / text):
            return base / text
    return path.parent / text


# --- trees of folders ---------------------------------------------------------------------------------------------

def _tree(folder: Path, with_prompts: bool) -> list[ListedConcept]:
    """Reads a folder of folders, one per concept."""
    nouns = _table(folder / CLASSES)     # what the table says wins over folders' names
    for entry in entries_of(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            nouns.setdefault(entry.name, _noun_of(entry.name))
    if with_prompts and not (folder / CLASSES).is_file():
        raise UserError(f"'{folder}' is no data set known here; give CustomConcept101's dataset.json or DreamBooth's "
                        f"folder with {CLASSES}.")
    if not with_prompts and not nouns:
        raise UserError(f"'{folder}' holds no folders of images, one per subject; give one folder with --datapath.")
    objects, live = _dreambooth_prompts(folder / CLASSES) if with_prompts else ((), ())
    concepts = []
    for name, noun in nouns.items():
        prompts = live if noun in LIVE_CLASSES else objects
        concepts.append(ListedConcept(name, str(folder / name), noun, prompts=prompts))
    return concepts


def _noun_of(name: str) -> str:
    """Reads a class noun off a folder's name: "wooden_pot2" is a wooden pot."""
    return re.sub(r"[_\W]*\d*$", "", name).replace("_", " ").strip() or name


def _table(path: Path) -> dict[str, str]:
    """Reads the class nouns of DreamBooth's table by their folders; nothing where there is no such file."""
    if not path.is_file():
        return {}
    rows = re.findall(r"^([\w-]+),([\w -]+)$", read_text(path, "list of classes"), flags=re.MULTILINE)
    return {name: noun.strip() for name, noun in rows[1:]}      # the first is a heading


def _without_class(text: str) -> str:
    """Writes {} for the concept's word in a prompt of DreamBooth's, and leaves out its class."""
    return " ".join(text.replace("{0}", "{}").replace("{1}", "").split())


def _dreambooth_prompts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads DreamBooth's two lists of prompts, for objects and for live subjects, {} for the concept's word."""
    lists = []
    for part in read_text(path, "list of classes").split("prompt_list")[1:]:
        found = re.findall(r"'([^']*\{0\}[^']*)'", part)     # the prompts are Python there, which is not run
        lists.append(tuple(map(_without_class, found)))
    if not _table(path) or len(lists) != 2 or not all(lists):
        raise UserError(f"'{path}' is not as DreamBooth's data set has it: a table of classes and two prompt lists.")
    objects, live = lists
    return objects, live
