"""Tests the image loader on damaged files: an image or a reason, never another exception, a hang or a bomb."""
from __future__ import annotations

import struct
import time
import zlib
from functools import cache
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features

from ldm.data.framing import Framing
from ldm.data.images import Unusable, decode

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")        # of damaged tags; there are thousands

KINDS = [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"),
         ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "CMYK"), ("TIFF", "F"), ("PPM", "RGB"),
         ("JPEG2000", "RGB"), ("AVIF", "RGB")]
KINDS = [kind for kind in KINDS if kind[0] not in ("WEBP", "AVIF") or features.check(kind[0].lower())]


@cache
def whole(number: int) -> bytes:
    """Returns a whole file of one of `KINDS`, with EXIF where the format takes it."""
    name, mode = KINDS[number]
    values = np.random.default_rng(number).integers(0, 256, (24, 36, 3), np.uint8)
    image = Image.fromarray(values[..., 0].astype(np.uint16) * 257) if mode == "I;16" else \
        Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    options = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "AVIF") else {}
    file = BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draws a file with bytes changed, a piece taken out, doubled or replaced, or the end cut off."""
    data = bytearray(whole(draw(st.integers(0, len(KINDS) - 1))))
    for _ in range(draw(st.integers(1, 4))):
        # Half of all damage hits the beginning, where sizes and offsets stand.
        end = draw(st.sampled_from([min(64, len(data)), len(data)]))
        at = draw(st.integers(0, max(0, end - 1)))
        length = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["change", "take", "double", "cut", "extreme"]))
        if kind == "change":
            data[at:at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "extreme":
            data[at:at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]))
        elif kind == "take":
            del data[at:at + length]
        elif kind == "double":
            data[at:at] = data[at:at + length]
        else:
            del data[max(1, at):]
    return bytes(data)


def look(data: bytes) -> str | None:
    """Decodes and frames a file as training does; returns the reason where it is unusable."""
    start = time.process_time()
    reason = None
    try:
        pixels, mask = Framing(16, "pad", alpha_mask=True).frame(decode(data))
        assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8 and mask.shape == (16, 16)
    except Unusable as problem:
        reason = str(problem)
        assert reason.startswith(("is ", "claims ")) and "\n" not in reason and len(reason) < 200
    assert time.process_time() - start < 20, "a damaged file held the loader up"
    return reason


@settings(max_examples=5000, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(damaged())
def test_damaged_files_give_a_image_or_a_reason(data: bytes) -> None:
    look(data)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_reason(data: bytes) -> None:
    assert look(data) is not None


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_the_undamaged_files_are_images(number: int) -> None:
    assert look(whole(number)) is None


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bmp_bomb() -> bytes:
    data = bytearray(whole([name for name, _ in KINDS].index("BMP")))
    data[18:26] = struct.pack("<ii", 60000, 60000)
    return bytes(data)


def gif_bomb() -> bytes:
    data = bytearray(whole([name for name, _ in KINDS].index("GIF")))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


@pytest.mark.parametrize("bomb", [png_bomb(100_000, 100_000), png_bomb(2**31 - 1, 1000), bmp_bomb(), gif_bomb()])
def test_bombs_are_refused_without_unpacking_them(bomb: bytes) -> None:
    start = time.process_time()
    assert look(bomb) == "claims more than 400,000,000 pixels"
    assert time.process_time() - start < 2
