"""The sheet of a run: reference | fine-tuned | + DCI at each lambda, one row per prompt and seed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ldm.requests import ImageRequest
from ldm.sheets import sheet


def comparison_sheet(captions: Mapping[str, tuple[str, str]], plain: str, drawn: Mapping[ImageRequest, Image.Image],
                     references: Sequence[Image.Image], title: str = "") -> Image.Image:
    """Lays images out as reference | fine-tuned | + DCI at each lambda, one row per prompt and seed.

    Args:
        captions: by prompt, its text and what else its rows say, such as the noun of the second branch.
        plain: what the column without DCI is called.
        drawn: the images.
        references: shown in turn, one in front of each row; none leaves the column out.
    """
    strengths = list(dict.fromkeys(request.strength for request in drawn))     # in the order they were asked for
    seeds = sorted({request.seed for request in drawn})
    columns = []
    if references:
        columns.append("reference")
    for strength in strengths:
        columns.append(plain if strength is None else f"+ DCI, lambda {strength:g}")
    rows = []
    for index, (prompt, (text, note)) in enumerate(captions.items()):
        for seed in seeds:
            cells = [drawn[ImageRequest(prompt, seed, strength)] for strength in strengths]
            if references:
                cells.insert(0, references[index % len(references)])
            rows.append((f"{text}   (seed {seed}{note})", cells))
    return sheet(columns, rows, title=title)
