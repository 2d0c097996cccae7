"""The embedded model's limits, as its card tells them, and a word of warning where it is asked for more."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from ldm.data.images import size_of
from ldm.words import NEW_WORD

NAME = "embedded"     # what the model is called where nobody names it
CARD = "ldm/tiny/README.md"


@cache
def vocabulary() -> dict[str, tuple[str, ...]]:
    """Returns what the captions of the model's training images can say: phrases by kind, read from its card."""
    card = (resources.files("ldm.tiny") / "README.md").read_text("utf-8")
    section = card.partition("## What it knows\n")[2].partition("\n## ")[0]
    known = {}
    for kind, text in re.findall(r"^- \*\*(\w+)\*\*: (.*(?:\n  .*)*)", section, re.MULTILINE):
        phrases = text.split(",")
        known[kind] = tuple(" ".join(phrase.split()) for phrase in phrases)      # a phrase may go over a line's end
    return known


def unknown_words(texts: Iterable[str]) -> list[str]:
    """Returns the words of prompts that the embedded model never saw, in order; concept words are no words."""
    known: set[str] = set()
    for phrases in vocabulary().values():
        known.update(re.findall(r"\w+", " ".join(phrases)))
    unknown: dict[str, None] = {}       # an ordered set
    for text in texts:
        for word in re.findall(r"[^\W\d_]+", _letters(text)):
            if word not in known:
                unknown[word] = None
    return list(unknown)


def _letters(text: str) -> str:
    """Returns a prompt in small letters, each accent joined to its own, without concept words."""
    return NEW_WORD.sub(" ", unicodedata.normalize("NFC", text.lower()))


def warn_of_words(identity: Mapping[str, str], texts: Iterable[str]) -> None:
    """Prints a line about words that the embedded model never saw; other models know more."""
    words = unknown_words(texts) if identity["name"] == NAME else []
    if words:
        noun = "word" if len(words) == 1 else "words"
        print(f"warning: the embedded model never saw the {noun} {', '.join(words)} and cannot draw what is meant; "
              f"what it knows is listed in {CARD}.", flush=True)


def warn_of_photos(identity: Mapping[str, str], images: Iterable[Path], side: int) -> None:
    """Prints a line where the embedded model, whose images are `side` px, is to learn from what must be photos."""
    if identity["name"] == NAME and any(min(size_of(path)) > 2 * side for path in images):
        print("warning: the embedded model knows its small drawn world only and will not learn these photos; give a "
              "Stable Diffusion v1 checkpoint with CKPT=FILE or --ckpt FILE.", flush=True)
