"""Tests of which images belong to which prompts, and of the data sets' layouts."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments.jobs import thin_out
from PIL import Image

from ldm.data.concept_lists import read_concepts
from ldm.evaluation.image_sets import read_images, read_prompts
from ldm.evaluation.scoring import plain_text
from ldm.sheets import save_png
from ldm.util import UserError

SETTINGS = {"prompt": "a {} in the snow", "text": "a <new1> cat in the snow", "seed": 4, "strength": None, "steps": 2,
            "sampler": "ddim", "scale": 3.0, "concept": {"class_noun": "cat"}}


def paint(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)


def test_our_images_say_their_prompts(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "samples" / "a.png", SETTINGS)
    paint(tmp_path, "grid.png")                                     # a sheet beside samples/ is no sample
    (found,) = read_images(tmp_path)
    assert (found.path.name, found.prompt, found.settings["seed"]) == ("a.png", "a {} in the snow", 4)


def test_custom_concept_101s_results(tmp_path: Path) -> None:
    paint(tmp_path / "samples", "00000.png", "00001.png")
    (tmp_path / "prompts.json").write_text(json.dumps({"00001": "a dog", "00000": "a cat"}))
    assert [item.prompt for item in read_images(tmp_path)] == ["a cat", "a dog"]


def test_a_folder_per_prompt(tmp_path: Path) -> None:
    paint(tmp_path / "a_{}_on_the_beach", "0.png", "1.png")
    paint(tmp_path / "a red {}", "0.png")
    assert [item.prompt for item in read_images(tmp_path)] == ["a red {}", "a {} on the beach", "a {} on the beach"]


def test_prompt_files(tmp_path: Path) -> None:
    paint(tmp_path / "p", "2.png", "10.png")
    (tmp_path / "lines.txt").write_text("two\nten\n")
    (tmp_path / "names.json").write_text(json.dumps({"10.png": "ten", "2.png": "two"}))
    for file in ("lines.txt", "names.json"):
        assert [item.prompt for item in read_images(tmp_path / "p", tmp_path / file)] == ["two", "ten"]
    assert [item.prompt for item in read_images(tmp_path / "p")] == [None, None]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("few.txt", "one\n", "has 1 lines but .* holds 2 images"),
    ("lacks.json", '{"0": "a"}', "no prompt for image '1.png'"),
    ("extra.json", '{"0": "a", "1": "b", "2": "c"}', "no image for entry '2'"),
    ("list.json", '["a", "b"]', "must hold a JSON object"),
    ("broken.json", "{", "is no JSON"),
    ("absent.json", None, "does not exist")])
def test_prompts_that_do_not_match(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    paint(tmp_path / "p", "0.png", "1.png")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_images(tmp_path / "p", tmp_path / name)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no usable image"):
        read_images(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        read_images(tmp_path / "none")


def test_custom_concept_101(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "cat.txt").write_text("a {} in a pool\nphoto of {}\n\n")
    paint(tmp_path / "regularization" / "cat", "0.jpg")
    entry = {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "prompt_filename": "prompts/cat.txt",
             "instance_data_dir": "./benchmark_dataset/pet_cat1", "class_data_dir": "./regularization/cat"}
    (tmp_path / "dataset.json").write_text(json.dumps([entry, {**entry, "class_data_dir": "./none"}]))
    first, second = read_concepts(tmp_path / "dataset.json", prompts=True)
    assert (first.name, first.class_noun, first.prompts) == ("pet_cat1", "cat", ("a {} in a pool", "photo of {}"))
    assert Path(first.images) == tmp_path / "benchmark_dataset" / "pet_cat1"
    assert Path(first.regularization) == tmp_path / "regularization" / "cat"
    assert Path(second.regularization) == tmp_path / "none"
    (tmp_path / "dataset.json").write_text(json.dumps([{"class_prompt": "cat"}]))
    with pytest.raises(UserError, match="concept 1 of .* lacks instance_data_dir"):
        read_concepts(tmp_path / "dataset.json", prompts=True)


def test_dreambooth(tmp_path: Path) -> None:
    def prompts(*texts: str) -> str:
        lines = ",\n".join(f"'a {{0}} {{1}} {text}'.format(unique_token, class_token)" for text in texts)
        return f"prompt_list = [\n{lines}\n]\n"

    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nbear_plushie,stuffed animal\ndog2,dog\n\nPrompts\n\nObject Prompts\n\n"
        + prompts("in the jungle", "on a rug") + "\nLive Subject Prompts\n\n" + prompts("wearing a red hat"))
    bear, dog = read_concepts(tmp_path, prompts=True)
    assert (bear.name, bear.class_noun) == ("bear_plushie", "stuffed animal")
    assert Path(bear.images) == tmp_path / "bear_plushie"
    assert bear.prompts == ("a {} in the jungle", "a {} on a rug") and dog.prompts == ("a {} wearing a red hat",)
    hostile = "{0} {0.__class__} {5} {x}"                           # a text, whatever it looks like
    (tmp_path / "prompts_and_classes.txt").write_text("a,b\nbear,toy\n" + f"prompt_list = ['{hostile}']\n" * 2)
    assert read_concepts(tmp_path, prompts=True)[0].prompts == (hostile.replace("{0}", "{}"),)
    (tmp_path / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(UserError, match="two prompt lists"):
        read_concepts(tmp_path, prompts=True)


def test_other_things_are_no_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set"):
        read_concepts(tmp_path, prompts=True)


@pytest.mark.parametrize(("prompt", "text"), [
    ("a {} in the snow", "an owl in the snow"), ("A photo of {}.", "A photo of owl."),
    ("a <new1> <new2> owl at night", "a owl at night"), ("a dog", "a dog")])
def test_concept_words_are_taken_out_of_texts(prompt: str, text: str) -> None:
    assert plain_text(prompt, "owl") == text


def test_prompts_of_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a {}\n\na {} at night\na {}\n")
    assert read_prompts(path) == ("a {}", "a {} at night")
    for content, message in (("\n", "is empty"), ("a cat\n", "does not name the concept")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
    assert thin_out("abcdefgh", 4) == ("a", "c", "e", "g")
    assert thin_out("abc", None) == thin_out("abc", 9) == ("a", "b", "c")
