"""Reads tensors safely: .ckpt or .safetensors told apart by content, mismatches reported in words."""
from __future__ import annotations

import hashlib
import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.util import UserError

# What a released SD v1 file holds beside the 1130 weights: a buffer of positions and the EMA's bookkeeping.
# (Its 12 schedule buffers have a place in the model; they are recomputed from the configuration.)
ACCEPTED_EXTRA = ("cond_stage_model.transformer.text_model.embeddings.position_ids",
                  "model_ema.decay", "model_ema.num_updates")
SCHEDULE_BUFFERS = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
                    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
                    "posterior_mean_coef1", "posterior_mean_coef2")

AVERAGE = "model_ema."
OPTIONAL_KEYS = (*ACCEPTED_EXTRA, *SCHEDULE_BUFFERS)

HUB_NAME = r"[\w.-]+/[\w-]+(\.\d[\w-]*)*"    # "CompVis/stable-diffusion-v1-4", "owner/model-2.1"; no suffix of a file
MOST_REPEATED = 10 ** 9                      # bytes
BATCH_BYTES = 256 * 2**20                    # of a mapped file, cast before its pages are let go

_globals_lock = threading.Lock()  # torch's list of allowed globals is one per process


def _inert(module: str, name: str) -> type:
    """Makes an empty class that stands in for one a pickle only names."""
    return type(name, (), {"__module__": module, "__qualname__": name})


def _allowed_globals() -> list[Any]:
    """Names a released SD v1 checkpoint mentions beside tensors: a Lightning callback and numpy scalars.

    And the table of words in Textual Inversion's files, of which its parameters alone are read.
    """
    import _codecs

    import numpy
    import numpy.core.multiarray as multiarray  # importable under this name in numpy 1 and 2
    scalar = multiarray.scalar
    return [_inert("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
            _inert("torch.nn.modules.container", "ParameterDict"),
            (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"),
            numpy.dtype, type(numpy.dtype("float64")), type(numpy.dtype("int64")), type(numpy.dtype("float32")),
            (_codecs.encode, "_codecs.encode")]


@contextmanager
def _restricted_globals() -> Iterator[None]:
    with _globals_lock, torch.serialization.safe_globals(_allowed_globals()):
        yield


def is_safetensors(path: Path) -> bool:
    """Says whether a file starts as safetensors does: a header length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def existing_file(path: str | os.PathLike[str], what: str = "checkpoint") -> Path:
    """Returns `path`, or refuses in words when no file is there or it is empty."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} '{path}' {_why_no_file(path)}")
    if path.stat().st_size == 0:
        raise UserError(f"{what} '{path}' is empty; copy or download it again.")
    return path


def _why_no_file(path: Path) -> str:
    """Says what a path is that is no file."""
    if (path / "model_index.json").exists():
        return "is a folder in diffusers' layout; give the single file of that model, such as sd-v1-4.ckpt."
    if path.is_dir():
        return "is a folder; give the path of a file."
    if re.fullmatch(HUB_NAME, str(path)) and not path.parent.exists():
        return ("does not exist; it looks like the name of a model on a hub, and nothing is fetched from there: "
                "download the single file, such as sd-v1-4.ckpt, and give its path.")
    return "does not exist; give the path of the file."


def load_file(path: str | os.PathLike[str], what: str = "checkpoint") -> dict[str, Any]:
    """Reads a .safetensors or pickled file without running any code from it.

    Zipped pickles are memory-mapped. Returns a dict of tensors (safetensors), or whatever the pickle holds.

    Raises:
        UserError: the file is missing, truncated, of another kind, or names code that is not tensor data.
    """
    path = existing_file(path, what)
    try:
        if is_safetensors(path):
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        content = _unpickle(path)     # names are looked up in a closed list; no code runs
    except SafetensorError as error:
        raise UserError(f"{what} '{path}' is damaged ({error}); copy or download it again.") from error
    except Exception as error:  # torch raises many kinds for a bad file; each becomes one sentence
        raise UserError(f"{what} '{path}' {_why_refused(path, error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} '{path}' holds a {type(content).__name__} where a table of tensors was expected.")
    for tensor in _tensors(content):     # sizes a file claims cost nothing until they are used
        if not _is_whole(tensor):
            raise UserError(f"{what} '{path}' is refused: it claims tensors whose values it does not hold (of shape "
                            f"{tuple(tensor.shape)}); get it again, from a source you trust.")
    return content


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yields the tensors of a pickle's content, however they are nested."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))          # a pickle may hold itself
            waiting += value.values() if isinstance(value, dict) else value


def _is_whole(tensor: Tensor) -> bool:
    """Says whether a tensor holds its values, as weights do: one that repeats a few may claim no more than a GB."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), MOST_REPEATED)


def is_mapped(path: Path) -> bool:
    """Says whether the tensors `load_file` makes of a file stay in it, and take memory only where they are read.

    A pickle called .safetensors is read instead: torch 2.15 hands any path of that name to another reader.
    """
    return is_safetensors(path) or (zipfile.is_zipfile(path) and not path.name.endswith(".safetensors"))


def _unpickle(path: Path) -> Any:
    """Reads a pickle of tensors, zipped or not, whatever its name."""
    with _restricted_globals(), path.open("rb") as file:
        mapped = is_mapped(path)
        return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)


def _why_refused(path: Path, error: Exception) -> str:
    """Says why torch would not read a pickled file."""
    names: list[str] = []
    if zipfile.is_zipfile(path):     # torch lists the names of zipped pickles alone
        try:
            with _restricted_globals():
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # the file is too damaged to be listed; the sentence below says so
            names = []
    names = names or re.findall(r"GLOBAL (\S+)", str(error))
    if not names and isinstance(error, pickle.UnpicklingError):
        names = _named_globals(path)  # torch stopped at an instruction before it saw any name
    if names:
        return (f"is refused: its pickle names code that is not tensor data ({', '.join(sorted(names)[:5])}); "
                "get the file as .safetensors, or from a source you trust.")
    return f"cannot be read ({type(error).__name__}: it is truncated or no checkpoint); copy or download it again."


def _named_globals(path: Path) -> list[str]:
    """Lists what a bare pickle would import, by reading its instructions without carrying them out."""
    names: list[str] = []
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for instruction, argument, _ in pickletools.genops(file):
                if instruction.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif instruction.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # no pickle at all: then it names nothing
        return []
    return names


def unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the innermost `state_dict` of a file's content that holds something; Lightning and others wrap it."""
    inner = content.get("state_dict")
    return unwrapped(inner) if isinstance(inner, dict) and inner else content


def averages_alone(names: Iterable[str]) -> bool:
    """Says whether a file holds its U-Net as averaged weights only (`model_ema.*`, under names without dots)."""
    averaged = any(name.startswith(f"{AVERAGE}diffusion_model") for name in names)
    return averaged and not any(name.startswith("model.diffusion_model.") for name in names)


def load_state(path: str | os.PathLike[str], what: str = "checkpoint") -> dict[str, Tensor]:
    """Reads the state dict of a file, unwrapped; it must hold tensors and nothing else."""
    state = unwrapped(load_file(path, what))
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{what} '{path}' holds no state dict: neither tensors nor a 'state_dict' of tensors.")
    return dict(state)


def named(names: Iterable[str], most: int = 3) -> str:
    """Lists the first names and how many more there are."""
    names = list(names)
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuses tensors with a NaN or an infinity, by name; `what` says whose they are: "concept file 'x'".

    Raises:
        UserError: a value is not finite.
    """
    wrong = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if wrong:
        raise UserError(f"{what} has values that are not finite, in {named(wrong)}; use one of an earlier step, or "
                        "train again with a smaller method.learning_rate.")


def describe_mismatch(model: nn.Module, state: Mapping[str, Tensor], accepted: Iterable[str] = ()) -> str:
    """Says in words how `state` differs from what `model` expects; empty where it does not."""
    expected, accepted = model.state_dict(), set(accepted)
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "of another shape": [],
                                   "not of floating-point numbers": []}
    for key, value in expected.items():
        if key not in state:
            if key not in accepted:
                wrong["missing"].append(key)
            continue
        found = state[key]
        if found.shape != value.shape:
            wrong["of another shape"].append(f"{key} {tuple(found.shape)} instead of {tuple(value.shape)}")
        if value.is_floating_point() and not found.is_floating_point():
            wrong["not of floating-point numbers"].append(f"{key} of {found.dtype}")
    for key in state:
        if key not in expected and key not in accepted:
            wrong["unexpected"].append(key)
    return "; ".join(f"{len(keys)} {problem} ({named(keys)})" for problem, keys in wrong.items() if keys)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike[str],
                 accepted: Iterable[str] = OPTIONAL_KEYS, assign: bool = False) -> None:
    """Loads `state` into `model`, complete and exact but for the `accepted` keys, or refuses in words.

    `model_ema.*` copies are left out unless the model keeps an EMA itself. The schedule stays the model's own.
    `assign` makes the state's tensors the model's instead of copying them, as a model built on the meta device
    needs; memory-mapped ones then occupy memory once, and only where they are used. They keep their formats, which
    `cast_weights` changes.

    Raises:
        UserError: keys are missing, unexpected or of another shape.
    """
    accepted = set(accepted)
    own = model.state_dict()     # the model's own values stay where the file has none
    state = dict(state)
    for key in list(state):
        if key not in own and (key.startswith(AVERAGE) or key in accepted):
            del state[key]
    problem = describe_mismatch(model, state, accepted)
    if problem:
        raise UserError(f"'{source}' does not fit this architecture: {problem}; check that the model configuration "
                        "belongs to this checkpoint.")
    for key, value in state.items():
        if key not in SCHEDULE_BUFFERS:       # these are the configuration's
            own[key] = value
    model.load_state_dict(own, assign=assign)


def cast_weights(model: nn.Module, wanted: Callable[[str], torch.dtype],
                 read: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
    """Puts a model's floating weights into other formats in little memory beyond the result.

    Args:
        wanted: the format of a weight by its name.
        read: reads the weights once more, where the model's are mapped from a file. Pages of a file leave memory only
            with their mapping, so every batch is cast from a mapping of its own. None: the model's tensors are cast.
    """
    bytes_of = {}
    for key, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != wanted(key):
            bytes_of[key] = value.nbytes
    for keys in _batches(bytes_of):
        source = read() if read else model.state_dict()
        # Not strict: a batch is a part of the model's own keys, and what it lacks stays as it is.
        model.load_state_dict({key: source[key].to(wanted(key)) for key in keys}, strict=False, assign=True)


def _batches(bytes_of: Mapping[str, int]) -> Iterator[list[str]]:
    """Divides names into runs of about BATCH_BYTES."""
    batch, size = [], 0
    for key, count in bytes_of.items():
        batch.append(key)
        size += count
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_metadata(path: str | os.PathLike[str], what: str = "file") -> dict[str, str]:
    """Reads the text metadata of a safetensors file; empty where there is none."""
    path = existing_file(path, what)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{what} '{path}' is damaged ({error}); copy or download it again.") from error


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Returns 16 hex digits naming a set of weights, whatever file, order or container they came in."""
    digest = hashlib.sha256()     # over names, shapes, formats and bytes
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
