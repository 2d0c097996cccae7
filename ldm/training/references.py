"""The reference images of a run: found, read as the network will see them, shown in its folder."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ldm.config import ConceptConfig, DataConfig
from ldm.customization.ico import PromptScheme, caption_template
from ldm.data.batches import CaptionedImages
from ldm.data.captions import Captioned, captioned
from ldm.data.framing import Framing, bars_advice, has_black_bars, join_masks, load_framed
from ldm.data.images import size_of
from ldm.sheets import save_png, sheet
from ldm.util import UserError

CELL = 128      # px of an image on the references' sheet


def framing_of(data: DataConfig, size: int) -> Framing:
    """Returns how images become squares of `size` px."""
    return Framing(size, data.crop, data.background, data.alpha_mask, data.trim_bars)


def read_references(concepts: Sequence[ConceptConfig], captions: bool) -> list[Captioned]:
    """Finds every concept's reference images, naming what is skipped and counting captions where they are wanted.

    Raises:
        UserError: a concept has none, or no image has a caption though `captions` are wanted.
    """
    found = [captioned(Path(concept.images), captions=captions) for concept in concepts]
    counted = 0
    for concept, references in zip(concepts, found, strict=True):
        for item in references.skipped:
            print(f"{concept.name}: skipped {item}")
        if captions:
            count = sum(map(bool, references.captions))
            counted += count
            print(f"{concept.name}: {count} of {len(references.paths)} images have a caption")
    if captions and not counted:
        raise UserError("data.captions is true, but no reference image has a caption; write a.txt beside a.jpg, or "
                        "metadata.csv or metadata.jsonl beside the images, or set data.captions to false.")
    return found


def caption_templates(found: Sequence[Captioned], schemes: Sequence[PromptScheme]) -> list[str | None]:
    """Returns the template each reference image's own caption gives, None where it has none."""
    templates = []
    for references, scheme in zip(found, schemes, strict=True):
        for caption in references.captions:
            templates.append(caption_template(caption, scheme) if caption else None)
    return templates


def load_references(found: Sequence[Captioned], captions: Sequence[str], framing: Framing) -> CaptionedImages:
    """Reads the reference images of all concepts, warning of tiny ones and of black bars."""
    for references in found:
        for path in references.paths:
            width, height = size_of(path)     # off the header, without decoding
            if min(width, height) < framing.size:
                print(f"warning: '{path.name}' is {width} x {height} px and is enlarged to {framing.size}; a larger "
                      "photo would show more.")
    images, masks, groups, barred = [], [], [], []
    for group, references in enumerate(found):
        pixels, own = load_framed(references.paths, framing)            # (N, S, S, 3), (N, S, S) or None
        images.append(pixels)
        masks.append(own)
        groups += [group] * len(references.paths)
        for path, image in zip(references.paths, pixels.numpy(), strict=True):
            if has_black_bars(image):     # they would be learned as part of the thing
                barred.append(path.name)
    if barred:
        print(f"warning: {', '.join(barred)}: {bars_advice(framing.trim_bars)}")
    return CaptionedImages(torch.cat(images), captions, join_masks(images, masks), groups)


def save_references(references: CaptionedImages, concepts: Sequence[ConceptConfig], counts: Sequence[int],
                    folder: Path) -> None:
    """Writes references/*.png and a contact sheet of them into a run's images: exactly what the network sees."""
    images = [Image.fromarray(pixels.numpy()) for pixels in references.images]
    for index, image in enumerate(images):
        save_png(image, folder / "references" / f"{index:03d}.png")
    rows, start, columns = [], 0, max(counts)
    for concept, count in zip(concepts, counts, strict=True):
        cells = images[start:start + count]     # images lie concept after concept
        rows.append((f"{concept.name} ({concept.class_noun})", cells + [None] * (columns - count)))
        start += count
    save_png(sheet([str(index) for index in range(columns)], rows, CELL), folder / "references.png")
