"""Tests the inputs people already have: captions beside images, lists, Custom Diffusion's JSON, trees of subjects."""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from conftest import Call, SmallWorld
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image

from ldm.config import TrainConfig, check_complete
from ldm.config_files import merge
from ldm.customization.delta import load_concept
from ldm.customization.ico import PromptScheme, caption_template
from ldm.data.captions import captioned
from ldm.data.concept_lists import choose_concepts, read_concepts
from ldm.data.regularization import read_regularization
from ldm.evaluation.image_sets import read_images
from ldm.training.inspection import inspect_run
from ldm.training.references import read_references
from ldm.training.run import fine_tune
from ldm.training.setup import concept_words
from ldm.util import UserError


def put(folder: Path, *names: str) -> Path:
    """Writes small images, and returns the folder."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(folder / name)
    return folder


def test_captions_beside_images_are_not_junk(tmp_path: Path) -> None:
    put(tmp_path, "img10.png", "img2.png", "c.jpg", "d.webp")
    (tmp_path / "img2.txt").write_text("a cat\n on a mat \n")
    (tmp_path / "c.jpg.caption").write_text("a dog")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "notes.txt").write_text("milk")
    found = captioned(tmp_path)
    assert [(path.name, caption) for path, caption in zip(found.paths, found.captions, strict=True)] == [
        ("c.jpg", "a dog"), ("d.webp", None), ("img2.png", "a cat on a mat"), ("img10.png", None)]
    assert {item.path.name for item in found.skipped} == {"notes.txt"}
    assert found.layout == "folder with 2 captions beside images"
    reg = read_regularization(tmp_path, "pet")
    assert reg.captions == ["a dog", "a photo of a pet", "a cat on a mat", "a photo of a pet"]
    assert "2 with their own captions, the others captioned 'a photo of a pet'" in reg.source
    assert read_regularization(tmp_path, "pet", "x").captions == ["x"] * 4


def test_metadata_lines(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    lines = tmp_path / "metadata.jsonl"
    lines.write_text('{"file_name": "b.png", "text": "two"}\n\n{"file_name": "a.png", "caption": "one", "more": 1}\n')
    found = captioned(tmp_path)
    assert found.captions == ["one", "two"] and not found.skipped and "metadata.jsonl" in found.layout
    for text, message in (('{"file_name": "b.png"}\n{"file_name": "z.png", "text": "x"}', "line 2 of .* names 'z.png'"),
                          ("[1]", "line 1 of .* not as expected"), ('{"text": "x"}', "line 1"), ("{", "line 1")):
        lines.write_text(text)
        with pytest.raises(UserError, match=message):
            captioned(tmp_path)


def test_metadata_in_a_table(tmp_path: Path) -> None:
    """As spreadsheets write it: quoted commas and line ends, a byte-order mark, further columns, captions left out."""
    put(tmp_path, "a.png", "b.png", "c.png")
    table = tmp_path / "metadata.csv"
    table.write_bytes('\ufefffile_name,more,text\r\nb.png,,"a cat, ""asleep""\r\non a wall"\r\na.png,1,\r\n'.encode())
    found = captioned(tmp_path)
    assert found.captions == [None, 'a cat, "asleep" on a wall', None] and not found.skipped
    assert found.layout == "folder with 1 captions in metadata.csv"
    table.write_text("file_name,caption\na.png,one\n")
    assert captioned(tmp_path).captions == ["one", None, None]
    for text, message in (("a.png;b\n", None), ("name,text\na.png,one\n", "line 2 of .* does not say which image"),
                          ("file_name,text\nz.png,x\n", "line 2 of .* names 'z.png', which is not there"),
                          ('file_name,text\na.png,"one" more\n', "line 2 of .* is no CSV")):
        table.write_text(text)
        if message is None:
            assert captioned(tmp_path).captions == [None] * 3
            continue
        with pytest.raises(UserError, match=message):
            captioned(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("metadata.jsonl", '{"file_name": "train/a.png", "text": "one"}'),
                                            ("metadata.csv", "file_name,text\ntrain/a.png,one\n")])
def test_paths_in_metadata_are_found_as_those_of_lists(tmp_path: Path, name: str, text: str) -> None:
    folder = put(tmp_path / "train", "a.png", "b.png")
    (folder / name).write_text(text)
    assert captioned(folder).captions == ["one", None]
    (tmp_path / "link").symlink_to(folder)
    assert captioned(tmp_path / "link").captions == ["one", None]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt", "a.png.caption"])
def test_captions_nobody_wants_are_not_looked_into(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError):
        captioned(tmp_path)
    found = captioned(tmp_path, captions=False)
    assert (found.captions, found.skipped, found.layout) == ([None], [], "folder")
    assert read_regularization(tmp_path, "cat", "a cat").captions == ["a cat"]
    (tmp_path / "images.txt").write_text("a.png\n")
    (tmp_path / "caption.txt").write_text("one\ntwo\n")
    assert captioned(tmp_path, captions=False).captions == [None]


def test_a_list_with_captions_and_paths_of_custom_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put(tmp_path / "real_reg" / "samples_cat", "cat/1.jpg", "cat/0.jpg", "cat/2.jpg")
    monkeypatch.chdir(tmp_path)
    (root / "images.txt").write_text("".join(f"real_reg/samples_cat/cat/{number}.jpg\n" for number in (2, 0, 1)))
    assert [path.name for path in captioned(root / "images.txt").paths] == ["2.jpg", "0.jpg", "1.jpg"]
    (root / "caption.txt").write_text("two\nzero\none\n")
    (root / "cat" / "0.jpg").write_bytes(b"junk")
    for path in (root, root / "images.txt"):
        found = captioned(path)
        assert ([path.name for path in found.paths], found.captions) == (["2.jpg", "1.jpg"], ["two", "one"])
        assert [item.path.name for item in found.skipped] == ["0.jpg"]
    (root / "caption.txt").write_text("two\nzero\n")
    with pytest.raises(UserError, match=r"has 3 lines but '.*caption\.txt' has 2"):
        captioned(root)
    (root / "images.txt").write_text("cat/0.jpg\n")
    (root / "caption.txt").write_text("x\n")
    with pytest.raises(UserError, match="names no usable image"):
        captioned(root)


RECORDS = [{"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": "./data/my_cat",
            "class_data_dir": "./reg/cat"},
           {"instance_prompt": "photo of a <new2> wooden pot", "class_prompt": "wooden pot",
            "instance_data_dir": "data/pot", "class_data_dir": "reg/none"}]


def test_custom_diffusions_concept_list(tmp_path: Path) -> None:
    put(tmp_path / "data", "my_cat/a.png", "pot/a.png")
    put(tmp_path / "reg", "cat/a.png")
    path = tmp_path / "assets" / "concept_list.json"
    path.parent.mkdir()
    path.write_text(json.dumps(RECORDS))
    cat, pot = choose_concepts(path)
    assert (cat.name, cat.class_noun, cat.words) == ("my_cat", "cat", ("<new1>",))
    assert (pot.name, pot.class_noun, pot.words) == ("pot", "wooden pot", ("<new2>",))
    assert Path(cat.images).samefile(tmp_path / "data/my_cat") and pot.regularization == ""
    assert Path(cat.regularization).samefile(tmp_path / "reg/cat")
    assert [subject.name for subject in choose_concepts(path, ["pot"])] == ["pot"]
    with pytest.raises(UserError, match="has no subject 'dog'; choose with --subject among my_cat, pot"):
        choose_concepts(path, ["dog"])


@pytest.mark.parametrize(("class_prompt", "instance_prompt", "noun"), [
    ("cat", "photo of a <new1> cat", "cat"),
    ("tortoise plushy", "photo of a <new1> tortoise plushy", "tortoise plushy"),
    ("photo of a cat", "photo of a <new1> cat", "cat"), ("a photo of cat", "a photo of sks cat", "cat"),
    ("A close-up photo of the Persian cat.", "", "Persian cat"), ("a cat", "a <new1> cat in the snow", "cat"),
    ("an image of one owl", "<new1>", "owl"), ("glass of water", "photo of a <new1> glass of water", "glass of water"),
    ("a cat sitting on a wall", "photo of a <new1> <new2> cat", "cat"), ("jack-in-the-box", "", "jack-in-the-box"),
    ("a photo of a cat in the snow", "a photo of a <new1> cat in the snow", None), ("a photo of a", "", None),
    ("the sea at night", "photo of a <new1> house", None), ("glass of water", "photo of a sks glass of water", None)])
def test_a_class_noun_is_a_noun(tmp_path: Path, class_prompt: str, instance_prompt: str, noun: str | None) -> None:
    """Custom Diffusion's lists have it as class_prompt, those of DreamBooth's trainers a sentence that ends with it."""
    put(tmp_path, "data/a.png")
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"instance_prompt": instance_prompt, "class_prompt": class_prompt,
                                 "instance_data_dir": "data"}]))
    if noun is not None:
        assert choose_concepts(path)[0].class_noun == noun
        return
    with pytest.raises(UserError, match=f"concept 1 of '.*list.json': .* from class_prompt '{class_prompt}'; write "):
        choose_concepts(path)


def test_class_pictures_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    put(tmp_path, "data/my_cat/a.png", "data/pot/a.png", "reg/cat/a.png")
    (tmp_path / "list.json").write_text(json.dumps(RECORDS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_concepts(tmp_path / "list.json", ["my_cat"])[0].regularization.endswith("reg/cat")
    with pytest.warns(UserWarning, match=r"class_data_dir '.*reg/none' of 'pot' in '.*' does not exist"):
        assert choose_concepts(tmp_path / "list.json", ["pot"])[0].regularization == ""


def test_custom_concepts_pairs(tmp_path: Path) -> None:
    """Each group of dataset_multiconcept.json has two concepts, and a third entry that names prompts for both."""
    put(tmp_path, "benchmark_dataset/pet_cat1/a.png", "benchmark_dataset/wearable_jacket1/a.png")
    (tmp_path / "prompts").mkdir()
    for noun in ("cat", "jacket"):
        (tmp_path / "prompts" / f"{noun}.txt").write_text(f"a {{}} {noun}\n")
    pair = [{"instance_prompt": f"photo of a <new{number}> {noun}", "class_prompt": noun,
             "instance_data_dir": f"./benchmark_dataset/{folder}", "prompt_filename": f"prompts/{noun}.txt",
             "class_data_dir": f"./real_reg/{noun}"}
            for number, (noun, folder) in enumerate((("cat", "pet_cat1"), ("jacket", "wearable_jacket1")), 1)]
    path = tmp_path / "dataset_multiconcept.json"
    path.write_text(json.dumps([[*pair, {"prompt_filename_compose": "prompts/cat_jacket.txt"}]]))
    found = read_concepts(path, prompts=True)
    assert [(item.name, item.class_noun, item.words, item.prompts) for item in found] == [
        ("pet_cat1", "cat", ("<new1>",), ("a {} cat",)), ("wearable_jacket1", "jacket", ("<new2>",), ("a {} jacket",))]
    path.write_text(json.dumps([[*pair, {"prompt_filename": "x"}]]))
    with pytest.raises(UserError, match="concept 3 of .* lacks instance_data_dir or class_prompt"):
        read_concepts(path)


def test_custom_concept_101(tmp_path: Path) -> None:
    put(tmp_path / "benchmark_dataset", "pet_cat1/a.png", "scene_barn/a.png")
    records = [{"instance_prompt": f"photo of a <new1> {noun}", "class_prompt": noun, "class_data_dir": f"./reg/{noun}",
                "instance_data_dir": f"./benchmark_dataset/{name}", "prompt_filename": f"prompts/{noun}.txt"}
               for name, noun in (("scene_barn", "barn"), ("pet_cat1", "cat"))]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match="holds 2 subjects; choose with --subject among scene_barn, pet_cat1"):
        choose_concepts(path)
    (cat,) = choose_concepts(path, ["pet_cat1"])
    assert (cat.class_noun, cat.words, Path(cat.images)) == ("cat", ("<new1>",),
                                                            tmp_path / "benchmark_dataset/pet_cat1")
    assert [subject.words for subject in choose_concepts(path, ["pet_cat1", "scene_barn"])] == [(), ()]


def test_a_tree_of_subjects(tmp_path: Path) -> None:
    put(tmp_path, "cat2/a.png", "colorful_sneaker/a.png", ".cache/a.png", "wooden_pot_3/a.png")
    assert [(subject.name, subject.class_noun) for subject in
            choose_concepts(tmp_path, ["cat2", "colorful_sneaker", "wooden_pot_3"])] == [
        ("cat2", "cat"), ("colorful_sneaker", "colorful sneaker"), ("wooden_pot_3", "wooden pot")]
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\ncolorful_sneaker,sneaker\n\n"
                                                      "Prompts\n'a {0} {1}'.format(unique_token, class_token),\n")
    assert choose_concepts(tmp_path, ["colorful_sneaker"])[0].class_noun == "sneaker"
    with pytest.raises(UserError, match="holds 3 subjects"):
        choose_concepts(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is no JSON"), ("{}", "is no list of concepts"), ("[]", "is no list"), ("[1]", "concept 1 of .* lacks"),
    ('[{"class_prompt": "cat"}]', "lacks instance_data_dir or class_prompt"), (None, "does not exist")])
def test_lists_that_are_none(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=message):
        choose_concepts(tmp_path / "list.json")


def test_a_list_of_concepts_becomes_a_configuration(call_script: Call, tmp_path: Path) -> None:
    put(tmp_path, "data/my_cat/a.png", "data/pot/a.png", "reg/cat/a.png")
    path = tmp_path / "concept_list.json"
    path.write_text(json.dumps(RECORDS))
    outcome = call_script("train", "--concepts_list", path, "--reg_mode", "generate", "--print_config")
    config = OmegaConf.create(outcome.out)
    assert [concept.class_noun for concept in config.concepts] == ["cat", "wooden pot"]
    assert [concept.words for concept in config.concepts] == [["<new1>"], ["<new2>"]]
    assert config.data.reg.mode == "generate" and config.concepts[0].regularization.endswith("reg/cat")
    assert "has no subject 'x'" in call_script("train", "--concepts_list", path, "--subject", "x").error


@pytest.mark.parametrize("flag", ["class_noun", "datapath", "reg_datapath", "reg_caption"])
def test_flags_of_one_concept_are_refused_beside_a_list(call_script: Call, tmp_path: Path, flag: str) -> None:
    put(tmp_path, "data/my_cat/a.png", "data/pot/a.png")
    path = tmp_path / "concept_list.json"
    path.write_text(json.dumps(RECORDS))
    outcome = call_script("train", "--concepts_list", path, f"--{flag}", "x", "--print_config")
    assert f"--{flag} is for one concept" in outcome.error


def test_subjects_are_refused_without_a_list(call_script: Call) -> None:
    outcome = call_script("train", "--subject", "cat2", "teapot", "--print_config")
    assert "--subject 'cat2' chooses from a list" in outcome.error


# ---- captions as templates, joint words


@pytest.mark.parametrize(("caption", "template"), [
    ("my {} asleep", "my {} asleep"), ("a <new1> cat asleep", "a {} asleep"), ("a <new1> Cat", "a {}"),
    ("A Cat on a cat tree", "A {} on a cat tree")])
def test_captions_become_templates(caption: str, template: str) -> None:
    assert caption_template(caption, PromptScheme(("<new1>",), "cat")) == template


def test_a_caption_without_the_class_is_refused() -> None:
    with pytest.raises(UserError, match="mentions neither {} nor 'cat'"):
        caption_template("a category of dogs", PromptScheme(("<new1>",), "cat"))


def joint_config(small_world: SmallWorld, folder: Path, *entries: str) -> DictConfig:
    """Merges the configuration of a run on several concepts, given as YAML."""
    (folder / "concepts.yaml").write_text("concepts:\n" + "".join(f"- {{{entry}}}\n" for entry in entries))
    return merge(TrainConfig, [*small_world.training_files, folder / "concepts.yaml"],
                 ["preview.prompts=[]", f"trainer.logdir={folder / 'logs'}"])


def test_concepts_without_words_get_their_own(small_world: SmallWorld, tmp_path: Path) -> None:
    def words(*own: str) -> list[list[str]]:
        return concept_words(joint_config(small_world, tmp_path, *(f"words: {entry}" for entry in own)))

    assert words("null") == [["<new1>", "<new2>"]]
    assert words("null", "null", "null") == [["<new1>", "<new2>"], ["<new3>", "<new4>"], ["<new5>", "<new6>"]]
    assert words("[<a>]", "null", "[<new3>]") == [["<a>"], ["<new4>", "<new5>"], ["<new3>"]]


def test_joint_training_keeps_contexts_and_classes_apart(small_world: SmallWorld, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    pots, classes = put(tmp_path / "pots", "0.png", "1.png", "2.png"), put(tmp_path / "classes", "0.png")
    run = fine_tune(joint_config(
        small_world, tmp_path,
        f"name: thing, images: {small_world.photos}, class_noun: cat, regularization: {small_world.folder / 'class'}",
        f"name: pot, images: {pots}, class_noun: hat, regularization: {classes}",
        f"name: bare, images: {pots}, class_noun: dog"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("thing: regularization: 3 image(s)") for line in lines)
    assert any(line.startswith("pot: regularization: 1 image(s)") for line in lines)
    assert any(line.startswith("bare: no regularization images") for line in lines)
    assert [line for line in lines if " write " in line] == ["pot: write <new3> <new4> hat in prompts",
                                                             "bare: write <new5> <new6> dog in prompts"]
    concept = load_concept(run.concept)
    assert [scheme.words for scheme in concept.schemes] == [("<new1>", "<new2>"), ("<new3>", "<new4>"),
                                                           ("<new5>", "<new6>")]
    assert sorted(concept.contexts) == sorted(f"<ctx-{index}-{image}-{position}>" for index, count in
                                              ((0, 2), (1, 3), (2, 3)) for image in range(count) for position in (0, 1))


def test_given_captions_serve_as_the_manual_baseline(small_world: SmallWorld, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    photos = put(tmp_path / "photos", "0.png", "1.png")
    (photos / "0.txt").write_text("my cat in the snow")
    options = (f"concepts.0.images={photos}", "method.prefix=''", "method.suffix=''", "data.captions=true",
               "method.steps=1")
    fine_tune(small_world.train_config(tmp_path / "logs", *options))
    assert "first training prompt: my <new1> <new2> cat in the snow" in capsys.readouterr().out


def sets_of(config: DictConfig) -> tuple[ListConfig, bool]:
    return config.concepts, config.data.captions


def test_captions_that_are_asked_for_are_counted_and_their_absence_is_refused(
        small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = put(tmp_path / "photos", "0.png", "1.png")
    options = (f"concepts.0.images={photos}", "data.captions=true")
    with pytest.raises(UserError, match="data.captions is true, but no reference image has a caption"):
        read_references(*sets_of(small_world.train_config(tmp_path / "logs", *options)))
    (photos / "metadata.csv").write_text('file_name,text\n0.png,"a cat, asleep"\n')
    found = read_references(*sets_of(small_world.train_config(tmp_path / "logs", *options)))
    assert found[0].captions == ["a cat, asleep", None]
    assert capsys.readouterr().out.splitlines() == ["thing: 0 of 2 images have a caption",
                                                    "thing: 1 of 2 images have a caption"]
    read_references(*sets_of(small_world.train_config(tmp_path / "logs", options[0])))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("key", "ways"), [("class_noun", "CLASS_NOUN for train.sh, or --class_noun"),
                                           ("images", "DATAPATH for train.sh, or --datapath")])
def test_what_is_not_set_is_named_with_every_way_to_set_it(small_world: SmallWorld, tmp_path: Path, key: str,
                                                           ways: str) -> None:
    config = joint_config(small_world, tmp_path, *["name: x, images: y, class_noun: z"] * 2)
    for index, told in ((0, ways), (1, "set it in the concept's file")):
        partly = OmegaConf.create(OmegaConf.to_container(config))
        partly.concepts[index][key] = "???"
        with pytest.raises(UserError, match=rf"^concepts\.{index}\.{key} is not set; .*{told}\.$"):
            check_complete(partly)
        if key == "images":
            with pytest.raises(UserError, match=rf"^concepts\.{index}\.{key} is not set; .*{told}\.$"):
                inspect_run(partly, tmp_path / "out")


def test_names_that_no_file_can_have_are_no_files(tmp_path: Path) -> None:
    """A photo's name may leave no room for its caption's; a list's line may be of any length."""
    long = tmp_path / ("x" * 250 + ".png")
    Image.new("RGB", (8, 8)).save(long)
    found = captioned(tmp_path)
    assert found.paths == [long] and found.captions == [None]
    (tmp_path / "list").write_text(f"{long.name}\n{'y' * 300}.png\n")
    assert [item.reason for item in captioned(tmp_path / "list").skipped] == [
        "is truncated or cannot be read (File name too long)"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a\\u0000b", "text": "c"}\n')
    with pytest.raises(UserError, match="which is not there; correct it"):
        captioned(tmp_path)


def test_a_folder_that_may_not_be_opened_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for read in (choose_concepts, captioned, read_images):
        with pytest.raises(UserError, match=r"cannot be opened \(Permission denied\); check it"):
            read(tmp_path)
