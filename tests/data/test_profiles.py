"""Tests color profiles: pixels become the sRGB that the profile's own formula gives, sRGB's stay to the bit."""
from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data.images import decode, load_decoded

D50 = (0.9642, 1.0, 0.8249)
# Primaries' XYZ under D50, a row each: of a wide gamut (Adobe RGB's, published) and of sRGB.
WIDE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
GAMMA = 563 / 256
COLOURS = np.array([[230, 120, 90], [100, 100, 100], [0, 0, 0], [255, 255, 255], [60, 90, 70], [200, 170, 90]],
                   np.uint8)


def fixed(values: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Lays an ICC profile of version 2 out: header, table of tags, tags."""
    table, content, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    head = struct.pack(">4xI4s4s4s6H4s", 0x02100000, kind, space, connection, 2026, 1, 1, 0, 0, 0, b"acsp")
    head += bytes(28) + fixed(D50) + bytes(48)                       # platform to intent, white, creator and reserve
    return struct.pack(">I", 4 + len(head) + len(table) + len(content)) + head + table + content


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + fixed(tuple(values))


def curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(primaries: np.ndarray) -> bytes:
    """A display profile: three primaries, one gamma."""
    tags = {name + b"XYZ": xyz(row) for name, row in zip((b"r", b"g", b"b"), primaries, strict=True)}
    return profile(b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": curve(GAMMA) for name in (b"r", b"g", b"b")})


def grey_profile() -> bytes:
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": xyz(np.array(D50)), b"kTRC": curve(1.0)})


def ink_profile() -> bytes:
    """A press whose "magenta" prints as the red of Lab (53, 80, 67): nobody could tell from the ink's name."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).T                                             # (16, 4), C slowest
    lab = np.array([(0, 128, 128) if black else (136, 208, 195) if magenta else (255, 128, 128)
                    for _, magenta, _, black in inks], np.uint8)                                 # (16, 3)
    ramp = bytes(range(256))
    matrix = fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + lab.tobytes() + ramp * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": xyz(np.array(D50)), b"A2B0": table, b"A2B1": table})


def srgb_levels(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1's curve: linear light in [0, 1] to 8-bit levels."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def expected(colors: np.ndarray) -> np.ndarray:
    """What colors (N, 3) of the wide profile are in sRGB, by its formula."""
    light = (colors / 255) ** GAMMA @ WIDE                                                      # (N, 3), XYZ
    return srgb_levels(light @ np.linalg.inv(SRGB))


def saved(image: Image.Image, icc: bytes, kind: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, kind, icc_profile=icc, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_wide_gamut_becomes_srgb(kind: str) -> None:
    image = Image.fromarray(COLOURS[None].repeat(16, axis=0).repeat(16, axis=1))                 # (16, 96, 3)
    if kind == "WEBP":
        image = image.resize((96, 16))
    image = decode(saved(image, rgb_profile(WIDE), kind))
    found = np.asarray(image.image)[8, 8::16]                                                  # (6, 3)
    np.testing.assert_allclose(found, expected(COLOURS), atol=2 if kind in ("PNG", "TIFF") else 8)
    assert np.abs(expected(COLOURS) - COLOURS).max() > 20 and image.notes == ("colors converted to sRGB",)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_stays_and_what_shows_through_it_is_srgb(mode: str) -> None:
    image = Image.fromarray(COLOURS[None, :1].repeat(4, axis=1)).convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[255, 255, 0, 0]], np.uint8)))
    if mode == "P":
        image = image.quantize(4)
    image = decode(saved(image, rgb_profile(WIDE)), "blue")
    pixels = np.asarray(image.image)[0]                                                        # (4, 3)
    np.testing.assert_allclose(pixels[:2], expected(COLOURS[:1]).repeat(2, axis=0), atol=2)
    assert pixels[2:].tolist() == [[0, 0, 255]] * 2 and np.asarray(image.alpha).tolist() == [[255, 255, 0, 0]]


def test_the_pixels_of_srgb_stay_to_the_bit() -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = decode(saved(Image.fromarray(pixels), icc))
    np.testing.assert_array_equal(np.asarray(image.image), pixels)
    assert image.notes == ()


@pytest.mark.parametrize("deep", [False, True])
def test_grey_with_a_profile(deep: bool) -> None:
    """Linear light, as scanners may write it."""
    levels = np.array([[0, 30, 100, 200, 255]], np.uint8)
    image = Image.fromarray(levels.astype(np.uint16) * 257) if deep else Image.fromarray(levels)
    image = decode(saved(image, grey_profile()))
    wanted = srgb_levels(levels[0] / 255)[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(np.asarray(image.image)[0], wanted, atol=2)
    assert image.notes[1] == "colors converted to sRGB"


def test_inks_with_a_profile() -> None:
    for ink, color in (((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 255, 0, 0), (255, 0, 0))):
        image = decode(saved(Image.new("CMYK", (16, 16), ink), ink_profile(), "TIFF"))
        np.testing.assert_allclose(image.image.getpixel((8, 8)), color, atol=10)     # 8-bit Lab
        assert image.notes == ("was CMYK", "colors converted to sRGB")
    assert decode(saved(Image.new("CMYK", (1, 1), (0, 255, 0, 0)), b"", "TIFF")).image.getpixel((0, 0))[2] > 100


@pytest.mark.parametrize("icc", [b"junk", rgb_profile(WIDE)[:200], bytes(500), ink_profile(), grey_profile()],
                         ids=["junk", "cut", "zeros", "inks", "grey"])
def test_a_profile_that_is_damaged_or_of_another_kind_is_left_out(tmp_path: Path, icc: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(pixels), icc))
    image = load_decoded(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(image.image), pixels)
    assert image.notes == ("color profile unreadable",)
