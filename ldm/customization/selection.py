"""Which of the network's tensors a method trains; the only file that knows their names."""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.util import UserError

UNET_PREFIX = "model.diffusion_model."
PATTERNS = {
    "crossattn-kv": r"transformer_blocks\.\d+\.attn2\.to_[kv]\.weight$",
    "crossattn": r"transformer_blocks\.\d+\.attn2\.",
    "none": r"(?!)",     # matches nothing: words alone are learned
}


def trained_parameters(unet: nn.Module, selection: str) -> dict[str, nn.Parameter]:
    """Returns the U-Net's trained parameters by their names inside it.

    Raises:
        UserError: `selection` is not one of "crossattn-kv", "crossattn", "none".
    """
    parameters = dict(unet.named_parameters())
    return {name: parameters[name] for name in selected(parameters, selection)}


def selected(names: Iterable[str], selection: str) -> list[str]:
    """Returns those of the U-Net's names that a selection means, in their order.

    Raises:
        UserError: `selection` is not one of "crossattn-kv", "crossattn", "none".
    """
    if selection not in PATTERNS:
        raise UserError(f"method.train '{selection}' is unknown; use one of {', '.join(PATTERNS)}.")
    pattern = re.compile(PATTERNS[selection])
    return [name for name in names if pattern.search(name)]


@contextmanager
def stopped_first_token(unet: nn.Module) -> Iterator[None]:
    """Lets no gradient through keys and values of the start token, as Custom Diffusion trains."""
    def stop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)              # (B, T, C)

    layers = [module for name, module in unet.named_modules() if re.search(r"\.attn2\.to_[kv]$", name)]
    handles = [layer.register_forward_hook(stop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
