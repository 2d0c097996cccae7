"""What stays the same in a whole fine-tuning run, computed once: VAE posteriors, features of fixed captions."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ldm.data.batches import SeenImage
from ldm.progress import progress
from ldm.words import NEW_WORD


class Posteriors:
    """Mean and log-variance of every image a run will see, mirrored ones apart; fresh samples are drawn from them.

    Each image is encoded by itself, so that its posterior does not depend on what a batch happens to hold.
    """

    def __init__(self, images: Iterable[SeenImage], load: Callable[[SeenImage], Tensor],
                 encode: Callable[[Tensor], Tensor], quiet: bool = True):
        self._moments: dict[SeenImage, Tensor] = {}
        with progress(images, desc="encoding the images", unit="image", quiet=quiet) as bar:
            for seen in bar:
                self._moments[seen] = encode(load(seen)).cpu()

    def __len__(self) -> int:
        return len(self._moments)

    def moments(self, images: Sequence[SeenImage]) -> Tensor:
        """Returns (B, 2C, h, w) mean and log-variance, stacked over channels, on the CPU."""
        return torch.stack([self._moments[seen] for seen in images])


class CaptionFeatures:
    """Text features in which what cannot learn is encoded once: captions without new words."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor]):
        self._encode = encode
        self._fixed: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Returns features (B, T, D); gradients reach the new words as they would without this class."""
        # Their words move with every step.
        learned = list(filter(NEW_WORD.search, captions))
        features = []
        fresh = iter(self._encode(learned) if learned else ())     # (B', T, D), in the captions' order
        for caption in captions:
            features.append(next(fresh) if NEW_WORD.search(caption) else self._known(caption))
        return torch.stack(features)

    @torch.no_grad()
    def _known(self, caption: str) -> Tensor:
        if caption not in self._fixed:
            self._fixed[caption] = self._encode([caption])[0]
        return self._fixed[caption]


def castable(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the frozen weights of linear and convolutional layers, which autocast would cast in every step."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield from (parameter for parameter in layer.parameters(recurse=False) if not parameter.requires_grad)


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keeps frozen weights in the format autocast computes them in.

    What autocast casts in every step is then cast once, to the same values; trained tensors and normalization stay.
    """
    for parameter in castable(module):
        parameter.data = parameter.data.to(dtype)     # in place: optimizer and hooks hold the parameter itself
