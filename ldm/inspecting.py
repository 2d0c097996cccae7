"""Carries out `scripts/train.py --inspect`: what a run would see of its pictures, without building the model."""
from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.data.images import CROPS, Framing, check_colour
from ldm.data.inspection import inspect_sets
from ldm.util import UserError

SIDE = 512     # of SD v1, where the model's configuration does not tell


def side_of(config: DictConfig) -> int:
    """Returns the side in px of the pictures a run trains on, read off the model's configuration."""
    if config.trainer.image_size is not None:
        return config.trainer.image_size
    latent = OmegaConf.select(config, "model.params.image_size")
    levels = OmegaConf.select(config, "model.params.first_stage_config.params.ddconfig.ch_mult")
    return latent * 2 ** (len(levels) - 1) if isinstance(latent, int) and levels else SIDE


def inspect_run(config: DictConfig, folder: Path) -> None:
    """Writes contact sheets and the table of files of every concept and its regularisation set, and prints the gist.

    Raises:
        UserError: no pictures are configured or usable, or the disk refuses.
    """
    data = config.data
    if data.crop not in CROPS:
        raise UserError(f"data.crop '{data.crop}' is unknown; use one of {', '.join(CROPS)}.")
    sets = []
    for index, concept in enumerate(config.concepts):
        if OmegaConf.is_missing(concept, "images"):
            raise UserError(f"concepts.{index}.images is not set; give --datapath.")
        sets.append((concept.name, Path(concept.images)))
        if concept.regularization is not None and data.reg.mode in (None, "folder"):
            sets.append((f"{concept.name}, regularisation", Path(concept.regularization)))
    if not sets:
        raise UserError("no concept is configured; give --datapath.")
    framing = Framing(side_of(config), data.crop, check_colour(data.background), data.alpha_mask)
    report = inspect_sets(sets, framing, folder, config.method.flip)
    for line in report.lines:
        print(line)
    print(f"table:  {report.table}")
    for path in report.sheets:
        print(f"sheet:  {path}")
