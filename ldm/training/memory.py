"""What a training run needs of a GPU's memory: the estimate before it starts, the advice when it was too little."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ldm.config import MethodConfig, TrainConfig, TrainerConfig
from ldm.customization.feature_cache import cast_frozen, castable
from ldm.customization.selection import trained_parameters
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.util import UserError, instantiate_from_config

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}     # what autocast computes in
GB = 1e9     # as GPUs are sold
RUNTIME = 800_000_000        # CUDA's context, its libraries' workspaces, and what fragmentation wastes


class Tally:
    """Counts the bytes autograd keeps of a forward pass, as a whole and inside blocks that could be recomputed."""

    def __init__(self, network: nn.Module):
        self.outside, self.inside, self.inputs = 0, {}, {}
        self._block: nn.Module | None = None
        self._seen = {_storage(parameter) for parameter in network.parameters()}
        self._kept: list[Tensor] = []               # alive, so that no storage's address is used twice
        for module in network.modules():
            if isinstance(module, (ResBlock, BasicTransformerBlock)):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._block, self.inside[block], self.inputs[block] = block, 0, args[0].nbytes

    def _leave(self, *_: object) -> None:
        self._block = None

    def pack(self, value: Tensor) -> Tensor:
        """Takes a tensor autograd saves; storages that several operations share count once."""
        if _storage(value) not in self._seen:
            self._seen.add(_storage(value))
            self._kept.append(value)
            size = value.untyped_storage().nbytes()
            if self._block is None:
                self.outside += size
            else:
                self.inside[self._block] += size
        return value

    def total(self, checkpointing: bool) -> int:
        """Returns the bytes kept; when blocks are recomputed, their inputs and the largest block at work."""
        blocks = self.inside.values()
        if checkpointing:
            return self.outside + sum(self.inputs.values()) + max(blocks)
        return self.outside + sum(blocks)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def activation_bytes(unet_config: DictConfig, train: str, latents: tuple[int, ...], tokens: int,
                     dtype: torch.dtype | None, checkpointing: bool) -> int:
    """Counts what a training step keeps for its backward pass, by running the network on tensors without memory.

    Args:
        unet_config: the network's `target`/`params`.
        train: what is trained (`method.train`).
        latents: (B, C, h, w) of one micro-step.
        tokens: text positions.
        dtype: what autocast computes in; None is float32 throughout.
        checkpointing: whether activations are recomputed.
    """
    with FakeTensorMode():     # shapes and formats without values: seconds, no memory
        network = instantiate_from_config(unet_config).requires_grad_(False)
        for parameter in trained_parameters(network, train).values():
            parameter.requires_grad_(True)
        network.set_checkpointing(False)     # what it would save is counted from the blocks
        if dtype is not None:
            cast_frozen(network, dtype)
        tally = Tally(network)
        text = torch.zeros(latents[0], tokens, network.context_dim, requires_grad=True)
        with _autocast(dtype), saved_tensors_hooks(tally.pack, lambda value: value):
            network(torch.zeros(latents), torch.zeros(latents[0]), text)
    return tally.total(checkpointing)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a training run needs, by cause."""

    weights: int
    trained: int          # gradients and AdamW's two averages
    activations: int

    @property
    def total(self) -> int:
        """All of it, with what CUDA takes for itself."""
        return self.weights + self.trained + self.activations + RUNTIME

    def __str__(self) -> str:
        return (f"about {self.total / GB:.1f} GB: weights {self.weights / GB:.1f}, gradients and optimizer "
                f"{self.trained / GB:.1f}, activations {self.activations / GB:.1f}, CUDA {RUNTIME / GB:.1f}")


def estimate_memory(config: TrainConfig, model: LatentDiffusion, trained: Sequence[Tensor],
                    size: int) -> MemoryEstimate:
    """Estimates a run's memory for images of `size` px; the VAE is not part of it where `trainer.cache` drops it."""
    method = config.method
    unet = model.model.diffusion_model
    side = size // model.first_stage_model.encoder.reduction
    parts = [unet, model.cond_stage_model]
    if not config.trainer.cache:
        parts.append(model.first_stage_model)
    dtype, checkpointing = MIXED.get(config.trainer.precision), config.trainer.checkpointing
    if checkpointing is None:
        checkpointing = unet.use_checkpoint
    latents = (2 * method.batch_size, model.channels, side, side)      # references and as many class images
    activations = activation_bytes(config.model.params.unet_config, method.train, latents,
                                   model.cond_stage_model.max_length, dtype, checkpointing)
    weights = sum(weights_bytes(part, dtype) for part in parts)
    # Gradients and AdamW's two averages, in float32.
    return MemoryEstimate(weights, 3 * sum(parameter.nbytes for parameter in trained), activations)


def weights_bytes(network: nn.Module, dtype: torch.dtype | None) -> int:
    """Counts a network's weights as training keeps them: frozen ones in what autocast computes in, if it does."""
    total = sum(parameter.nbytes for parameter in network.parameters())
    if dtype is not None:
        for parameter in castable(network):
            total -= parameter.nbytes - parameter.numel() * dtype.itemsize
    return total


def check_memory(config: TrainConfig, model: LatentDiffusion, trained: Sequence[Tensor], size: int) -> None:
    """Prints the estimate where `trainer.memory_gb` says how much there is.

    Raises:
        UserError: the run needs more.
    """
    room = config.trainer.memory_gb
    if room is None:
        return
    need = estimate_memory(config, model, trained, size)
    print(f"memory: {need}; {room:g} GB are there")
    if need.total > room * GB:
        raise UserError(f"the run needs {need}, but trainer.memory_gb is {room:g}; "
                        f"{advice(config.method, config.trainer)}.")


def advice(method: MethodConfig, trainer: TrainerConfig) -> str:
    """Names the overrides that save memory, those that change least first."""
    overrides = []
    if trainer.precision not in MIXED:
        overrides.append("trainer.precision=bf16-mixed")
    if not trainer.cache:
        overrides.append("trainer.cache=true")
    if method.batch_size > 1:      # the same images a step, one by one
        overrides.append(f"method.batch_size=1 method.accumulate={method.batch_size * method.accumulate}")
    if trainer.checkpointing is not True:
        overrides.append("trainer.checkpointing=true")
    overrides.append("a smaller trainer.image_size")
    return f"try {', then '.join(overrides)}"
