"""The sheet of a run: reference | fine-tuned | + DCI at each lambda, one row per prompt and seed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ldm.requests import ImageRequest
from ldm.sheets import sheet


def comparison_sheet(captions: Mapping[str, tuple[str, str]], plain: str, drawn: Mapping[ImageRequest, Image.Image],
                     references: Sequence[Image.Image], title: str = "", chosen: bool = False) -> Image.Image:
    """Lays images out as reference | fine-tuned | + DCI at each lambda, one row per prompt and seed.

    Args:
        captions: by prompt, its text and what else its rows say, such as the noun of the second branch.
        plain: what the column without DCI is called.
        drawn: the images.
        references: shown in turn, one in front of each row; none leaves the column out.
        chosen: lambda was chosen for each row, which says it; DCI has one column then.
    """
    strengths = list(dict.fromkeys(request.strength for request in drawn))     # in the order they were asked for
    seeds = sorted({request.seed for request in drawn})
    columns = []
    if references:
        columns.append("reference")
    if None in strengths:
        columns.append(plain)
    if chosen:
        columns.append("+ DCI, lambda chosen")
    else:
        columns += [f"+ DCI, lambda {strength:g}" for strength in strengths if strength is not None]
    rows = []
    for index, (prompt, (text, note)) in enumerate(captions.items()):
        for seed in seeds:
            wanted = [ImageRequest(prompt, seed, strength) for strength in strengths]
            made = [request for request in wanted if request in drawn]     # all of them, unless lambda was chosen
            cells = [drawn[request] for request in made]
            said = f"seed {seed}{note}"
            if chosen:
                said += f", lambda {made[-1].strength:g}"
            if references:
                cells.insert(0, references[index % len(references)])
            rows.append((f"{text}   ({said})", cells))
    return sheet(columns, rows, title=title)
