"""Inputs people already have: folders, lists, captions beside images, Custom Diffusion's JSON, trees of subjects."""
from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from os.path import exists, isfile
from pathlib import Path
from typing import Any

from ldm.data.images import Skipped, entries_of, find_listed, list_images, some_skipped, why_unusable
from ldm.records import BadRecord, load_json, parse_json
from ldm.text import NEW_WORD, read_lines, read_text
from ldm.util import UserError, shipped

IMAGES, CAPTIONS = "images.txt", "caption.txt"
METADATA = ("metadata.jsonl", "metadata.csv")
CLASSES = "prompts_and_classes.txt"      # in DreamBooth's data set: "subject,class" lines among others
SIDECARS = (".txt", ".caption")
# "a close-up photo of the cat" and "a cat" to "cat"; and words that no noun holds.
_PHOTO_OF = re.compile(r"^(?:(?:\S+ ){0,3}(?:photo|photograph|picture|image|painting|drawing|portrait|shot) of )?"
                       r"(?:(?:an?|the|one|my) )?", re.IGNORECASE)
_SENTENCE = re.compile(r"[,;:!?]|(?<![\w-])(?:an?|the|of|in|on|at|with|and|by|from|near|under|is|wearing)(?![\w-])",
                       re.IGNORECASE)


@dataclass(frozen=True)
class Captioned:
    """Usable images in order, what is said about each (None where nothing is), what was passed over, the layout."""

    paths: list[Path]
    captions: list[str | None]
    skipped: list[Skipped]
    layout: str


@dataclass(frozen=True)
class Subject:
    """One concept of a list of concepts; empty where the list does not say."""

    name: str
    images: str
    class_noun: str
    words: tuple[str, ...] = ()
    regularization: str = ""


def captioned(path: Path, check: Callable[[Path], str | None] = why_unusable, captions: bool = True) -> Captioned:
    """Finds images and their captions.

    Args:
        path: a folder of images, perhaps with a.txt or a.caption beside a.jpg, or with metadata.jsonl or
            metadata.csv; a folder that holds images.txt; a list of images, whose captions are in caption.txt beside
            it if it is an images.txt; or one image. Paths in lists may start at the list's folder, its parent, or
            the current one.
        check: says why a file is unusable, None where it is not; called from several threads.
        captions: whether captions are wanted; files that hold them are not looked into where they are not.

    Raises:
        UserError: nothing is there or usable, or captions do not match images.
    """
    path = shipped(path)
    if (path / IMAGES).is_file():
        path = path / IMAGES
    if captions and path.is_file() and path.name == IMAGES and path.with_name(CAPTIONS).exists():
        return _listed(path, check)
    paths, skipped = list_images(path, check)
    if not path.is_dir():
        return Captioned(paths, [None] * len(paths), skipped, "list of images")
    texts = [path / name for name in METADATA]
    known = {*texts, *(sidecar for image in paths for sidecar in _sidecars(image))}
    skipped = [item for item in skipped if item.path not in known]
    said, layout = _folder_captions(paths, texts) if captions else ({}, "folder")
    return Captioned(paths, [said.get(image) for image in paths], skipped, layout)


def _folder_captions(paths: Sequence[Path], texts: Sequence[Path]) -> tuple[dict[Path, str], str]:
    """Returns what the first of the lists `texts` that is there, or else the texts beside images, say of `paths`."""
    found = next((text for text in texts if text.is_file()), None)
    if found is None:
        said = {image: text for image in paths if (text := _beside(image))}
        return said, f"folder with {len(said)} captions beside images" if said else "folder"
    listed = _read_caption_table(found)      # by resolved paths, as one image may be named from several folders
    said = {image: text for image in paths if (text := listed.get(image.resolve()))}
    return said, f"folder with {len(said)} captions in {found.name}"


def _sidecars(image: Path) -> list[Path]:
    """Lists where the text beside an image may be: a.txt or a.jpg.txt for a.jpg, or .caption for .txt."""
    return [place for suffix in SIDECARS
            for place in (image.with_suffix(suffix), image.with_name(image.name + suffix))]


def _beside(image: Path) -> str | None:
    """Returns the text beside an image; None where there is none."""
    for place in _sidecars(image):
        if isfile(place):     # a name may be too long for this disk
            return " ".join(" ".join(read_lines(place, "caption")).split()) or None
    return None


def _read_caption_table(path: Path) -> dict[Path, str]:
    """Reads captions by resolved image from metadata.jsonl or metadata.csv: file_name, text (or caption)."""
    said = {}
    for number, entry in (_csv_rows if path.suffix == ".csv" else _json_rows)(path):
        name, text = entry.get("file_name"), entry.get("text", entry.get("caption"))
        if not isinstance(name, str) or not name:
            raise UserError(f"line {number} of '{path}' does not say which image it is about; name it as file_name, "
                            "and what it shows as text.")
        image = find_listed(name, path)
        if not isfile(image):
            raise UserError(f"line {number} of '{path}' names '{name}', which is not there; correct it.")
        if isinstance(text, str) and text.strip():
            said[image.resolve()] = " ".join(text.split())
    return said


def _json_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads lines {"file_name": "a.jpg", "text": "..."} with their numbers."""
    rows = []
    for number, line in enumerate(read_lines(path, "list of captions"), 1):
        try:
            entry = parse_json(line) if line else None
        except BadRecord as error:
            raise UserError(f"line {number} of '{path}' is no JSON ({error}); correct it.") from error
        if line and not isinstance(entry, dict):
            raise UserError(f"line {number} of '{path}' is not as expected; write "
                            '{"file_name": "a.jpg", "text": "what it shows"}.')
        if line:
            rows.append((number, entry))
    return rows


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads the rows below a heading such as file_name,text with their lines' numbers."""
    reader = csv.DictReader(StringIO(read_text(path, "list of captions"), newline=""), strict=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"line {reader.reader.line_num} of '{path}' is no CSV ({error}); correct it.") from error


def _listed(path: Path, check: Callable[[Path], str | None]) -> Captioned:
    """Reads images.txt with the caption.txt beside it."""
    lines = read_lines(path, "list")
    rows = [(find_listed(line, path), text) for line, text in
            zip(lines, read_captions(path.with_name(CAPTIONS), path, len(lines)), strict=True) if line]
    reasons = [check(image) for image, _ in rows]
    skipped = [Skipped(image, reason) for (image, _), reason in zip(rows, reasons, strict=True) if reason]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    if not kept:
        raise UserError(f"list '{path}' names no usable image ({some_skipped(skipped) or 'it is empty'}); "
                        "correct it.")
    return Captioned([image for image, _ in kept], [text for _, text in kept], skipped,
                     f"{IMAGES} with {CAPTIONS}")


def read_captions(path: Path, images: Path, count: int) -> list[str]:
    """Reads `count` captions, one per line.

    Raises:
        UserError: there are more or fewer, or one is empty.
    """
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; write one caption per line of '{images}', or give a caption.")
    captions = read_lines(path, "caption file")
    if len(captions) != count:
        raise UserError(f"'{images}' has {count} lines but '{path}' has {len(captions)}; "
                        "give every image exactly one caption, on the same line.")
    if "" in captions:
        raise UserError(f"line {captions.index('') + 1} of '{path}' is empty; say there what the image shows.")
    return captions


def read_subjects(path: Path, chosen: Sequence[str] = ()) -> list[Subject]:
    """Reads concepts from Custom Diffusion's concept_list.json, CustomConcept101's dataset.json, or a tree of folders.

    A tree has one folder of images per subject; class nouns come from its prompts_and_classes.txt, as DreamBooth's
    data set has one, else from the folders' names. All concepts of a concept_list.json are taken; of the other two,
    which hold data sets, those that `chosen` names.

    Raises:
        UserError: the file is something else, or a chosen subject is not in it.
    """
    path = Path(path)
    if path.is_dir():
        subjects, all_of_them = _tree(path), False
    else:
        subjects, all_of_them = _json(path)
    names = [subject.name for subject in subjects]
    unknown = [name for name in chosen if name not in names]
    if unknown or not (chosen or all_of_them or len(subjects) == 1):
        problem = f"has no subject '{unknown[0]}'" if unknown else f"holds {len(subjects)} subjects"
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(f"'{path}' {problem}; choose with --subject among {some}.")
    picked = [_with_classes(subject, path) for subject in [subjects[names.index(name)] for name in chosen] or subjects]
    words = [word for subject in picked for word in subject.words]
    if len(set(words)) < len(words):     # a data set calls every subject <new1>; together they need their own words
        picked = [replace(subject, words=()) for subject in picked]
    return picked


def _tree(path: Path) -> list[Subject]:
    nouns = {}
    if (path / CLASSES).is_file():
        pairs = [line.split(",") for line in read_lines(path / CLASSES, "list of classes")]
        nouns = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    folders = [folder for folder in entries_of(path) if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        raise UserError(f"'{path}' holds no folders of images, one per subject; give one folder with --datapath.")
    return [Subject(folder.name, str(folder), nouns.get(folder.name) or _noun_of(folder.name)) for folder in folders]


def _noun_of(name: str) -> str:
    """Reads a class noun off a folder's name: "wooden_pot2" is a wooden pot."""
    return re.sub(r"[_\W]*\d*$", "", name).replace("_", " ").strip() or name


def _json(path: Path) -> tuple[list[Subject], bool]:
    """Reads a JSON list of concepts; says too whether all of them are meant."""
    entries = load_json(path, "list of concepts")
    if isinstance(entries, list) and entries and all(isinstance(entry, list) for entry in entries):
        entries = [entry for group in entries for entry in group]      # CustomConcept101's groups of two
    if not isinstance(entries, list) or not entries:
        raise UserError(f"'{path}' is no list of concepts; compare it with Custom Diffusion's concept_list.json.")
    subjects = [_subject(entry, number, path) for number, entry in enumerate(entries, 1)]
    return subjects, not any("prompt_filename" in entry for entry in entries)


def _subject(entry: Any, number: int, path: Path) -> Subject:
    keys = ("instance_data_dir", "class_prompt")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key].strip() for key in keys):
        raise UserError(f"concept {number} of '{path}' lacks {' or '.join(keys)}; add them.")
    images, classes = _place(entry["instance_data_dir"], path), entry.get("class_data_dir")
    prompt = str(entry.get("instance_prompt", ""))
    noun = _class_noun(entry["class_prompt"], prompt)
    if noun is None:
        raise UserError(f"concept {number} of '{path}': the class noun cannot be told from class_prompt "
                        f"'{entry['class_prompt']}'; write the noun alone there, such as \"class_prompt\": \"cat\".")
    return Subject(images.name, str(images), noun, tuple(NEW_WORD.findall(prompt)),
                   str(_place(classes, path)) if isinstance(classes, str) and classes else "")


def _class_noun(class_prompt: str, instance_prompt: str) -> str | None:
    """Reads the class noun off a list's two prompts; None where they leave it open.

    Custom Diffusion's lists have the noun itself as class_prompt, DreamBooth's a sentence such as "a photo of a cat".
    What follows the new words in instance_prompt ("photo of a <new1> cat") confirms or decides.
    """
    said, after = (" ".join(text.split()).rstrip(".") for text in (class_prompt, NEW_WORD.split(instance_prompt)[-1]))
    noun = _PHOTO_OF.sub("", said)
    if after == said or not _SENTENCE.search(noun):
        return noun or None
    if NEW_WORD.search(instance_prompt) and after and not _SENTENCE.search(after) and re.search(
            rf"\b{re.escape(after)}\b", said, re.IGNORECASE):
        return after
    return None


def _with_classes(subject: Subject, path: Path) -> Subject:
    """Drops a folder of class images that is not there, saying so."""
    if not subject.regularization or exists(subject.regularization):
        return subject
    warnings.warn(f"the class_data_dir '{subject.regularization}' of '{subject.name}' in '{path}' does not exist, "
                  "so no class images come from there; data.reg.mode=generate would draw some", stacklevel=3)
    return replace(subject, regularization="")


def _place(text: str, path: Path) -> Path:
    """Returns the folder a JSON file means, seen from the current directory, the file's, or that one's parent."""
    places = [base / text for base in (Path(), path.parent, path.absolute().parent.parent)]
    return next((place for place in places if exists(place)), places[0])
