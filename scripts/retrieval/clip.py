"""CLIPs that compare captions and find images: named in one of two ways, read without running anything of theirs."""
from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import existing_file
from ldm.evaluation.open_clip_file import read_open_clip
from ldm.records import load_json
from ldm.util import UserError

OPENAI = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
PREFIX = "open_clip:"
HOW = f"name one of OpenAI's ({', '.join(OPENAI)}) or a local file, {PREFIX}ARCHITECTURE/FILE"
BATCH = 32


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP.

    Attributes:
        prepare: an image to an input (3, h, w).
        tokenize: texts to tokens (N, L).
    """

    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit vectors (N, D) float32."""
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenize(list(texts[start:start + BATCH])).to(self.device)
            parts.append(self._unit(self.model.encode_text(tokens)))
        return torch.cat(parts)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit vectors (N, D) float32."""
        inputs = torch.stack([self.prepare(image) for image in images]).to(self.device)      # (N, 3, h, w)
        return self._unit(self.model.encode_image(inputs))

    def _unit(self, features: Tensor) -> Tensor:
        features = features.float().cpu()
        return features / features.norm(dim=-1, keepdim=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps other packages' progress reports to themselves."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def register_architecture(path: Path) -> str:
    """Tells open_clip of the architecture a JSON file describes, and returns its name: the file's.

    Raises:
        UserError: the file is missing, describes none, or one with parts that lie on a hub.
    """
    import open_clip
    content = load_json(path, "CLIP architecture")
    described = isinstance(content, dict) and "embed_dim" in content
    for part in ("vision_cfg", "text_cfg"):
        described = described and isinstance(content.get(part), dict)
    if not described:
        raise UserError(f"'{path}' is no open_clip model configuration (embed_dim, vision_cfg, text_cfg).")
    _refuse_hub(path.stem, content)
    if path.suffix != ".json":          # open_clip would pass it over
        raise UserError(f"CLIP architecture '{path}' must be called NAME.json; NAME is then the architecture's.")
    open_clip.add_model_config(path)
    return path.stem


def _refuse_hub(name: str, content: dict[str, Any]) -> None:
    """Refuses an architecture of which open_clip would fetch a part, tokenizer or weights from a hub."""
    parts = {**content["vision_cfg"], **content["text_cfg"]}
    asked = []
    for key, value in parts.items():
        if value and (key.startswith("hf_") or key.endswith("_pretrained")):
            asked.append(key)
    if ":" in str(parts.get("timm_model_name", "")):        # as in hf-hub:NAME
        asked.append("timm_model_name")
    if "siglip" in name.lower():                            # open_clip goes by the name there
        asked.append("its tokenizer")
    if asked:
        raise UserError(f"CLIP architecture '{name}' takes {asked[0]} from a hub, and "
                        "nothing is fetched from there; use one of open_clip's own text encoders.")


def check_clip(name: str) -> str:
    """Returns a CLIP's name, its file made absolute.

    Raises:
        UserError: it is named otherwise, or the file or the architecture does not exist.
    """
    if name in OPENAI:
        return name
    if not name.startswith(PREFIX):
        raise UserError(f"CLIP '{name}' is not taken; {HOW}.")
    architecture, file = _parts(name)
    _configuration(architecture)
    if not file:
        raise UserError(f"CLIP '{name}' names no file; write {PREFIX}{architecture}/FILE.")
    return f"{PREFIX}{architecture}/{existing_file(file, 'CLIP file').absolute()}"


def _parts(name: str) -> tuple[str, str]:
    architecture, _, file = name.removeprefix(PREFIX).partition("/")
    return architecture, file


def _configuration(architecture: str) -> None:
    """Refuses an architecture that is unknown, or not whole without a hub."""
    import open_clip
    if architecture not in open_clip.list_models():
        raise UserError(f"CLIP architecture '{architecture}' is unknown to open_clip; register it with --clip_config.")
    _refuse_hub(architecture, open_clip.get_model_config(architecture))


@cache
def load_clip(name: str, device: str = "cpu") -> Clip:
    """Returns a CLIP.

    Raises:
        UserError: it cannot be had.
    """
    name = check_clip(name)
    load = _load_openai if name in OPENAI else _load_open_clip
    try:
        with quiet():
            return load(name, torch.device(device))
    except UserError:
        raise
    except Exception as error:    # each library below raises its own
        raise UserError(f"CLIP '{name}' cannot be loaded ({first_line(error)}); {HOW}.") from error


def _load_openai(name: str, device: torch.device) -> Clip:
    """Lets all_clip fetch a CLIP from OpenAI, whose checksum it knows."""
    from retrieval.client import MISSING, SETUP
    try:
        from all_clip import load_clip as load
    except ImportError as error:
        raise UserError(f"{MISSING} that works ({error}); {SETUP}.") from error
    model, prepare, tokenize = load(name, use_jit=False, device=str(device))
    return Clip(model.float(), prepare, tokenize, device)


def _load_open_clip(name: str, device: torch.device) -> Clip:
    from open_clip import get_tokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2
    architecture, file = _parts(name)
    model = read_open_clip(Path(file), architecture, "CLIP").to(device).eval().requires_grad_(False)
    prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return Clip(model, prepare, get_tokenizer(architecture), device)


def text_similarities(clip: str, target: str, texts: Sequence[str]) -> list[float]:
    """Returns the cosine in [-1, 1] of each text with `target`, seen by a CLIP's text encoder."""
    if not texts:
        return []
    loaded = load_clip(clip)
    return (loaded.texts(texts) @ loaded.texts([target])[0]).tolist()                               # (N,)


def first_line(error: Exception) -> str:
    """Says what an error of another package is about."""
    return (str(error).splitlines() or [type(error).__name__])[0][:150]
