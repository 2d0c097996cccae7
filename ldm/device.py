"""Where and how a model computes: device, number format, memory layout, compilation, decoding in little memory.

`model` is a `LatentDiffusion` throughout; this file knows no more of it than its parts' names.
"""
from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import UserError

FORMATS = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*FORMATS, "autocast")
# What torch says on a CPU (Linux, Windows), on an Apple GPU or from a CUDA library, and the system on mapping a file.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed", "cannot allocate memory")
DECODER_COPIES = 8       # a decoder's peak, in copies of its finest feature map: 1.07 GB for 512x512 px in float32


def choose_device(name: str) -> torch.device:
    """Turns auto, cpu, cuda or mps (Apple's GPUs) into a device; auto takes a GPU where there is one.

    Raises:
        UserError: a GPU is asked for and absent, or the name is unknown.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])     # in this order: CUDA, Apple's GPUs, the CPU
    kind = name.split(":")[0]     # cuda:1 is a cuda
    if kind not in there:
        raise UserError(f"device '{name}' is unknown; use auto, cpu, cuda or mps.")
    if not there[kind]:
        raise UserError(f"device '{kind}' was asked for but this machine (or this build of torch) has none; use cpu.")
    return torch.device(name)


def supported_precision(name: str, device: torch.device) -> str:
    """Returns `name`, or what this device computes in instead, with a warning that says so.

    Raises:
        UserError: the name is unknown, or asks for float16 on a CPU.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision '{name}' is unknown; use one of {', '.join(PRECISIONS)}.")
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 has no use on a CPU; use bf16 or full.")
    if name == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        warnings.warn("this CPU has no bf16 arithmetic; computing in full precision instead.", stacklevel=2)
        return "full"
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn("this GPU has no bf16 arithmetic; computing in fp16 instead.", stacklevel=2)
        return "fp16"
    if name == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        warnings.warn("bf16 on Apple's GPUs needs macOS 14; computing in fp16 instead.", stacklevel=2)
        return "fp16"
    if name == "autocast" and not torch.amp.is_autocast_available(device.type):
        warnings.warn(f"this torch has no autocast on '{device.type}'; computing in full precision.", stacklevel=2)
        return "full"
    return name


def _cpu_has_bf16() -> bool:
    """Says whether the CPU computes in bf16 itself; builds without mkldnn do not say."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def format_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the format of a model's weight where U-Net and autoencoder are in `dtype`.

    The text encoder stays in float32: it runs once per prompt.
    """
    return dtype if name.startswith(("model.", "first_stage_model.")) else torch.float32


def set_format(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts U-Net and autoencoder into a number format (None keeps theirs) and the memory format that suits it.

    Channels-last wins on GPUs, in half precision, and everywhere in the autoencoder, which is all convolutions; in
    float32 on a CPU the U-Net, whose attention wants rows of pixels, is at least as fast as it is (docs/benchmarks.md).
    On Apple's GPUs, where nothing was measured, all stays as it is.
    """
    unet = model.model.diffusion_model
    weight = next(unet.parameters())
    apple = weight.device.type == "mps"
    plain = apple or (weight.device.type == "cpu" and (dtype or weight.dtype) == torch.float32)
    formats = {True: torch.contiguous_format, False: torch.channels_last}
    unet.to(dtype=dtype, memory_format=formats[plain])
    model.first_stage_model.to(dtype=dtype, memory_format=formats[apple])


def weights_precision(model: nn.Module) -> str:
    """Names the format of the U-Net's weights, bf16 or fp16; full where they are in float32 or of several formats."""
    # One, unless somebody cast a part.
    formats = {value.dtype for value in model.model.diffusion_model.parameters()}
    return next((name for name, dtype in FORMATS.items() if formats == {dtype}), "full")


def autocast_to(precision: str, model: nn.Module, own: str) -> contextlib.AbstractContextManager[Any]:
    """Returns the context to compute in a precision in: none for weights in the format that is asked for.

    Args:
        own: the weights' format, as `weights_precision` names it.

    Raises:
        UserError: the weights are in another half precision already.
    """
    device = model.device
    wanted = supported_precision(precision, device)
    if wanted == own:
        return contextlib.nullcontext()
    if own != "full":
        raise UserError(f"these weights are in {own} and cannot draw in precision {wanted}; load the model again.")
    half = model.model.diffusion_model.dtype
    if wanted == "autocast" and half == torch.float32:
        half = torch.bfloat16 if device.type == "cpu" else torch.float16
    return torch.autocast(device.type, FORMATS.get(wanted, half))


def compile_network(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the U-Net: one graph with DBIM and one without, for any strength, time step and prompt.

    Raises:
        UserError: what the compiler needs on this device is missing.
    """
    on_cpu = model.device.type == "cpu"
    if on_cpu and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("compiling needs a C++ compiler on a CPU, and g++ is not here; install it, or leave out "
                        "--compile.")
    if not on_cpu and importlib.util.find_spec("triton") is None:
        raise UserError("compiling needs the package 'triton' on a GPU; install it, or leave out --compile.")
    model.model.diffusion_model.compile(fullgraph=True, backend=backend)


def available_memory(device: torch.device) -> int | None:
    """Returns the bytes that can be allocated on a device, or None where the system does not say."""
    if device.type == "cuda":
        # Torch keeps what it freed; it can be used again.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    fields = dict(line.split(":") for line in table.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024     # kB


def out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that memory ran out, on a GPU or in the machine."""
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in words for phrase in NO_MEMORY)


@contextlib.contextmanager
def memory_for(images: int) -> Iterator[None]:
    """Turns memory that runs out while so many images are sampled at once into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fewer = "batch_size=1, then " if images > 1 else ""
        raise UserError(f"the memory does not hold {images} image(s) at once; try {fewer}--precision bf16, then a "
                        "smaller --H and --W.") from error


def decode_at_once(model: nn.Module, latents: Tensor, memory: int | None) -> int:
    """Returns how many of the latents (B, C, h, w) fit into half of `memory` bytes while they are decoded."""
    vae = model.first_stage_model
    pixels = latents.shape[2] * latents.shape[3] * vae.encoder.reduction**2     # of an image
    image = DECODER_COPIES * vae.decoder.conv_out.in_channels * pixels * vae.format.itemsize     # bytes
    if memory is None:
        return len(latents)
    return min(len(latents), max(1, memory // (2 * image)))


def decode_latents(model: nn.Module, latents: Tensor, memory: int | None = None) -> Tensor:
    """Decodes latents (B, C, h, w) to images (B, 3, H, W) float32, as many at once as there is memory for.

    A decoder in half precision that overflows is turned to float32, for good, and asked again.

    Args:
        memory: bytes to decode in; None asks the device.

    Raises:
        UserError: the latents, or the images in float32, are not finite.
    """
    if not bool(latents.isfinite().all()):
        raise UserError("the network produced values that are not finite; use --precision full, or a smaller "
                        "guidance scale.")
    if memory is None:
        memory = available_memory(latents.device)
    parts = latents.float().split(decode_at_once(model, latents, memory))     # the U-Net's half precision ends here
    images = torch.cat([model.decode_first_stage(part) for part in parts])
    if bool(images.isfinite().all()):
        return images
    if model.first_stage_model.format == torch.float32:
        raise UserError("the decoder produced values that are not finite; the checkpoint may be damaged.")
    model.first_stage_model.float()     # SD's decoder overflows float16 on some latents
    return decode_latents(model, latents, memory)
