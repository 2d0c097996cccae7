"""Tests that a CLIP is named in two ways only, and that nothing of its file or architecture runs or is fetched."""
from __future__ import annotations

import json
import os
import pickle
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from color_clip import ARCHITECTURE, NAME, write_clip
from conftest import Call
from retrieval import clip as clip_model
from retrieval.clip import check_clip, load_clip, register_architecture, text_similarities
from safetensors.torch import load_file
from web import Web

from ldm.util import UserError


class Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, weights = write_clip(tmp_path_factory.mktemp("clip"))
    assert register_architecture(architecture) == NAME
    return weights


@pytest.fixture(autouse=True)
def no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback alone can be reached, and hubs fail at once."""
    def connect(sock: socket.socket, address: tuple) -> None:
        assert address[0] == "127.0.0.1", address
        return real(sock, address)

    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)


def bombs(folder: Path, trace: Path) -> list[Path]:
    """Writes pickles that make `trace`: bare, torch's, torch's older kind, and a TorchScript program."""
    paths = [folder / name for name in ("bare.pt", "zip.pt", "old.pt", "like.safetensors", "script.pt")]
    paths[0].write_bytes(pickle.dumps({"state_dict": Bomb(trace)}))
    torch.save({"state_dict": {"a": torch.zeros(1), "b": Bomb(trace)}}, paths[1])
    torch.save({"b": Bomb(trace)}, paths[2], _use_new_zipfile_serialization=False)
    torch.save({"b": Bomb(trace)}, paths[3])
    torch.save({"a": torch.zeros(1)}, paths[4])
    with zipfile.ZipFile(paths[4], "a") as archive:
        archive.writestr("script/code/__torch__.py", "raise SystemExit")
    return paths


def test_the_bombs_would_go_off(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    bombs(tmp_path, tmp_path / "trace")
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert (tmp_path / "trace").is_dir()


def test_no_door_runs_a_pickle(weights: Path, tmp_path: Path, call_script: Call, monkeypatch: pytest.MonkeyPatch
                               ) -> None:
    monkeypatch.setattr("retrieval.client.change_environment", lambda *arguments: None)
    trace = tmp_path / "trace"
    (tmp_path / "photos").mkdir()
    (tmp_path / "served").mkdir()
    with Web() as web:
        web.offer(3)
        for path in bombs(tmp_path, trace):
            for name in (str(path), f"open_clip:{NAME}/{path}", f"openai_clip:{path}", f"hf_clip:{tmp_path}"):
                (tmp_path / "served" / "index.json").write_text(json.dumps({"name": "x", "clip": name}))
                for command in (
                        ["--class_noun", "cat", "--url", web.url, "--out", tmp_path / "set", "--allow_private",
                         "--clip", name],
                        ["index", tmp_path / "photos", "--out", tmp_path / "index", "--clip", name],
                        ["serve", tmp_path / "served"], ["serve", tmp_path / "served", "--clip", name]):
                    error = call_script("retrieve", *command).error
                    assert "is not taken" in error or "names code" in error or "is a TorchScript program" in error or \
                        "cannot be read" in error
                    assert not trace.exists()


@pytest.mark.parametrize("name", ["x.pt", "ViT-B/33", "./ViT-B/32", "hf_clip:a/b", "nm:a/b", "ja_clip:a/b", "",
                                  "openai_clip:ViT-B/32", "OPEN_CLIP:a/b", "hf-hub:a/b", "ViT-B/32 "])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not taken; name one of OpenAI's"):
        check_clip(name)


@pytest.mark.parametrize(("name", "message"), [
    ("open_clip:hf-hub:a/b", "is unknown to open_clip"), ("open_clip:", "is unknown to open_clip"),
    ("open_clip:ViT-B-32", "names no file"), ("open_clip:ViT-B-32/", "names no file"),
    ("open_clip:ViT-B-32/openai", "does not exist"), ("open_clip:ViT-B-32/laion2b_s34b_b79k", "does not exist"),
    ("open_clip:ViT-B-32/.", "is a folder"),
    ("open_clip:roberta-ViT-B-32/x", "from a hub"), ("open_clip:ViT-B-16-SigLIP/x", "from a hub"),
    ("open_clip:ViT-H-14-CLIPA/x", "from a hub")])
def test_architectures_and_files_that_are_not_here(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_clip(name)


def test_openais_own_names_are_taken() -> None:
    assert [check_clip(name) for name in clip_model.OPENAI] == list(clip_model.OPENAI)


@pytest.mark.parametrize(("change", "message"), [
    ({"text_cfg": {"hf_model_name": "a/b"}}, "takes hf_model_name from a hub"),
    ({"text_cfg": {"hf_tokenizer_name": "a/b"}}, "takes hf_tokenizer_name from a hub"),
    ({"vision_cfg": {"timm_model_name": "resnet50", "timm_model_pretrained": True}}, "takes timm_model_pretrained"),
    ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "takes timm_model_name from a hub"),
    ({"text_cfg": 5}, "is no open_clip model configuration"), ({"embed_dim": None}, "is no open_clip"), ])
def test_an_architecture_may_name_no_hub(change: dict, message: str, tmp_path: Path) -> None:
    content = {key: value for key, value in (ARCHITECTURE | change).items() if value is not None}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        register_architecture(tmp_path / "mine.json")
    import open_clip
    assert "mine" not in open_clip.list_models()


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.json", "{", "is no JSON"), ("a.json", "[" * 100_000, "is no JSON"), ("a.json", "[]", "is no open_clip"),
    ("a.json", "\0", "is not UTF-8"), ("siglip.json", json.dumps(ARCHITECTURE), "its tokenizer from a hub"),
    ("a.txt", json.dumps(ARCHITECTURE), "must be called NAME.json")])
def test_a_damaged_architecture_is_said(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        register_architecture(tmp_path / name)


def test_a_file_of_any_container_gives_the_same_clip(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "trained.pt")
    for file in (weights, tmp_path / "trained.pt"):
        same, other = text_similarities(f"open_clip:{NAME}/{file}", "a photo of a red", ["one red thing", "one blue"])
        assert same > 0.95 and other < 0.7
    assert text_similarities(f"open_clip:{NAME}/{weights}", "a", []) == []
    torch.save({key: value for key, value in state.items() if key != "visual.proj"}, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"1 missing \(visual.proj\)"):
        load_clip(f"open_clip:{NAME}/{tmp_path / 'less.pt'}")
