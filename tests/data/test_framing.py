"""Tests what the network sees: padding, alpha as loss mask, the inspection's sheets and table, masked training."""
from __future__ import annotations

import csv
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Call, SmallWorld, contents
from PIL import Image

from ldm.customization.finetune import masked_mean
from ldm.data.batches import CaptionedImages, TrainingPlan
from ldm.data.framing import Framing, load_framed, square, trim_bars
from ldm.data.images import DecodedImage, decode, open_image
from ldm.files import RECORD
from ldm.training.inspection import CELL, LABEL, inspect_sets
from ldm.util import UserError


def test_padding_keeps_everything_and_squashes_nothing() -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    padded = np.asarray(square(image, 20, "pad", "blue"))                            # (20, 20, 3)
    assert (padded[5:15] == (255, 0, 0)).all()
    assert (padded[:5] == (0, 0, 255)).all() and (padded[15:] == (0, 0, 255)).all()
    tall = np.asarray(square(image.transpose(Image.Transpose.ROTATE_90), 20, "pad"))
    assert (tall[:, 5:15] == (255, 0, 0)).all() and (tall[:, :5] == 255).all()
    assert square(Image.new("RGB", (1000, 1)), 16, "pad").size == (16, 16)


def test_a_frame_and_its_mask_by_hand(tmp_path: Path) -> None:
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (0, 0, 10, 20))                                      # the left half is transparent
    image.save(tmp_path / "a.png")
    image = decode(tmp_path / "a.png", "#0000ff")
    assert image.notes == ("transparent in part",)
    pixels, mask = Framing(20, background="#0000ff", alpha_mask=True).frame(image)
    assert (pixels[:, :10] == (0, 0, 255)).all() and (pixels[:, 10:] == (255, 0, 0)).all()
    assert (mask[:, :10] == 0).all() and (mask[:, 10:] == 255).all()
    assert (Framing(20).frame(image)[1] == 255).all()                              # unless asked for, all counts
    wide = decode(tmp_path / "a.png").image.resize((20, 10))
    wide.save(tmp_path / "wide.png")
    pixels, mask = Framing(20, "pad").frame(decode(tmp_path / "wide.png"))
    assert (mask[:5] == 0).all() and (mask[5:15] == 255).all() and (mask[15:] == 0).all()
    images, masks = load_framed([tmp_path / "wide.png", tmp_path / "a.png"], Framing(8, "pad"))
    assert images.shape == (2, 8, 8, 3) and masks.shape == (2, 8, 8) and masks.dtype == torch.uint8
    assert load_framed([tmp_path / "wide.png"], Framing(8))[1] is None
    Image.new("RGBA", (8, 8)).save(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="is transparent all over"):
        load_framed([tmp_path / "nothing.png"], Framing(8, alpha_mask=True))


def test_bytes_decode_like_files_and_the_background_is_chosen(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", "grey").getpixel((0, 0)) == (128, 128, 128)
    assert decode((tmp_path / "a.png").read_bytes()).image.getpixel((0, 0)) == (255, 255, 255)


def test_a_masked_mean_by_hand() -> None:
    error = torch.arange(8.0).view(1, 2, 2, 2)                                       # (B, C, h, w)
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1.0                                                            # the first latent pixel, whole
    mask[0, 2:, 2:3] = 1.0                                                           # half of the last
    expected = (0 + 4 + 0.5 * (3 + 7)) / (2 * 1.5)
    assert masked_mean(error, mask).item() == pytest.approx(expected)
    assert torch.equal(masked_mean(error, None), error.mean(dim=(1, 2, 3)))
    assert masked_mean(error, torch.ones(1, 4, 4)).item() == pytest.approx(3.5)


def test_masks_flip_with_their_images() -> None:
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    source = CaptionedImages(images, ["a", "b", "c"], masks=images[..., 0].clone())
    plain = CaptionedImages(images[:2], ["x", "y"])
    for rows in islice(iter(TrainingPlan(source, plain, batch_size=2)), 20):
        red = (rows.images[:2, ..., 0] + 1) * 127.5
        assert torch.allclose(rows.masks[:2] * 255, red, atol=1e-3) and (rows.masks[2:] == 1).all()
    assert next(iter(TrainingPlan(plain, None, batch_size=1))).masks is None


def test_each_reference_comes_with_a_image_of_its_own_class() -> None:
    """Three images of concept 0, one of 1, two of 2 that has no class images; sets of 2 and 5."""
    references = CaptionedImages(torch.zeros(6, 2, 2, 3, dtype=torch.uint8), [*"000122"], groups=[0, 0, 0, 1, 2, 2])
    classes = CaptionedImages(torch.zeros(7, 2, 2, 3, dtype=torch.uint8), [f"class 0 {n}" for n in range(2)] +
                              [f"class 1 {n}" for n in range(5)], groups=[0, 0, 1, 1, 1, 1, 1])
    seen: Counter[str] = Counter()
    for rows in islice(iter(TrainingPlan(references, classes, batch_size=3, prior_weight=0.5)), 40):   # 20 rounds
        count = len(rows.weights) - 3
        own, others = rows.captions[:3], rows.captions[3:]
        assert [caption.split()[1] for caption in others] == [group for group in own if group != "2"]
        assert rows.weights.tolist() == [1.0] * 3 + [0.5] * count
        seen.update(rows.captions)
    assert all(seen[group] == count for group, count in (("0", 60), ("1", 20), ("2", 40)))
    assert all(seen[f"class 0 {n}"] == 30 for n in range(2)) and all(seen[f"class 1 {n}"] == 4 for n in range(5))
    whole = TrainingPlan(references, classes, batch_size=4)
    parts = [TrainingPlan(references, classes, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(6):
        divided = [part.batch(step).captions for part in parts]
        assert sorted(whole.batch(step).captions) == sorted(divided[0] + divided[1])


def test_padded_and_transparent_images_train(small_world: SmallWorld, call_script: Call, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGBA", (60, 40), (200, 30, 30, 128)).save(folder / "a.png")
    Image.new("RGB", (20, 30), (30, 200, 30)).save(folder / "b.png")
    options = ["-b", *small_world.training_files, f"concepts.0.images={folder}", "preview.prompts=[]", "-l",
               tmp_path / "logs"]
    outcome = call_script("train", *options, "data.crop=pad", "data.alpha_mask=true", "data.background='#808080'")
    assert outcome.status == 0, outcome.err
    assert "warning: 'b.png' is 20 x 30 px and is enlarged to 32" in outcome.out
    for override, message in (("data.crop=squash", "data.crop 'squash' is unknown; use one of center, pad"),
                              ("data.background=nocolour", "color 'nocolour' is unknown"),
                              ("data.reg.mode=buy", "use one of folder, generate, none"),
                              ("data.reg.num=0", "data.reg.num is 0")):
        assert message in call_script("train", *options, override).error


# ---- the inspection


def test_the_inspection_names_everything(small_world: SmallWorld, call_script: Call, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    Image.new("RGBA", (60, 40), (200, 30, 30, 128)).save(folder / "img10.png")
    Image.new("L", (20, 30), 99).save(folder / "img2.png")
    (folder / "img2.txt").write_text("a\tcat")
    (folder / "empty.jpg").touch()
    (folder / ".DS_Store").touch()
    outcome = call_script("train", "-b", *small_world.training_files, f"concepts.0.images={folder}",
                          "data.alpha_mask=true", "data.captions=true", "--inspect", out)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "thing: 2 images used, 2 files skipped (folder with 1 captions beside images)" in lines
    assert "thing: skipped 'empty.jpg' is empty" in lines and "thing: skipped '.DS_Store' is hidden" in lines
    assert "thing: warning: 'img2.png' is 20 x 30 px, smaller than 32 px: enlarged" in lines
    with (out / "files.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    mine = [row for row in rows if row["set"] == "thing"]
    assert [(row["number"], row["file"], row["fate"]) for row in mine] == [
        ("0", "img2.png", "used"), ("1", "img10.png", "used"), ("", ".DS_Store", "skipped: is hidden"),
        ("", "empty.jpg", "skipped: is empty")]
    assert mine[0]["what was done"] == "was gray; sides cut off; smaller than 32 px: enlarged"
    assert mine[0]["caption"] == "a cat" and mine[1]["original size"] == "60 x 40"
    assert {row["set"] for row in rows} == {"thing", "thing, regularization"}
    assert sorted(path.name for path in out.glob("*.png")) == ["sheet-00.png", "sheet-01.png"]
    outcome = call_script("train", "--datapath", folder, "--inspect", out)      # a new user: photos, and nothing else
    assert outcome.status == 0, outcome.err
    assert "does not exist" in call_script("train", "--datapath", tmp_path / "no", "--inspect", out).error


def test_black_bars_are_pointed_out(tmp_path: Path) -> None:
    """Bars on two opposite sides, with JPEG's noise in them; a dark floor, or a photo without, is none of them."""
    rng = np.random.default_rng(0)
    photo = rng.integers(40, 256, (96, 96, 3), np.uint8)
    tall, wide, floor = photo.copy(), photo.copy(), photo.copy()
    tall[:, :9] = tall[:, -9:] = 3
    wide[:9] = wide[-9:] = 0
    floor[-40:] = 0
    for name, pixels in {"tall": tall, "wide": wide, "floor": floor, "whole": photo}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", quality=95)
    report = inspect_sets([("x", tmp_path, False)], Framing(64), tmp_path / "out")
    assert [line for line in report.lines if "black bars" in line] == [
        f"x: warning: '{name}.jpg' is 96 x 96 px, has black bars, which would be learned too; "
        "data.trim_bars=true crops them off"
        for name in ("tall", "wide")]


def barred(photo: np.ndarray, rows: tuple[int, int], columns: tuple[int, int], level: int = 0) -> np.ndarray:
    """Puts black bars of such depths around a photo (H, W, 3)."""
    return np.pad(photo, (rows, columns, (0, 0)), constant_values=level)


BARS = [((20, 30), (0, 0)), ((0, 0), (60, 50)), ((12, 12), (30, 30)), ((40, 40), (8, 8))]


@pytest.mark.parametrize(("rows", "columns"), BARS)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_black_bars_are_trimmed(tmp_path: Path, rows: tuple[int, int], columns: tuple[int, int], kind: str) -> None:
    """Of a photo 160 x 120: all that is left is photo, and no more than the blurred edge of it is lost."""
    grain = Image.fromarray(np.random.default_rng(0).integers(40, 256, (15, 20, 3), np.uint8))
    photo = np.asarray(grain.resize((160, 120), Image.Resampling.BILINEAR))
    Image.fromarray(barred(photo, rows, columns, 3)).save(tmp_path / f"a.{kind}", quality=95)
    image = decode(tmp_path / f"a.{kind}")
    kept = trim_bars(image)
    lost = [0 if bars == (0, 0) else 1 for bars in (rows, columns)]
    assert kept.image.size == (160 - 2 * lost[1], 120 - 2 * lost[0])
    inner = photo[lost[0]:120 - lost[0], lost[1]:160 - lost[1]]
    assert np.abs(np.asarray(kept.image).astype(int) - inner).mean() < (1e-9 if kind == "png" else 6)
    assert kept.notes == (f"black bars cropped off: {kept.image.width} x {kept.image.height} px are left",)
    assert trim_bars(kept) is kept


def dark_images() -> dict[str, np.ndarray]:
    """Images with black at their sides that are nobody's bars, each (480, 640, 3)."""
    rng = np.random.default_rng(0)
    photo, y = rng.integers(40, 256, (480, 640, 3), np.uint8), np.linspace(-1, 1, 480)[:, None, None]
    dusk = (photo * np.clip(1.2 - 1.6 * np.abs(y), 0, 1)).astype(np.uint8)
    floor, thing, thin, stars = photo.copy(), np.zeros_like(photo), np.zeros_like(photo), np.zeros_like(photo)
    floor[240:] = 0
    thing[120:360, 200:440] = photo[120:360, 200:440]    # on black cloth
    thin[220:260] = photo[220:260]                       # far less would be left than is cut off
    stars[rng.random((480, 640)) < 0.001] = 255
    return {"photo": photo, "black": np.zeros_like(photo), "dusk": dusk, "floor": floor, "thing": thing, "thin": thin,
            "stars": stars}


@pytest.mark.parametrize("name", dark_images())
def test_what_is_dark_by_itself_is_not_trimmed(name: str) -> None:
    image = DecodedImage(Image.fromarray(dark_images()[name]), None)
    assert trim_bars(image) is image


def test_masks_are_trimmed_with_their_images() -> None:
    photo = np.random.default_rng(0).integers(40, 256, (60, 60, 3), np.uint8)
    image = Image.fromarray(barred(photo, (0, 0), (30, 30)))
    alpha = Image.fromarray(np.asarray(image)[..., 0])               # opaque where the photo is red
    pixels, mask = Framing(58, alpha_mask=True, trim_bars=True).frame(DecodedImage(image, alpha))
    assert np.abs(pixels[:, :, 0].astype(int) - mask).max() < 60 and mask.min() > 20
    mask = Framing(58, alpha_mask=True).frame(DecodedImage(image, alpha))[1]
    assert (mask == 0).mean() < 0.1                                                     # the crop's own sides
    whole, counts = Framing(120, "pad", trim_bars=True).frame(DecodedImage(image, None))
    assert (whole.max(axis=2) > 16).all() and (counts > 0).mean() > 0.9


def test_the_inspection_shows_bars_before_and_after(small_world: SmallWorld, call_script: Call, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    red = np.full((100, 60, 3), (255, 0, 0), np.uint8)
    Image.fromarray(barred(red, (0, 0), (20, 20))).save(folder / "a.png")
    Image.new("RGB", (100, 100), "lime").save(folder / "b.png")
    run = ["train", "-b", *small_world.training_files, f"concepts.0.images={folder}", "--inspect"]
    before = call_script(*run, tmp_path / "before").out.splitlines()
    assert "thing: warning: 'a.png' is 100 x 100 px, has black bars, which would be learned too; " \
           "data.trim_bars=true crops them off" in before
    assert "black bars" not in call_script(*run, tmp_path / "after", "data.trim_bars=true").out
    assert "black bars cropped off: 58 x 100 px are left" in (tmp_path / "after" / "files.tsv").read_text()
    for name, (barred_rows, rows) in {"before": (2, 0), "after": (1, 2)}.items():
        page = np.asarray(Image.open(tmp_path / name / "sheet-00.png").convert("RGB"))           # mirrored rows too
        lines = {True: 0, False: 0}
        for line in page:
            if (line[8:8 + CELL // 10] == (0, 0, 0)).all():
                lines[True] += 1
            elif (line[8:8 + CELL] == (255, 0, 0)).all():
                lines[False] += 1
        assert (lines[True], lines[False]) == (barred_rows * CELL, rows * CELL), name
    options = [f"concepts.0.images={folder}", "preview.prompts=[]", "-l", tmp_path / "logs", "data.trim_bars=true"]
    assert "black bars" not in call_script("train", "-b", *small_world.training_files, *options).out
    (seen,) = (tmp_path / "logs").glob("*/images/references/000.png")
    assert (np.asarray(Image.open(seen)) == (255, 0, 0)).all()


def test_names_stand_below_their_images(tmp_path: Path) -> None:
    """Each in its column; a sheet of two images is two wide; a long name keeps both its ends within its cell."""
    for name in ("a", "b" * 80):
        Image.new("RGB", (8, 8), "white").save(tmp_path / f"{name}.png")
    report = inspect_sets([("x", tmp_path, False)], Framing(8), tmp_path / "out", flip=False)
    page = np.asarray(Image.open(report.sheets[0]).convert("L"))
    assert page.shape[1] == 2 * (CELL + LABEL) + 3 * 8
    below = (page[-LABEL - 16:] < 128).any(axis=0)                   # columns of pixels with ink
    first, second = below[8:8 + CELL + LABEL], below[16 + CELL + LABEL:]
    assert 0 < first.sum() < 40 and second[:CELL // 2].any() and second[CELL // 2:CELL].any()
    assert not below[8 + CELL:16 + CELL + LABEL].any() and not second[CELL:].any()


def test_the_sheet_shows_crop_mirror_and_mask(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.new("RGBA", (300, 100), (0, 0, 255, 255))                # blue sides that the crop cuts off
    image.paste((255, 0, 0, 255), (100, 0, 150, 100))
    image.paste((0, 255, 0, 0), (150, 0, 200, 100))                        # the right half of the middle: transparent
    image.save(folder / "a.png")
    report = inspect_sets([("x", folder, False)], Framing(CELL, background="yellow", alpha_mask=True), tmp_path / "out")
    page = np.asarray(Image.open(report.sheets[0]).convert("RGB"))
    colors = [tuple(color) for color in page[:, 8 + CELL // 4]]         # a column through the left half of the cells
    right = [tuple(color) for color in page[:, 8 + CELL * 3 // 4]]
    assert (0, 0, 255) not in set(colors) | set(right)
    assert colors.count((255, 0, 0)) == right.count((255, 0, 0)) == CELL   # left as it is, right mirrored
    assert colors.count((255, 255, 0)) == right.count((255, 255, 0)) == CELL
    assert right.count((0, 0, 0)) >= CELL > colors.count((0, 0, 0))        # the mask's hole


BREAKS = {"empty": lambda data: b"", "cut": lambda data: data[:len(data) // 2], "text": lambda data: b"some milk",
          "zeros": lambda data: bytes(len(data)), "html": lambda data: b"<!doctype html><html></html>",
          "header": lambda data: data[:20], "appledouble": lambda data: b"\0\5\x16\7\0\2\0\0Mac OS X",
          "reversed": lambda data: data[::-1], "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
          "heic": lambda data: b"\0\0\0\x18ftypheic" + bytes(200)}


def test_many_mixed_files_are_inspected_quickly_and_every_broken_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    grain = np.random.default_rng(1).integers(0, 256, (48, 64, 4), np.uint8)
    kinds = [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("png", "P"), ("tif", "CMYK"), ("bmp", "L"),
             ("jpg", "CMYK"), ("gif", "P"), ("png", "LA")]
    wholes = [Image.fromarray(grain).convert("RGB").convert(mode) for _, mode in kinds]
    for number in range(180):
        suffix, _ = kinds[number % 9]
        wholes[number % 9].resize((200 + number, 300)).save(folder / f"img{number}.{suffix}")
    for number, (name, damage) in enumerate([*BREAKS.items()] * 2):
        data = (folder / f"img{9 * number % 180}.jpg").read_bytes()
        (folder / f"broken{number}_{name}.jpg").write_bytes(damage(data))
    start = time.process_time()
    report = inspect_sets([("many", folder, True)], Framing(64), tmp_path / "out")
    assert (report.used, report.skipped) == (180, 20)
    named = {line.split("'")[1]: line for line in report.lines if "skipped '" in line}
    assert named.keys() == {path.name for path in folder.glob("broken*")}
    assert all(len(line.partition("' ")[2]) > 7 for line in named.values())
    assert time.process_time() - start < 12                                # a fifth of 1,000 files, which have 60 s


def test_an_inspection_replaces_no_file_of_another(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for folder in (photos, out):
        folder.mkdir()
    Image.new("RGB", (8, 8), "white").save(photos / "a.png")
    (out / "sheet-00.png").write_text("a user's")
    with pytest.raises(UserError, match="holds 'sheet-00.png', which was not made here"):
        inspect_sets([("x", photos, False)], Framing(8), out)
    assert contents(out) == {"sheet-00.png": b"a user's"}
    (out / "sheet-00.png").unlink()
    for made in ("first", "again", "as by an earlier version"):
        if made != "again":
            (out / RECORD).unlink(missing_ok=True)
        inspect_sets([("x", photos, False)], Framing(8), out)
    assert set(contents(out)) == {RECORD, "files.tsv", "sheet-00.png"}
