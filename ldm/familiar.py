"""Forms other tools use, as configuration: Custom Diffusion's captions, lists and trees of concepts."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.text import literal
from ldm.util import UserError

ONE_CONCEPT = {"datapath": "images", "class_noun": "class_noun", "reg_datapath": "regularization",
               "reg_caption": "regularization_caption"}      # familiar flags of one concept, by the keys they set


def caption_to_method(caption: str, class_noun: str) -> dict[str, Any]:
    """Reads words and template off a Custom Diffusion caption such as 'photo of a <new1> cat'."""
    caption = caption.replace("+<", " <")
    words = [word for word in caption.split() if word.startswith("<")]
    concept = " ".join([*words, class_noun]).strip()
    if not words or concept not in caption:
        raise UserError(f"--caption '{caption}' must contain the concept words and then the class noun '{class_noun}' "
                        "(--class_noun), as in 'photo of a <new1> cat'.")
    return {"words": words, "template": caption.replace(concept, "{}")}


def check_list(path: Path | None, chosen: Sequence[str], flags: Sequence[str]) -> None:
    """Refuses what would be ignored: flags of one concept beside a list of them, subjects without a list."""
    if path and flags:
        raise UserError(f"--{flags[0]} is for one concept and means nothing beside --concepts_list; "
                        "give one of the two.")
    if chosen and not path:
        raise UserError(f"--subject '{chosen[0]}' chooses from a list, and none is given; add --concepts_list.")


def listed_concepts(path: Path, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the concepts of concept_list.json, dataset.json or a tree of subjects, as entries of `concepts`.

    Raises:
        UserError: as `ldm.data.concept_lists.choose_concepts` does.
    """
    from ldm.data.concept_lists import choose_concepts  # torch loads only when there is work for it
    return literal([concept.entry() for concept in choose_concepts(path, chosen)])
