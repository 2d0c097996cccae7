"""The one image decoder: a file or its bytes in, an upright 8-bit RGB image out, or one reason why not."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from ldm.util import UserError

T = TypeVar("T")
# Pillow knows far more; some of those start other programs (EPS) or accept nearly any bytes (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# White of the deep gray modes is the smallest entry no pixel exceeds: files of floats follow several customs.
_WHITES: dict[str, tuple[float, ...]] = {"I": (65535,), "F": (1, 255, 65535)}
_MODES = {"L": "gray", "LA": "gray", "P": "palette", "PA": "palette", "1": "black and white", "CMYK": "CMYK",
          "I": "32-bit gray", "F": "floating-point grey"} | dict.fromkeys(("I;16", "I;16B", "I;16L"), "16-bit grey")
# Phones take images of 200 megapixels. Pillow refuses twice as many by a file's header alone; what is decoded whole
# must keep to this number.
Image.MAX_IMAGE_PIXELS = 200_000_000
SHRINK_FROM = 50_000_000    # pixels from which a JPEG is made smaller while it is decoded
SHRINK_TO = 2048            # px that its shorter side keeps at least
SAME = 3                    # 8-bit levels by which a color profile may differ from sRGB and still be called that
_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")


class Unusable(Exception):
    """Why a file gives no image, worded to follow its name ("is empty")."""


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
        file = BytesIO(source) if isinstance(source, bytes) else source
        # No other decoder is tried, whatever else is installed; the caller tells of bombs and of broken files.
        with Image.open(file, formats=_formats()) as image:
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
        if source.is_dir():
            raise Unusable("is a folder")
        raise Unusable("is not a file" if source.exists() else "does not exist")
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
        image, notes = ImageOps.exif_transpose(image), []
        if turned:
            notes.append("turned upright")
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
    if converted is None:
        return image, None
    return converted, "colors converted to sRGB"


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
    least, _ = alpha.getextrema()
    return None if least == 255 else alpha


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
