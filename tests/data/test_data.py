"""Tests that images arrive upright, flat, centered and named, and that regularization sets read as written."""
from __future__ import annotations

import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from ldm.data import images
from ldm.data.framing import square, to_images, to_tensor
from ldm.data.images import open_image, size_of, texts_of, to_rgb
from ldm.data.listing import list_images
from ldm.data.regularization import class_caption, read_regularization, write_regularization
from ldm.util import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# What a camera stores so that a viewer who follows orientation n sees the scene upright, read off the EXIF
# standard (which side of the scene the first stored row and the first stored column are).
STORED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[::-1],
          7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[:, ::-1]}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Makes an image with slopes, edges and grain, as photos have."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    slopes = np.stack([x / width * 255, y / height * 255, 128 + 100 * np.sin(x / 37) * np.cos(y / 23)], -1)
    slopes[height // 3:height // 2, width // 4:width // 3] = 20
    grain = np.random.default_rng(seed).normal(0, 12, slopes.shape)
    return Image.fromarray((slopes + grain).clip(0, 255).astype(np.uint8))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def reasons(folder: Path) -> dict[str, str]:
    return {skipped.path.name: skipped.reason for skipped in list_images(folder)[1]}


# ---- what a file holds becomes upright, flat RGB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(folder: Path, orientation: int) -> None:
    scene = np.array(photo(30, 20))                                                     # (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](scene)))
    stored.save(folder / "a.png", exif=exif)
    np.testing.assert_array_equal(np.array(open_image(folder / "a.png")), scene)


def test_orientation_six_by_hand(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "the first row is the right side, the first column the top": a phone held upright
    stored = Image.new("RGB", (2, 1))
    stored.putpixel((0, 0), RED)
    stored.putpixel((1, 0), BLUE)
    stored.save(folder / "a.png", exif=exif)
    upright = open_image(folder / "a.png")
    assert upright.size == (1, 2) and [pixel(upright, 0, 0), pixel(upright, 0, 1)] == [RED, BLUE]


def test_a_turned_jpeg_is_turned_once(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photo(64, 32).save(folder / "a.jpg", exif=exif, quality=95)
    assert open_image(folder / "a.jpg").size == (32, 64)
    assert open_image(folder / "a.jpg").getexif().get(0x0112, 1) == 1


def test_hidden_colors_under_alpha_do_not_show(folder: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)])
    image.save(folder / "a.png")
    flat = open_image(folder / "a.png")
    assert [pixel(flat, x) for x in range(3)] == [WHITE, RED, (204, 204, 204)]  # 0.8 of white is 204


def test_grey_with_alpha(folder: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 0), (100, 255)])
    image.save(folder / "a.png")
    flat = open_image(folder / "a.png")
    assert [pixel(flat, x) for x in range(2)] == [WHITE, (100, 100, 100)]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(folder: Path, suffix: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    image.save(folder / f"a.{suffix}", transparency=1)
    flat = open_image(folder / f"a.{suffix}")
    assert [pixel(flat, x) for x in range(3)] == [RED, WHITE, BLUE]


def test_rgb_with_one_transparent_color(folder: Path) -> None:
    image = Image.new("RGB", (2, 1), BLUE)
    image.putpixel((0, 0), GREEN)
    image.save(folder / "a.png", transparency=GREEN)
    flat = open_image(folder / "a.png")
    assert [pixel(flat, x) for x in range(2)] == [WHITE, BLUE]


def test_palette_with_alpha_in_memory() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (*BLUE, 255))
    image = image.convert("PA")
    if image.getpixel((0, 0))[1] != 0:
        pytest.skip("this Pillow's own conversion loses the transparency")
    assert pixel(to_rgb(image), 0) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(folder: Path, suffix: str) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)  # 257 * n is the 8-bit level n
    Image.fromarray(values).save(folder / f"a.{suffix}")
    image = open_image(folder / f"a.{suffix}")
    assert [pixel(image, x) for x in range(4)] == [(n, n, n) for n in (0, 1, 100, 255)]


@pytest.mark.parametrize(("values", "levels"), [
    ([0.0, 0.2, 1.0], [0, 51, 255]),        # floats in [0, 1]
    ([0.0, 51.0, 200.0], [0, 51, 200]),     # floats in [0, 255]
    ([-1.0, np.nan, 1.0], [0, 0, 255])])
def test_float_grey(folder: Path, values: list[float], levels: list[int]) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(folder / "a.tif")
    image = open_image(folder / "a.tif")
    assert [pixel(image, x) for x in range(3)] == [(n, n, n) for n in levels]


def test_thirty_two_bit_grey(folder: Path) -> None:
    Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.int32)).save(folder / "a.tif")
    image = open_image(folder / "a.tif")
    assert [pixel(image, x)[0] for x in range(3)] == [0, 100, 255]


def test_black_and_black_and_white(folder: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(folder / "a.tif")
    assert pixel(open_image(folder / "a.tif")) == (0, 0, 0)
    Image.new("1", (2, 2), 1).save(folder / "b.png")
    assert pixel(open_image(folder / "b.png")) == WHITE


def test_cmyk_and_grey_jpegs(folder: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=100)
    np.testing.assert_allclose(pixel(open_image(folder / "cmyk.jpg")), RED, atol=3)
    Image.new("L", (16, 16), 90).save(folder / "gray.jpg", quality=100)
    np.testing.assert_allclose(pixel(open_image(folder / "gray.jpg")), (90, 90, 90), atol=1)


@pytest.mark.parametrize("kind", ["webp", "avif", "bmp", "tiff", "ppm"])
def test_other_formats(folder: Path, kind: str) -> None:
    if kind in ("webp", "avif") and not features.check(kind):
        pytest.skip(f"Pillow was built without {kind}")
    Image.new("RGB", (32, 32), (200, 100, 50)).save(folder / f"a.{kind}")
    paths, skipped = list_images(folder)
    assert (paths, skipped) == ([folder / f"a.{kind}"], [])
    np.testing.assert_allclose(pixel(open_image(paths[0]), 16, 16), (200, 100, 50), atol=6)


# ---- squares and tensors


@pytest.mark.parametrize(("size", "mark"), [((60, 20), (30, 10)), ((20, 60), (10, 30)), ((41, 20), (20, 10))])
def test_a_marked_centre_stays_in_the_centre(size: tuple[int, int], mark: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    image.putpixel(mark, WHITE)
    cut = square(image, 20)
    assert cut.size == (20, 20) and pixel(cut, 10, 10) == WHITE
    assert np.array(cut).sum() == 3 * 255  # nothing was squashed: the mark is one pixel still


@pytest.mark.parametrize(("width", "height"), [(3000, 2000), (2000, 3000)])
def test_a_big_photo_is_cropped_then_shrunk_smoothly(width: int, height: int) -> None:
    image = photo(width, height)
    box = (500, 0, 2500, 2000) if width > height else (0, 500, 2000, 2500)
    reference = image.crop(box).resize((512, 512), resample=Image.BICUBIC)
    np.testing.assert_array_equal(np.array(square(image, 512)), np.array(reference))
    grain = np.random.default_rng(0).integers(0, 2, (512, 512, 1), dtype=np.uint8).repeat(3, axis=2) * 255
    small = np.array(square(Image.fromarray(grain), 32), dtype=np.float32)
    assert abs(small.mean() - 127.5) < 5 and small.std() < 20  # single pixels would keep a deviation of 127


def test_to_tensor_by_hand() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    x = to_tensor(image)
    assert x.shape == (2, 3, 3) and x.dtype == torch.float32
    torch.testing.assert_close(x[1, 2], torch.tensor([1.0, -0.6, -1.0]))
    assert (x[0] == -1).all()
    with pytest.raises(ValueError, match="RGBA"):
        to_tensor(image.convert("RGBA"))


def test_all_levels_survive_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = to_tensor(Image.fromarray(levels)).permute(2, 0, 1)
    first, second = to_images(torch.stack([x, -x]))
    np.testing.assert_array_equal(np.array(first), levels)
    np.testing.assert_array_equal(np.array(second), 255 - levels)


def test_to_images_rounds_and_clamps_and_refuses_nan() -> None:
    x = torch.tensor([-3.0, -1 + 0.9 / 127.5, 7.0]).reshape(1, 3, 1, 1)
    assert pixel(to_images(x)[0]) == (0, 1, 255)
    assert pixel(to_images(x.to(torch.bfloat16).requires_grad_())[0]) == (0, 1, 255)
    with pytest.raises(UserError, match="not finite"):
        to_images(x * torch.nan)


# ---- what a folder holds


def test_natural_order(folder: Path) -> None:
    ordered = ["7.png", "IMG1.png", "img2.png", "img2b.png", "img10.png"]
    for name in sorted(ordered):
        Image.new("RGB", (2, 2)).save(folder / name)
    assert [path.name for path in list_images(folder)[0]] == ordered


def test_junk_is_skipped_and_named(folder: Path) -> None:
    photo(80, 60).save(folder / "good.png")
    photo(80, 60).save(folder / "really_a_png.jpg", format="png")
    for kind in ("jpg", "png", "webp"):
        photo(80, 60).save(folder / f"whole.{kind}")
        data = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(data[:len(data) // 2])
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    photo(8, 8).save(folder / "._good.png")
    (folder / "notes.txt").write_text("remember the milk")
    (folder / "empty.jpg").touch()
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (folder / "more").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "phone.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(16))
    paths, _ = list_images(folder)
    assert [path.name for path in paths] == ["good.png", "really_a_png.jpg", "whole.jpg", "whole.png", "whole.webp"]
    found = reasons(folder)
    assert found.keys() == {".DS_Store", "._good.png", "notes.txt", "empty.jpg", "drawing.eps", "more", "gone.png",
                            "phone.heic", "cut.jpg", "cut.png", "cut.webp"}
    assert found[".DS_Store"] == found["._good.png"] == "is hidden"
    assert found["notes.txt"] == found["drawing.eps"] == "is not a readable image"
    assert (found["empty.jpg"], found["more"], found["gone.png"]) == ("is empty", "is a folder", "does not exist")
    assert find_spec("pillow_heif") or found["phone.heic"].startswith("is a HEIC photo (install pillow_heif")
    assert "truncated" in found["cut.jpg"] and "truncated" in found["cut.png"]


def test_a_truncated_image_is_refused_in_one_sentence(folder: Path) -> None:
    photo(300, 200).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:4000])
    with pytest.raises(UserError, match=r"^image '.*cut\.jpg' is truncated .*; replace it or take it out\.$"):
        open_image(folder / "cut.jpg")
    with pytest.raises(UserError, match=r"cut\.jpg' is truncated .*; give a folder"):
        list_images(folder / "cut.jpg")
    with pytest.raises(UserError, match=r"nothere\.jpg' does not exist"):
        open_image(folder / "nothere.jpg")


def test_empty_missing_and_useless_folders(folder: Path) -> None:
    with pytest.raises(UserError, match=r"set' holds no usable image \(it is empty\)"):
        list_images(folder)
    with pytest.raises(UserError, match=r"elsewhere' does not exist"):
        list_images(folder / "elsewhere")
    for number in range(5):
        (folder / f"{number}.jpg").touch()
    with pytest.raises(UserError, match=r"'0\.jpg' is empty; '1\.jpg' is empty; '2\.jpg' is empty; and 2 more"):
        list_images(folder)


def test_decompression_bombs_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(64, 64).save(folder / "bomb.png")
    photo(8, 8).save(folder / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png' claims more than 2,000 pixels"):
        open_image(folder / "bomb.png")
    assert [path.name for path in list_images(folder)[0]] == ["small.png"]
    assert reasons(folder) == {"bomb.png": "claims more than 2,000 pixels"}


def test_long_texts_of_a_png_decide_nothing(folder: Path) -> None:
    """Both ahead of the pixels and behind them, more of them than Pillow unpacks; the pixels are whole."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))
    photo(40, 30).save(folder / "plain.png")
    data = (folder / "plain.png").read_bytes()
    for name, long in {"before": data[:33] + text + data[33:], "behind": data[:-12] + text + data[-12:]}.items():
        (folder / f"{name}.png").write_bytes(long)
        np.testing.assert_array_equal(np.array(open_image(folder / f"{name}.png")), np.array(photo(40, 30)))
    (folder / "cut.png").write_bytes(data[:33] + text + data[33:200])
    assert list(reasons(folder)) == ["cut.png"] and "truncated" in reasons(folder)["cut.png"]


def test_very_large_jpegs_are_decoded_small_and_others_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a phone's 200 megapixels: read within the memory of a quarter of each side; ordinary ones to the bit."""
    photo(640, 480).save(folder / "a.jpg", quality=95)
    whole = np.array(Image.open(folder / "a.jpg"))
    np.testing.assert_array_equal(np.array(open_image(folder / "a.jpg")), whole)
    monkeypatch.setattr(images, "SHRINK_FROM", 200_000)
    monkeypatch.setattr(images, "SHRINK_TO", 120)
    image = images.load_decoded(folder / "a.jpg")
    assert image.image.size == (160, 120) and image.notes == ("640 x 480 px made smaller",)
    mean = whole.reshape(120, 4, 160, 4, 3).mean(axis=(1, 3))
    assert np.abs(np.array(image.image) - mean).mean() < 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 160_000)       # of the header Pillow allows twice as many
    assert images.why_unusable(folder / "a.jpg") is None
    photo(640, 480).save(folder / "a.png")
    assert images.why_unusable(folder / "a.png") == "claims more than 160,000 pixels"
    photo(640, 600).save(folder / "b.jpg")
    assert images.why_unusable(folder / "b.jpg") == "claims more than 320,000 pixels"


def test_a_phones_200_megapixels_are_read(folder: Path) -> None:
    Image.new("L", (16320, 12240), 99).save(folder / "a.jpg")
    image = images.load_decoded(folder / "a.jpg")
    assert image.image.size == (4080, 3060) and pixel(image.image, 4000, 3000) == (99, 99, 99)


def test_one_image_or_a_list_of_images(folder: Path, tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c d.png"):
        photo(4, 4).save(folder / name)
    assert list_images(folder / "b.png") == ([folder / "b.png"], [])
    listing = tmp_path / "list.txt"
    listing.write_bytes("\ufeffset/b.png\r\n\r\nset/c d.png\r\nset/gone.png\r\n".encode() + bytes(folder / "a.png"))
    paths, skipped = list_images(listing)
    assert paths == [folder / "b.png", folder / "c d.png", folder / "a.png"]
    assert [str(each) for each in skipped] == ["'gone.png' does not exist"]


# ---- regularization sets


def three() -> list[tuple[Image.Image, str, str]]:
    captions = ["a cat\u2028on a\nchair", "ein Kätzchen", ""]
    return [(Image.new("RGB", (16, 16), (60 * n, 0, 0)), text, f"http://x/{n}") for n, text in enumerate(captions)]


def test_written_sets_read_back(tmp_path: Path) -> None:
    root = tmp_path / "real_reg" / "samples_tabby_cat"
    written = write_regularization(root, "tabby cat", iter(three()))
    images = [f"tabby_cat/0000{n}.jpg" for n in range(3)]
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    assert files == ["caption.txt", "images.txt", "tabby_cat", *images, "urls.txt"]
    assert (root / "images.txt").read_text() == "tabby_cat/00000.jpg\ntabby_cat/00001.jpg\ntabby_cat/00002.jpg\n"
    assert (root / "urls.txt").read_text() == "http://x/0\nhttp://x/1\nhttp://x/2\n"
    captions = ["a cat on a chair", "ein Kätzchen", "a photo of a tabby cat"]
    assert (root / "caption.txt").read_bytes() == ("\n".join(captions) + "\n").encode()
    for path in (root, root / "images.txt"):
        found = read_regularization(path, "tabby cat")
        assert (found.paths, found.captions, found.skipped) == (written, captions, [])
        assert "3 image(s) listed in" in found.source and "caption.txt" in found.source
    for number, path in enumerate(found.paths):
        np.testing.assert_allclose(pixel(open_image(path)), (60 * number, 0, 0), atol=2)


def test_writing_again_leaves_no_old_caption_on_a_new_image(tmp_path: Path) -> None:
    first = write_regularization(tmp_path, "cat", three())

    def cut_short():
        yield Image.new("RGBA", (8, 8)), "transparent", ""
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_regularization(tmp_path, "cat", cut_short())
    found = read_regularization(tmp_path, "cat")
    assert found.paths == first and found.captions[1] == "ein Kätzchen"
    again = write_regularization(tmp_path, "cat", [(Image.new("RGBA", (8, 8)), "transparent", "")])
    assert not set(again) & set(first)
    found = read_regularization(tmp_path, "cat")
    assert (found.paths, found.captions) == (again, ["transparent"])
    assert pixel(open_image(again[0])) == WHITE
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


def test_a_failing_disk_leaves_the_earlier_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_regularization(tmp_path, "cat", three())
    before = {name: (tmp_path / name).read_bytes() for name in ("images.txt", "caption.txt", "urls.txt")}
    real = Path.write_text

    def full(self: Path, *args: object, **kwargs: object) -> int:
        if "urls" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_regularization(tmp_path, "cat", three()[:1])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="no image to write"):
        write_regularization(tmp_path, "cat", [])


@pytest.mark.parametrize("prefix", ["", "samples_cat/", "real_reg/samples_cat/", "absolute"])
def test_paths_may_start_at_the_folder_its_parent_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("real_reg/samples_cat")
    write_regularization(root, "cat", three())
    prefix = f"{root.absolute()}/" if prefix == "absolute" else prefix
    (root / "images.txt").write_text("".join(f"{prefix}cat/0000{n}.jpg\n" for n in (2, 0, 1)))
    found = read_regularization(root, "cat")
    expected = [root.absolute() / f"cat/0000{n}.jpg" for n in (2, 0, 1)]
    assert [path.absolute() for path in found.paths] == expected
    assert found.captions[0] == "a cat on a chair"  # captions follow the lines, not the names


def test_differing_counts_are_refused_with_both_numbers(tmp_path: Path) -> None:
    write_regularization(tmp_path, "cat", three())
    (tmp_path / "caption.txt").write_text("one\ntwo\n\n\n")
    with pytest.raises(UserError, match=r"images\.txt' has 3 lines but '.*caption\.txt' has 2"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "caption.txt").write_text("one\n\nthree\n")
    with pytest.raises(UserError, match=r"line 2 of '.*caption\.txt' is empty"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "caption.txt").write_bytes(b"one\ntwo\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"caption\.txt' is not UTF-8"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "caption.txt").unlink()
    with pytest.raises(UserError, match=r"caption\.txt' does not exist; write one caption per line"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "caption.txt").write_text("one \r\ntwo\u2028and a half\r\nthree\r\n", encoding="utf-8", newline="")
    assert read_regularization(tmp_path, "cat").captions == ["one", "two\u2028and a half", "three"]


def test_a_missing_image_names_its_line_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    paths = write_regularization(tmp_path, "cat", three())
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    found = read_regularization(tmp_path, "cat")
    assert found.paths == [paths[0], paths[2]]
    assert found.captions == ["a cat on a chair", "a photo of a cat"]  # the damaged one took its caption along
    assert [skipped.path for skipped in found.skipped] == [paths[1]] and "1 file(s) skipped" in found.source
    (tmp_path / "images.txt").write_text("cat/00000.jpg\ncat/nope.jpg\ncat/never.jpg\n")
    with pytest.raises(UserError, match=r"line 2 of '.*images\.txt' names 'cat/nope\.jpg'"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "images.txt").write_text("cat/00000.jpg\n\ncat/00002.jpg\n")
    with pytest.raises(UserError, match="line 2 of"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "images.txt").write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        read_regularization(tmp_path, "cat")
    (tmp_path / "images.txt").write_text("cat/00001.jpg\n")
    with pytest.raises(UserError, match=r"no usable image \('00001\.jpg' is"):
        read_regularization(tmp_path, "cat", "cat")


def test_the_caption_argument_is_words_or_a_file(tmp_path: Path) -> None:
    root, words = tmp_path / "set", tmp_path / "words.txt"
    write_regularization(root, "cat", three())
    words.write_text("x\ny\nz")
    assert read_regularization(root / "images.txt", "cat", str(words)).captions == ["x", "y", "z"]
    assert read_regularization(root, "cat", "a cat").captions == ["a cat"] * 3
    with pytest.raises(UserError, match=r"caption file '.*typo\.txt' does not exist"):
        read_regularization(root, "cat", str(tmp_path / "typo.txt"))
    (root / "images.txt").unlink()
    with pytest.raises(UserError, match=r"caption\.txt' cannot be matched .* has no images\.txt"):
        read_regularization(root, "cat")
    with pytest.raises(UserError, match=r"words\.txt' cannot be matched"):
        read_regularization(root / "cat", "cat", str(words))


def test_any_folder_of_images_gets_the_class_caption(folder: Path) -> None:
    for name in ("img10.png", "img2.png"):
        photo(4, 4).save(folder / name)
    (folder / "notes.md").write_text("none")
    found = read_regularization(folder, "umbrella")
    assert [path.name for path in found.paths] == ["img2.png", "img10.png"]
    assert found.captions == ["a photo of an umbrella"] * 2
    assert found.source == (f"regularization: 2 image(s) of '{folder}', each captioned 'a photo of an umbrella'; "
                            "1 file(s) skipped.")
    assert [str(skipped) for skipped in found.skipped] == ["'notes.md' is not a readable image"]
    assert read_regularization(folder, "cat", "painting").captions == ["painting"] * 2
    with pytest.raises(UserError, match="does not exist"):
        read_regularization(folder / "no", "cat")


@pytest.mark.parametrize(("noun", "caption"), [
    ("cat", "a photo of a cat"), ("Apple", "a photo of an Apple"), ("hourglass", "a photo of an hourglass"),
    ("unicorn", "a photo of a unicorn"), ("urn", "a photo of an urn"), ("owl", "a photo of an owl"),
    ("teddy bear", "a photo of a teddy bear"), ("uniform", "a photo of a uniform"),
    ("European bison", "a photo of a European bison"), ("one-eyed cat", "a photo of a one-eyed cat"),
    ("onesie", "a photo of a onesie"), ("hour", "a photo of an hour"), ("house", "a photo of a house"),
    ("unimpressed cat", "a photo of an unimpressed cat"), ("usher", "a photo of an usher"),
    ("user", "a photo of a user"), ("x-ray", "a photo of an x-ray"), ("u-boat", "a photo of a u-boat")])
def test_class_captions_take_the_right_article(noun: str, caption: str) -> None:
    assert class_caption(noun) == caption


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("read", [size_of, texts_of, open_image])
def test_no_reader_of_images_starts_another_program(tmp_path, monkeypatch, read):
    """An EPS of any name would start Ghostscript, which is what `gs` in the path is."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(UserError, match="image '.*a.png' is not a readable image"):
        read(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


def test_size_and_texts_of_a_file(tmp_path):
    """Texts may stand before the pixels or behind them; one of absurd length leaves none, and an image."""
    info = PngImagePlugin.PngInfo()
    info.add_text("before", "a", zip=True)
    info.add(b"tEXt", b"after\0b", after_idat=True)
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png", pnginfo=info)
    info.add_text("long", "x" * 2_000_000, zip=True)
    Image.new("RGB", (5, 3)).save(tmp_path / "b.png", pnginfo=info)
    Image.new("RGB", (7, 2)).save(tmp_path / "c.gif", comment="no text")
    assert [size_of(tmp_path / name) for name in ("a.png", "b.png", "c.gif")] == [(5, 3), (5, 3), (7, 2)]
    found = [texts_of(tmp_path / name) for name in ("a.png", "b.png", "c.gif")]
    assert found == [{"before": "a", "after": "b"}, {}, {}]


@pytest.mark.parametrize("read", [size_of, texts_of, open_image])
@pytest.mark.parametrize("name", ["none.png", "x" * 300, "a\0b"])
def test_a_image_that_is_not_there_is_a_sentence(tmp_path, read, name):
    with pytest.raises(UserError, match="^image '.*' (does not exist|is truncated or cannot be read)"):
        read(tmp_path / name)
