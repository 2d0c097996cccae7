"""A clip-retrieval index of your own pictures: built from a folder or a list of addresses, served on loopback."""
from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ldm.data.clip_client import MISSING, SETUP
from ldm.data.download import Downloader
from ldm.data.images import Unusable, decode
from ldm.data.layouts import captioned
from ldm.data.picture_store import PictureStore, shrunk
from ldm.data.regularization import save_jpeg
from ldm.files import write_atomically
from ldm.text import read_lines
from ldm.util import UserError

DESCRIPTION = "index.json"      # written last: a folder without it is unfinished
BATCH = 32


@dataclass(frozen=True)
class Built:
    """A finished index: its folder, how many pictures it finds, why others were left out."""

    folder: Path
    pictures: int
    skipped: list[str]


def _library() -> ModuleType:
    """Imports the module of clip-retrieval's back end, quietly; the package hides it behind a function of its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("clip_retrieval.clip_back")
    except ImportError as error:
        raise UserError(f"{MISSING} that works ({error}); {SETUP}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' progress reports to themselves."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def register_architecture(path: Path) -> str:
    """Teaches open_clip the architecture a JSON file describes, and returns its name: the file's.

    Raises:
        UserError: the file is missing or describes none.
    """
    import open_clip
    if not path.is_file():
        raise UserError(f"CLIP architecture '{path}' does not exist; give open_clip's model configuration as JSON.")
    open_clip.add_model_config(path)
    if path.stem not in open_clip.list_models():
        raise UserError(f"'{path}' is no open_clip model configuration (embed_dim, vision_cfg, text_cfg).")
    return path.stem


def check_clip(name: str) -> str:
    """Returns a CLIP's name as clip-retrieval takes it, its file made absolute.

    Raises:
        UserError: the file or the architecture does not exist.
    """
    if not name.startswith("open_clip:"):
        return name
    import open_clip
    architecture, _, checkpoint = name.removeprefix("open_clip:").partition("/")
    if architecture not in open_clip.list_models():
        raise UserError(f"CLIP architecture '{architecture}' is unknown to open_clip; register it with --clip_config.")
    if checkpoint in open_clip.list_pretrained_tags_by_model(architecture):
        return name
    if not Path(checkpoint).is_file():
        raise UserError(f"CLIP file '{checkpoint}' does not exist; write --clip open_clip:{architecture}/FILE.")
    return f"open_clip:{architecture}/{Path(checkpoint).absolute()}"


@cache
def load_clip(name: str) -> tuple[Any, Any]:
    """Returns a CLIP and its tokenizer.

    Raises:
        UserError: it cannot be had.
    """
    name = check_clip(name)
    _library()
    from all_clip import load_clip as load
    try:
        with _quiet():
            model, _, tokenizer = load(name, use_jit=False, device="cpu")
    except Exception as error:    # each library below raises its own
        raise UserError(f"CLIP '{name}' cannot be loaded ({_first_line(error)}); give one as a local file, "
                        "--clip open_clip:NAME/FILE.") from error
    return model, tokenizer


def text_similarities(clip: str, target: str, texts: Sequence[str]) -> list[float]:
    """Returns the cosine in [-1, 1] of each text with `target`, seen by a CLIP's text encoder."""
    import torch
    model, tokenizer = load_clip(clip)
    parts = []
    with torch.no_grad():
        for start in range(0, len(texts) + 1, BATCH):
            features = model.encode_text(tokenizer([target, *texts[start:start + BATCH]]))           # (1 + B, D)
            features = features / features.norm(dim=-1, keepdim=True)
            parts.append(features[1:] @ features[0])                                                 # (B,)
    return torch.cat(parts).tolist()


def build_index(source: str | Path, folder: Path, clip: str, downloader: Downloader | None = None,
                say: Callable[[str], None] = print) -> Built:
    """Builds a clip-retrieval index that `IndexServer` serves; stopped at any moment, it goes on where it was.

    Args:
        source: any layout `ldm.data.layouts.captioned` reads, or a text file of web addresses, one per line, each
            with a caption after a tab if there is one.
        folder: gets pictures/ (copies, small enough to serve), metadata/, image.index and index.json.
        clip: a CLIP as clip-retrieval names it: "ViT-B/32", or "open_clip:NAME/FILE" for a local file.

    Raises:
        UserError: there is no picture, the CLIP cannot be loaded, the folder holds another index, the disk refuses.
    """
    folder, clip = Path(folder), check_clip(clip)
    if (folder / DESCRIPTION).exists():
        raise UserError(f"'{folder}' holds an index already; serve it, or choose another --out.")
    load_clip(clip)                     # a wrong name should cost no time
    rows, skipped = _collect(source, folder / "pictures", downloader, say)
    if not rows:
        raise UserError(f"'{source}' gives no usable picture ({'; '.join(skipped[:3]) or 'it is empty'}); name a "
                        "folder of pictures or a list of web addresses.")
    say(f"embedding {len(rows)} pictures with {clip.partition('/')[0]}")
    _embed(folder, clip)
    _write_metadata(folder, rows)
    _build_faiss(folder)
    shutil.rmtree(folder / "embeddings")
    content = json.dumps({"name": folder.name, "clip": clip, "pictures": len(rows)}, indent=1)
    write_atomically(folder / DESCRIPTION, lambda part: part.write_text(content + "\n", encoding="utf-8"))
    return Built(folder, len(rows), skipped)


def _collect(source: str | Path, pictures: Path, downloader: Downloader | None,
             say: Callable[[str], None]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Copies every usable picture; returns {file name: (caption, url)} and what was left out, in words."""
    addresses = _addresses(Path(source))
    if addresses:
        store = PictureStore(pictures, pictures.with_name(".fetched.log"), downloader or Downloader(), say=say)
        store.fetch([(number, url) for number, (url, _) in enumerate(addresses)])
        rows = {store.path(number).name: (caption, url) for number, (url, caption) in enumerate(addresses)
                if number not in store.reasons}
        return rows, [f"'{addresses[number][0]}' {reason}" for number, reason in store.reasons.items()]
    found = captioned(Path(source))
    rows, skipped = {}, [str(item) for item in found.skipped]
    for number, (path, caption) in enumerate(zip(found.paths, found.captions, strict=True)):
        copy = pictures / f"{number:05d}.jpg"
        try:
            if not copy.exists():
                save_jpeg(shrunk(decode(path).image), copy)
        except Unusable as problem:
            skipped.append(f"'{path.name}' {problem}")
            continue
        rows[copy.name] = (caption or "", "")
    return rows, skipped


def _addresses(source: Path) -> list[tuple[str, str]]:
    """Returns the (url, caption) pairs of a list of web addresses; none where `source` is something else."""
    if not source.is_file() or source.suffix.lower() not in (".txt", ".tsv", ".list"):
        return []
    lines = [line.partition("\t") for line in read_lines(source, "list") if line]
    if not lines or not lines[0][0].startswith(("http://", "https://")):
        return []
    return [(url.strip(), " ".join(caption.split())) for url, _, caption in lines]


def _embed(folder: Path, clip: str) -> None:
    """Lets clip-retrieval turn pictures/ into unit vectors (N, D) float16 in embeddings/."""
    _library()
    with _quiet():
        from clip_retrieval.clip_inference.worker import worker
        shutil.rmtree(folder / "embeddings", ignore_errors=True)
        worker(tasks=[0], input_dataset=str(folder / "pictures"), output_folder=str(folder / "embeddings"),
               output_partition_count=1, batch_size=BATCH, num_prepro_workers=0, enable_text=False,
               enable_metadata=False, clip_model=clip, use_jit=False)


def _write_metadata(folder: Path, rows: dict[str, tuple[str, str]]) -> None:
    """Writes metadata/: image_path (below the index's folder), caption and url of every vector, in their order."""
    import pandas
    (source,) = (folder / "embeddings" / "metadata").glob("*.parquet")
    names = [Path(path).name for path in pandas.read_parquet(source)["image_path"]]
    table = pandas.DataFrame({"image_path": [f"pictures/{name}" for name in names],
                              "caption": [rows[name][0] for name in names], "url": [rows[name][1] for name in names]})
    write_atomically(folder / "metadata" / "metadata_0.parquet", table.to_parquet)


def _build_faiss(folder: Path) -> None:
    """Builds image.index, exact over unit vectors (N, D); clip-retrieval's own builder forks and may never return."""
    import faiss
    (source,) = (folder / "embeddings" / "img_emb").glob("*.npy")
    vectors = np.load(source).astype(np.float32)                                                     # (N, D)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    write_atomically(folder / "image.index", lambda part: faiss.write_index(index, str(part)))


class _MovableMetadata:
    """clip-retrieval's metadata with picture paths seen from the index's folder, which may have been moved."""

    def __init__(self, provider: Any, folder: Path):
        self.provider, self.folder = provider, folder.absolute()

    def get(self, ids: Sequence[int], cols: Sequence[str] | None = None) -> list[dict[str, Any]]:
        return [entry | {"image_path": str(self.folder / entry["image_path"])} if "image_path" in entry else entry
                for entry in self.provider.get(ids, cols)]


class IndexServer:
    """Serves an index on this machine alone, with clip-retrieval's own services; use it as a context, or `run` it.

    Args:
        folder: what `build_index` made.
        port: 0 takes a free one.
        clip: another path of the CLIP it was built with, if that has moved.

    Raises:
        UserError: there is no index, its CLIP is gone, or the port is taken.
    """

    def __init__(self, folder: Path, port: int = 1234, clip: str | None = None):
        description = Path(folder) / DESCRIPTION
        try:
            content = json.loads(description.read_text(encoding="utf-8"))
            name, clip = content["name"], clip or content["clip"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"'{folder}' holds no finished index; build one with scripts/retrieve.py index.") from error
        load_clip(clip)
        from werkzeug.serving import make_server
        logging.getLogger("werkzeug").setLevel(logging.WARNING)     # a line per request helps nobody here
        try:
            with _quiet():
                self._server = make_server("127.0.0.1", port, _application(Path(folder), name, check_clip(clip)),
                                           threaded=True)
        except SystemExit as error:     # werkzeug's way of saying that the port is taken
            raise UserError(f"port {port} is taken; choose another with --port.") from error
        self.folder, self.name, self.url = Path(folder), name, f"http://127.0.0.1:{self._server.server_port}"

    def run(self) -> None:
        """Serves until interrupted."""
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()

    def __enter__(self) -> IndexServer:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _application(folder: Path, name: str, clip: str) -> Any:
    """Puts clip-retrieval's services together as its `clip back` does, which listens on every network interface."""
    back = _library()
    from flask import Flask
    from flask_restful import Api
    given = {"indice_folder": str(folder), "clip_model": clip,
             "columns_to_return": ["url", "image_path", "caption"]}
    options = back.ClipOptions(**dict.fromkeys((field.name for field in dataclasses.fields(back.ClipOptions)), False)
                               | given)
    resource = back.load_clip_index(options)
    resource.metadata_provider = _MovableMetadata(resource.metadata_provider, folder)
    application = Flask(__name__)
    api = Api(application)
    services = {"clip_resources": {name: resource}}
    api.add_resource(back.KnnService, "/knn-service", resource_class_kwargs=services)
    api.add_resource(back.MetadataService, "/metadata", resource_class_kwargs=services)
    api.add_resource(back.IndicesList, "/indices-list", resource_class_kwargs={"indices": [name]})
    return application


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:150]
