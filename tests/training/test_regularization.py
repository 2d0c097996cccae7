"""Tests where class images come from: drawn by the base model and cached, retrieved without blocking, or nowhere."""
from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Call, SmallWorld, contents
from filelock import FileLock
from PIL import Image

from ldm.config import RegularizationConfig
from ldm.data.regularization import read_regularization, write_regularization
from ldm.pipeline import Generator
from ldm.training.regularization import class_prompt, generate_class_images, generated_folder, without_tags
from ldm.training.run import fine_tune


def how(root: Path, **options: object) -> RegularizationConfig:
    return RegularizationConfig(**{"mode": "generate", "num": 3, "root": str(root), "steps": 2, "batch_size": 2,
                                   "scale": 2.0} | options)


@pytest.fixture(scope="module")
def generator(small_world: SmallWorld) -> Generator:
    return Generator(*small_world.build())


def test_drawn_sets_are_cached_topped_up_and_kept_apart(generator: Generator, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate_class_images(generator, "tabby cat", how(tmp_path), 32)
    three = contents(folder)
    found = read_regularization(folder, "cat")
    assert [path.name for path in found.paths] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert found.captions == ["photo of a tabby cat"] * 3
    assert (folder / "urls.txt").read_text().split("\n")[2] == f"generated:{generator.identity['hash']}:2"
    five = contents(generate_class_images(generator, "tabby cat", how(tmp_path, num=5), 32))
    images = {name for name in three if name.endswith(".jpg")}
    assert all(five[name] == three[name] for name in images) and len(five) == len(three) + 2
    whole = contents(generate_class_images(generator, "tabby cat", how(tmp_path / "whole", num=5), 32))
    assert whole == five                                     # topping up and drawing at once agree
    (folder / "tabby_cat" / "00004.jpg").unlink()
    (folder / "images.txt").unlink()                         # as a kill would leave it
    assert contents(generate_class_images(generator, "tabby cat", how(tmp_path, num=5), 32)) == five
    monkeypatch.setattr(generator, "generate", lambda *arguments: pytest.fail("it drew again"))
    assert contents(generate_class_images(generator, "tabby cat", how(tmp_path, num=2), 32)) == five
    folders = {generated_folder(generator.identity, "tabby cat", how(tmp_path, **change), 32) for change in
               ({}, {"steps": 3}, {"seed": 1}, {"prompt": "a {}"}, {"scale": 3.0})}
    assert len(folders) == 5
    assert generated_folder({"hash": "other"}, "tabby cat", how(tmp_path), 32) not in folders


def test_damaged_drawn_images_are_drawn_again(generator: Generator, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate_class_images(generator, "tabby cat", how(tmp_path, num=7), 32)
    before, images = contents(folder), folder / "tabby_cat"
    for number, damage in ((1, b""), (2, bytes(500)), (4, before["tabby_cat/00004.jpg"][:400])):
        (images / f"{number:05d}.jpg").write_bytes(damage)
    (folder / "urls.txt").write_bytes(bytes(70))
    (folder / "generated.json").write_bytes(b"")
    drawn: list[int] = []
    generate = generator.generate
    monkeypatch.setattr(generator, "generate", lambda prompts, settings, *rest: drawn.extend(
        range(settings.seed, settings.seed + settings.n_samples)) or generate(prompts, settings, *rest))
    after = contents(generate_class_images(generator, "tabby cat", how(tmp_path, num=7), 32))
    assert drawn == [1, 2, 4]
    assert {name: content for name, content in after.items() if not name.endswith(".damaged")} == before
    assert len(after) == len(before) + 3


def test_a_list_that_is_too_short_names_all_drawn_images_again(generator: Generator, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate_class_images(generator, "tabby cat", how(tmp_path, num=4), 32)
    before = contents(folder)
    (folder / "images.txt").write_text("tabby_cat/00000.jpg\n")
    (folder / "tabby_cat" / "notes.jpg").write_bytes(b"not numbered")
    monkeypatch.setattr(generator, "generate", lambda *arguments: pytest.fail("it drew again"))
    after = contents(generate_class_images(generator, "tabby cat", how(tmp_path, num=2), 32))
    assert after == before | {"tabby_cat/notes.jpg": b"not numbered"}


def test_two_runs_that_draw_one_set_take_turns(generator: Generator, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    folder = generated_folder(generator.identity, "tabby cat", how(tmp_path), 32)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / ".lock"):
            waiting = pool.submit(generate_class_images, generator, "tabby cat", how(tmp_path), 32)
            said = ""
            while "waiting for another run" not in said and not waiting.done():
                time.sleep(0.01)
                said += capsys.readouterr().out
            assert not waiting.done() and not (folder / "images.txt").exists()
        assert (waiting.result() / "images.txt").exists()


def test_captions_from_the_web_do_not_stop_a_run(small_world: SmallWorld, tmp_path: Path) -> None:
    """One is too long for the text encoder, one has a tag, which would be an unknown word, one is nothing else."""
    images = [(Image.new("RGB", (32, 32), "red"), caption, "") for caption in
                ("cat " * 100, "a <b>cat</b> of mine", "<title>")]
    write_regularization(tmp_path / "set", "cat", images)
    config = small_world.train_config(tmp_path / "logs", f"concepts.0.regularization={tmp_path / 'set'}",
                                      "method.steps=3")
    with pytest.warns(UserWarning, match="tokens and 75 fit"):
        assert fine_tune(config).concept.name == "step-000003.safetensors"
    captions = [without_tags(text, "cat") for _, text, _ in images]
    assert captions == [("cat " * 100).strip(), "a cat of mine", "a photo of a cat"]


def test_prompts_of_drawn_images(tmp_path: Path) -> None:
    assert class_prompt(how(tmp_path), "cat") == "photo of a cat"
    assert class_prompt(how(tmp_path), "umbrella") == "photo of an umbrella"
    assert class_prompt(how(tmp_path, prompt="drawing of the {}"), "cat") == "drawing of the cat"


def test_training_with_drawn_class_pictures(small_world: SmallWorld, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    options = ("data.reg.mode=generate", "data.reg.num=2", "data.reg.steps=2", f"data.reg.root={tmp_path}",
               "method.steps=1")
    for _ in range(2):
        fine_tune(small_world.train_config(tmp_path / "logs", *options))
    out = capsys.readouterr().out
    assert out.count("thing: regularization (generate): 2 of 2 image(s), listed in") == 2
    assert "references: 2, regularization images: 2" in out
    assert "each step: 1 reference and as many regularization images of weight 1" in out
    assert len(list((tmp_path / "generated").iterdir())) == 1


def test_modes_by_flag(small_world: SmallWorld, tmp_path: Path, call_script: Call) -> None:
    options = ["-b", *small_world.training_files, "preview.prompts=[]", "method.steps=1", "-l", tmp_path / "logs"]
    outcome = call_script("train", *options, "--reg_mode", "retrieve")
    assert "retrieve images first, with scripts/retrieve.py, and give their folder" in outcome.error
    outcome = call_script("train", *options, "--reg_datapath", tmp_path / "none")
    assert "none' does not exist; give one" in outcome.error and "scripts/retrieve.py" in outcome.error
    outcome = call_script("train", *options, "--reg_mode", "none")
    assert outcome.status == 0 and "regularization images: 0" in outcome.out, outcome.err
    outcome = call_script("train", *options, "--reg_mode", "folder", "concepts.0.regularization=null")
    assert "data.reg.mode is folder but concept 'thing' names none" in outcome.error
