"""Images of any shape become squares of one size, with a mask of what counts; pixels become tensors and back."""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import DecodedImage, load_decoded
from ldm.data.listing import WORKERS
from ldm.util import UserError

BLACK = 16      # 8-bit level up to which a pixel counts as black: JPEG leaves some noise in black


def square(image: Image.Image, size: int, crop: str = "center", fill: int | str = "white") -> Image.Image:
    """Resizes an image to `size` pixels a side without squashing it, smoothing as it shrinks.

    Args:
        crop: "center" cuts the largest centered square out; "pad" keeps all of it on a square of color `fill`.
    """
    if crop == "pad":
        scale = size / max(image.size)
        inner = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        page = Image.new(image.mode, (size, size), fill)
        page.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
        return page
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def has_black_bars(pixels: np.ndarray) -> bool:
    """Says whether a square (S, S, 3) uint8 has black on two opposite sides, as letterboxed photos do."""
    dark = pixels.max(axis=2) <= BLACK                                                              # (S, S)
    depth = max(1, len(pixels) // 32)
    return any(bool(one[:depth].all() and one[-depth:].all()) for one in (dark, dark.T))


def bars_advice(trim: bool) -> str:
    """Words the warning of black bars; with `trim` those that are unmistakable are gone already."""
    way = "crop them off by hand" if trim else "data.trim_bars=true crops them off"
    return f"black bars, which would be learned too; {way}"


def trim_bars(decoded: DecodedImage) -> DecodedImage:
    """Crops black bars on two opposite sides off an image, as letterboxed and pillarboxed photos have them.

    Sure signs are wanted: both bars are black from end to end, no broader than two fifths of the image, and end
    sharply in a line that is lit for the most part. So a night's sky, a dark floor and a thing on black cloth stay.
    """
    pixels = np.asarray(decoded.image).max(axis=2)                                                  # (H, W)
    top, bottom = _between_bars(pixels)
    left, right = _between_bars(pixels[top:bottom].T)
    if (top, bottom) == (0, len(pixels)):       # bars at the sides may have kept those above and below from ending lit
        top, bottom = _between_bars(pixels[:, left:right])
    box = (left, top, right, bottom)
    if box == (0, 0, *decoded.image.size):
        return decoded
    alpha = decoded.alpha
    if alpha is not None:
        alpha = alpha.crop(box)
    note = f"black bars cropped off: {right - left} x {bottom - top} px are left"
    return DecodedImage(decoded.image.crop(box), alpha, (*decoded.notes, note))


def _between_bars(pixels: np.ndarray) -> tuple[int, int]:
    """Returns the rows, from and to, that lie between a black bar above and one below; all where there are not both."""
    count = len(pixels)
    dark, lit = (pixels <= BLACK).mean(axis=1), (pixels > 3 * BLACK).mean(axis=1)                   # (H,)
    ends = [_end_of_bar(*shares, count) for shares in ((dark, lit), (dark[::-1], lit[::-1]))]
    if None in ends:
        return 0, count
    return ends[0], count - ends[1]


def _end_of_bar(dark: np.ndarray, lit: np.ndarray, count: int) -> int | None:
    """Returns how many of `count` rows a bar at their beginning takes, its blurred edge included; None without a bar.

    Args:
        dark, lit: (H,) shares of each row that are black, and far from it.
    """
    depth = int(np.argmax(dark < 0.98))       # 0 where the first row is no bar, or every row is
    if not 0 < depth <= 0.4 * count:
        return None
    edge = slice(depth, depth + max(8, count // 100))       # JPEG blurs what lies in one block of 8
    sharp = (dark[edge] <= 1 / 3) & (lit[edge] >= 1 / 2)
    if not sharp.any():
        return None
    return depth + int(np.argmax(sharp)) + 1 + count // 500


@dataclass(frozen=True)
class Framing:
    """How images of any shape become squares of one size.

    Attributes:
        size: side in px.
        crop: "center" cuts the largest centered square out, "pad" keeps everything and fills up with `background`.
        background: color behind what is transparent, and beside what is padded.
        alpha_mask: leaves transparent pixels out of the loss.
        trim_bars: crops black bars off first.
    """

    size: int
    crop: str = "center"
    background: str = "white"
    alpha_mask: bool = False
    trim_bars: bool = False

    def frame(self, decoded: DecodedImage) -> tuple[np.ndarray, np.ndarray]:
        """Returns an image as (size, size, 3) uint8 and its loss mask as (size, size) uint8, 255 where it counts."""
        if self.trim_bars:
            decoded = trim_bars(decoded)
        image = square(decoded.image, self.size, self.crop, self.background)
        opacity = decoded.alpha if self.alpha_mask else None
        if opacity is None and self.crop == "center":
            return np.asarray(image), np.full((self.size, self.size), 255, np.uint8)
        if opacity is None:
            opacity = Image.new("L", decoded.image.size, 255)
        return np.asarray(image), np.asarray(square(opacity, self.size, self.crop, 0))


def load_framed(paths: Sequence[Path], framing: Framing) -> tuple[Tensor, Tensor | None]:
    """Reads images as squares.

    Returns:
        Images (N, size, size, 3) uint8 and their loss masks (N, size, size) uint8, 255 where a pixel counts; None
        in place of masks where every pixel of every image does.

    Raises:
        UserError: an image cannot be read, or nothing of it would count.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        framed = list(pool.map(partial(_open_framed, framing=framing), paths))
    images, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*framed, strict=True))
    if bool((masks == 255).all()):
        return images, None
    return images, masks


def join_masks(images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor | None:
    """Puts the loss masks of several sets (N, H, W) behind each other, all-counting where a set has none."""
    if all(own is None for own in masks):
        return None
    joined = []
    for pixels, own in zip(images, masks, strict=True):
        if own is None:
            own = torch.full(pixels.shape[:3], 255, dtype=torch.uint8)
        joined.append(own)
    return torch.cat(joined)


def _open_framed(path: Path, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
    image, mask = framing.frame(load_decoded(path, framing.background))
    if not mask.any():
        raise UserError(f"image '{path}' is transparent all over, so nothing of it would be learned; take it out, or "
                        "set data.alpha_mask to false.")
    return image, mask


def to_tensor(image: Image.Image) -> Tensor:
    """Turns an RGB image into (H, W, 3) float32 in [-1, 1]."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}")
    return torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1                          # (H, W, 3)


def to_images(x: Tensor) -> list[Image.Image]:
    """Turns decoded images (B, 3, H, W), in [-1, 1] but for overshoot, into 8-bit RGB images.

    Raises:
        UserError: a value is not finite, so the image would be noise or black.
    """
    if not torch.isfinite(x).all():
        raise UserError("the decoded image holds values that are not finite numbers; run in full precision.")
    x = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)                    # (B, 3, H, W)
    return [Image.fromarray(pixels) for pixels in x.permute(0, 2, 3, 1).cpu().numpy()]              # (H, W, 3) each
