"""The one image loader: files in, upright RGB squares out, every skipped file named."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from os.path import isfile
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.text import read_lines
from ldm.util import UserError

T = TypeVar("T")
# Pillow knows far more; some of those start other programs (EPS) or accept nearly any bytes (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# White of the deep gray modes is the smallest entry no pixel exceeds: files of floats follow several customs.
_WHITES: dict[str, tuple[float, ...]] = {"I": (65535,), "F": (1, 255, 65535)}
_MODES = {"L": "gray", "LA": "gray", "P": "palette", "PA": "palette", "1": "black and white", "CMYK": "CMYK",
          "I": "32-bit gray", "F": "floating-point grey"} | dict.fromkeys(("I;16", "I;16B", "I;16L"), "16-bit grey")
CROPS = ("center", "pad")
WORKERS = 2     # decoding threads
BLACK = 16      # 8-bit level up to which a pixel counts as black: JPEG leaves some noise in black
# Phones take images of 200 megapixels. Pillow refuses twice as many by a file's header alone; what is decoded whole
# must keep to this number.
Image.MAX_IMAGE_PIXELS = 200_000_000
SHRINK_FROM = 50_000_000    # pixels from which a JPEG is made smaller while it is decoded
SHRINK_TO = 2048            # px that its shorter side keeps at least
SAME = 3                    # 8-bit levels by which a color profile may differ from sRGB and still be called that
_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True)
class Skipped:
    """A file that was passed over, and why, worded to follow its name ("is empty")."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"'{self.path.name}' {self.reason}"


class Unusable(Exception):
    """Why a file gives no image, worded as `Skipped.reason` is."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded file.

    Attributes:
        image: upright 8-bit RGB; what is transparent shows the background.
        alpha: upright 8-bit gray, 255 where opaque; None where nothing is transparent.
        notes: what had to be done to it, for the inspection's table.
    """

    image: Image.Image
    alpha: Image.Image | None
    notes: tuple[str, ...] = ()


def list_images(folder: Path, check: Callable[[Path], str | None] | None = None) -> tuple[list[Path], list[Skipped]]:
    """Finds the usable images of a folder (in natural order), of a list file (in its order), or one file.

    What a file holds decides, not its suffix: each is decoded whole. A list file is UTF-8 text with one path
    per line, seen from the list's folder, that folder's parent, or the current one. `check` says why a file is
    unusable, in place of `why_unusable`; it is called from several threads.

    Raises:
        UserError: nothing is there, or nothing there is a usable image.
    """
    folder, check = Path(folder), check or why_unusable
    if folder.is_dir():
        candidates = sorted(entries_of(folder), key=_natural)
    elif folder.is_file():
        problem = check(folder)
        if problem is None:
            return [folder], []
        try:
            candidates = [find_listed(line, folder) for line in read_lines(folder, "list") if line]
        except UserError as error:
            raise UserError(f"'{folder}' {problem}; give a folder of images or a list of them.") from error
    else:
        raise UserError(f"image folder '{folder}' does not exist; give a folder of images or a list of them.")
    hidden = [folder.is_dir() and path.name.startswith(".") for path in candidates]
    with ThreadPoolExecutor(WORKERS) as pool:      # Pillow decodes outside the interpreter's lock
        unusable = pool.map(lambda path, hide: None if hide else check(path), candidates, hidden)
        reasons = ["is hidden" if hide else reason for hide, reason in zip(hidden, unusable, strict=True)]
    paths = [path for path, reason in zip(candidates, reasons, strict=True) if reason is None]
    skipped = [Skipped(path, reason) for path, reason in zip(candidates, reasons, strict=True) if reason]
    if not paths:
        raise UserError(f"'{folder}' holds no usable image ({some_skipped(skipped) or 'it is empty'}); "
                        "put at least one JPEG, PNG or WebP there.")
    return paths, skipped


def entries_of(folder: Path) -> list[Path]:
    """Lists what a folder holds, in order of names.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be opened ({error.strerror}); check it.") from error


def find_listed(line: str, listing: Path) -> Path:
    """Returns the path a list's line means; where nothing is there, as seen from the list's folder."""
    for base in (listing.parent, listing.absolute().parent.parent, Path()):
        if isfile(base / line):     # a line may be anything, also what no file can be called
            return base / line
    return listing.parent / line


def some_skipped(skipped: list[Skipped]) -> str:
    """Names the first three skipped files with their reasons, and counts the others."""
    return "; ".join(map(str, skipped[:3])) + (f"; and {len(skipped) - 3} more" if len(skipped) > 3 else "")


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Orders names as people number them: img2 before img10."""
    parts = re.split(r"(\d+)", path.name.casefold())  # text and digits take turns, so like meets like
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def why_unusable(path: Path) -> str | None:
    """Says why `load_decoded` would refuse a file, or None where it would not."""
    try:
        decode(path)
    except Unusable as problem:
        return str(problem)
    return None


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Reads an image of any depth and kind as upright 8-bit RGB, what is transparent being `background`.

    Raises:
        UserError: the file is missing, empty, truncated, no image, or of absurdly many pixels.
    """
    return load_decoded(path, background).image


def load_decoded(path: Path, background: str = "white") -> DecodedImage:
    """Reads an image as `open_image` does, with what is known of its transparency.

    Raises:
        UserError: as `open_image` does.
    """
    return read_image_file(path, partial(_image, background=background))


def size_of(path: Path) -> tuple[int, int]:
    """Reads an image's width and height in px, as they are stored, off its header.

    Raises:
        UserError: the file is missing, empty or no image.
    """
    return read_image_file(path, lambda image: image.size)


def texts_of(path: Path) -> dict[str, str]:
    """Reads a PNG's texts by their keys; of other files, and where one text is absurdly long, there are none.

    Raises:
        UserError: as `open_image` does.
    """
    return read_image_file(path, _texts)


def read_image_file(path: Path, read: Callable[[Image.Image], T]) -> T:
    """Opens an image file and returns what `read` makes of it.

    Raises:
        UserError: as `open_image` does.
    """
    try:
        return _guarded(Path(path), read)
    except Unusable as problem:
        raise UserError(f"image '{path}' {problem}; replace it or take it out.") from problem


def decode(source: Path | bytes, background: str = "white") -> DecodedImage:
    """Decodes a whole file, or the bytes of one.

    Raises:
        Unusable: it gives no image.
    """
    return _guarded(source, partial(_image, background=background))


def _guarded(source: Path | bytes, read: Callable[[Image.Image], T]) -> T:
    """Returns what `read` makes of a file or its bytes; whatever goes wrong becomes one reason."""
    try:
        return _read_with(source, read)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(f"claims more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise many kinds for a bad file; each becomes one reason
        cause = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise Unusable(f"is truncated or cannot be read ({cause[:100]})") from error


def _read_with(source: Path | bytes, read: Callable[[Image.Image], T]) -> T:
    """Opens a file; the texts of a PNG decide about nothing, and are left out where they are too long for Pillow."""
    if _size(source) == 0:
        raise Unusable("is empty")
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source), formats=_formats()) as image:
            return read(image)
    except UnidentifiedImageError as error:
        raise Unusable(_why_unknown(source)) from error
    except ValueError:      # so Pillow calls a text that is too long, among other things
        bare = _without_texts(source if isinstance(source, bytes) else source.read_bytes())
        if bare is None or bare == source:
            raise
    return _read_with(bare, read)


def _size(source: Path | bytes) -> int:
    """Returns how many bytes there are; asked before a file is opened, as opening a pipe would wait for ever."""
    if isinstance(source, bytes):
        return len(source)
    if not source.is_file():
        raise Unusable("is a folder" if source.is_dir() else "is not a file" if source.exists() else "does not exist")
    return source.stat().st_size


def _texts(image: Image.Image) -> dict[str, str]:
    """Returns a PNG's texts; those behind its pixels are known once they are decoded."""
    if not isinstance(image, PngImagePlugin.PngImageFile):
        return {}
    _shrink(image)
    return image.text


def _without_texts(data: bytes) -> bytes | None:
    """Takes the texts out of a PNG's bytes; None where it is another kind of file."""
    if not data.startswith(_PNG):
        return None
    parts, at = [_PNG], len(_PNG)
    while at < len(data):       # each chunk: length, kind, content, checksum
        end = at + 12 + int.from_bytes(data[at:at + 4])
        if data[at + 4:at + 8] not in _PNG_TEXTS:
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _shrink(image: Image.Image) -> str | None:
    """Lets a very large JPEG be decoded at a half, a quarter or an eighth, and notes it; refuses what stays too large.
    """
    width, height = image.size
    if width * height > SHRINK_FROM:
        image.draft(image.mode, (SHRINK_TO, SHRINK_TO))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Unusable(f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    return f"{width} x {height} px made smaller" if image.size != (width, height) else None


def _image(image: Image.Image, background: str) -> DecodedImage:
    """Decodes an opened file, turns it upright and flat, and notes what was done."""
    shrunk = _shrink(image)
    image.load()
    try:
        turned = image.getexif().get(0x0112, 1) in range(2, 9)     # EXIF's orientation
        image, notes = ImageOps.exif_transpose(image), ["turned upright"] if turned else []
    except Exception:     # a camera's damaged notes are no reason to refuse its image
        notes = ["orientation unreadable"]
    if image.mode not in ("RGB", "RGBA"):
        notes.append(f"was {_MODES.get(image.mode, image.mode)}")
    image, recolored = to_srgb(image)
    notes += filter(None, (recolored, shrunk))
    alpha = alpha_of(image)
    if alpha is not None:
        notes.append("transparent in part")
    return DecodedImage(to_rgb(image, background), alpha, tuple(notes))


def _why_unknown(source: Path | bytes) -> str:
    """Says of a file Pillow does not know whether it is a phone's HEIC photo or no image at all."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    else:
        start = source[:12]
    if start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS:
        return "is a HEIC photo (install pillow_heif to read it, or save it as JPEG)"
    return "is not a readable image"


@cache
def _formats() -> list[str]:
    """Names those of `_FORMATS` this installation reads; HEIF is among them where pillow_heif is installed."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
        register_heif_opener()
    except ImportError:
        pass
    return [name for name in _FORMATS if name in Image.OPEN]


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales the deep gray modes to 8 bits, leaving all others alone."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0)                         # (H, W)
    white = next((white for white in _WHITES.get(image.mode, (65535,)) if values.max() <= white), values.max())
    return Image.fromarray(np.rint(values.clip(0) * (255 / white)).astype(np.uint8))                # (H, W)


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Converts an image with another color profile to 8-bit sRGB, transparency kept, and notes what was done."""
    data = image.info.get("icc_profile")
    if not data:
        return image, None
    try:
        converted = _converted(image, ImageCms.ImageCmsProfile(BytesIO(data)))
    except Exception:     # a damaged profile is no reason to refuse an image
        return image, "color profile unreadable"
    return (image, None) if converted is None else (converted, "colors converted to sRGB")


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image | None:
    """Returns an image with its colors in sRGB; None where they are.

    Raises:
        ValueError: the profile is not for this kind of image.
    """
    mode = {"GRAY": "L", "CMYK": "CMYK"}.get(profile.profile.xcolor_space.strip(), "RGB")
    flat = _eight_bit(image)
    if (flat.mode == "CMYK") != (mode == "CMYK") or (mode == "L" and flat.mode not in ("1", "L", "LA")):
        raise ValueError(f"a {mode} profile in an image of mode {flat.mode}")
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB",
                                        ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION)
    if _is_srgb(transform, mode):
        return None
    result = transform.apply(flat.convert(mode))
    if has_alpha(image):
        result.putalpha(image.convert("RGBA").getchannel("A"))
    return result


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Says whether a transform to sRGB leaves colors as they are, whatever its profile is called."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    if mode == "RGB":
        before = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))
    else:
        before = Image.fromarray(levels[None])
    after = np.asarray(transform.apply(before), dtype=int)                                          # (1, N, 3)
    return int(np.abs(after - np.asarray(before.convert("RGB"))).max()) <= SAME


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Makes an image of any mode 8-bit RGB; alpha is laid on `background`, so colors hidden under it stay hidden."""
    image = _eight_bit(image)
    if has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Says whether an image can be transparent anywhere."""
    return image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info


def alpha_of(image: Image.Image) -> Image.Image | None:
    """Returns an image's opacity as 8-bit gray, 255 where opaque; None where all of it is."""
    if not has_alpha(image):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def check_color(name: str) -> str:
    """Returns a color Pillow knows, by name ("white") or as #rrggbb.

    Raises:
        UserError: there is no such color.
    """
    try:
        ImageColor.getrgb(name)
    except ValueError as error:
        raise UserError(f"color '{name}' is unknown; give a name such as white or gray, or #rrggbb.") from error
    return name


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
    alpha = decoded.alpha.crop(box) if decoded.alpha is not None else None
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
    return depth + int(np.argmax(sharp)) + 1 + count // 500 if sharp.any() else None


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
    return images, None if bool((masks == 255).all()) else masks


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
