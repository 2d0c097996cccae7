"""Tests the one reader of text files: marks, line ends, other encodings, JSON; and that every reader is this one."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Call, SmallWorld
from PIL import Image

from ldm.data.concept_lists import choose_concepts, read_concepts
from ldm.evaluation.image_sets import read_images, read_prompts
from ldm.records import load_json
from ldm.text import read_lines, read_text
from ldm.training.run import Run
from ldm.util import UserError

MARK = b"\xef\xbb\xbf"


def test_marks_and_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "a cat \r\n\r\n\tein Kätzchen\u2028on a chair\r\n\r\n".encode())
    assert read_lines(path, "list") == ["a cat", "", "ein Kätzchen\u2028on a chair"]
    path.write_bytes(MARK + b'{"a": 1}\r\n')
    assert load_json(path, "file") == {"a": 1}


@pytest.mark.parametrize("data", ["a {}".encode("utf-16"), "a {}".encode("utf-16-le"), "café".encode("latin-1")])
def test_other_encodings_are_refused_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"^prompt file '.*a\.txt' is not UTF-8 text; save it as plain text in UTF-8"):
        read_text(tmp_path / "a.txt", "prompt file")


def test_what_is_no_file_and_no_json_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^list '.*none' does not exist; check its path"):
        read_lines(tmp_path / "none", "list")
    with pytest.raises(UserError, match="^list '.*' is no file; give the path"):
        read_lines(tmp_path, "list")
    for text in ("{", "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"^list '.*a\.json' is no JSON \("):
            load_json(tmp_path / "a.json", "list")


def test_every_reader_knows_the_mark(tmp_path: Path) -> None:
    prompts, concepts, classes = (tmp_path / name for name in ("p.txt", "concepts.json", "prompts_and_classes.txt"))
    prompts.write_bytes(MARK + b"a {} in the snow\r\n")
    assert read_prompts(prompts) == ("a {} in the snow",)
    records = [{"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": "data",
                "prompt_filename": "p.txt"}]
    concepts.write_bytes(MARK + json.dumps(records).encode())
    assert choose_concepts(concepts)[0].class_noun == read_concepts(concepts, prompts=True)[0].class_noun == "cat"
    assert read_concepts(concepts, prompts=True)[0].prompts == ("a {} in the snow",)
    text = "subject_name,class\r\npot,pot\r\n\r\nprompt_list = ['a {0} {1}']\r\nprompt_list = ['the {0} {1}']\r\n"
    classes.write_bytes(MARK + text.encode())
    (tmp_path / "pot").mkdir()
    assert choose_concepts(tmp_path)[0].class_noun == read_concepts(tmp_path, prompts=True)[0].class_noun == "pot"
    for reader, path, given in ((read_prompts, prompts, prompts), (choose_concepts, concepts, concepts),
                                (read_concepts, classes, tmp_path)):
        path.write_bytes("é".encode("latin-1"))
        with pytest.raises(UserError, match="is not UTF-8 text"):
            reader(given)


def test_a_marked_prompt_file_gives_the_tokens_of_a_plain_one(small_world: SmallWorld, small_run: Run,
                                                              call_script: Call, tmp_path: Path) -> None:
    texts = {"plain": b"a {} in the snow\na {} on the beach\n",
             "marked": MARK + b"a {} in the snow\r\n\r\na {} on the beach\r\n"}
    shown = []
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
        shown.append(call_script("sample", "-b", *small_world.sampling_files, "--delta_ckpt", small_run.concept,
                                 "--from-file", tmp_path / name, "--show_tokens"))
    assert shown[0].status == 0 and "S^c" in shown[0].out and shown[0].out == shown[1].out
    (tmp_path / "plain").write_bytes("a {}".encode("utf-16"))
    refused = call_script("sample", "--delta_ckpt", small_run.concept, "--from-file", tmp_path / "plain")
    assert "is not UTF-8 text; save it as plain text in UTF-8" in refused.error


def test_a_marked_file_of_prompts_belongs_to_its_images(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "prompts.json").write_bytes(MARK + b'{"a": "a cat"}')
    assert read_images(tmp_path)[0].prompt == "a cat"
