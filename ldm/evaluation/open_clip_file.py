"""CLIPs of open_clip's architectures from local files, of which nothing is run."""
from __future__ import annotations

import zipfile
from pathlib import Path

from torch import nn

from ldm.checkpoint import existing_file, load_state, load_weights
from ldm.util import UserError

OPENAI_EXTRA = ("input_resolution", "context_length", "vocab_size")    # what OpenAI's files hold beside the weights


def read_open_clip(path: Path, architecture: str, title: str) -> nn.Module:
    """Builds one of open_clip's architectures with the weights of a file, of which nothing is run.

    Args:
        title: what the weights are, for messages.

    Raises:
        UserError: the file is missing, damaged, a program, or does not fit the architecture.
    """
    import open_clip
    path = existing_file(path, f"{title} weights")
    if zipfile.is_zipfile(path) and any("/code/" in entry for entry in zipfile.ZipFile(path).namelist()):
        raise UserError(f"'{path}' is a TorchScript program, which is not run here; get {title} as .safetensors.")
    state = {key.removeprefix("module."): value for key, value in load_state(path, f"{title} weights").items()}
    model = open_clip.create_model(architecture, pretrained=None)
    load_weights(model, state, path, OPENAI_EXTRA)
    return model
