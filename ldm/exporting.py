"""One export from a concept to files: what each form needs of the base, and the writing."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.base import build_model, empty_model
from ldm.checkpoint import SCHEDULE_BUFFERS, named
from ldm.config import SampleConfig
from ldm.convert.single_file import to_half
from ldm.customization import low_rank
from ldm.customization.delta import AppliedConcept, Concept, check_base
from ldm.customization.export import Exported, as_diff, as_lora, as_processors, beyond_half, embeddings
from ldm.customization.selection import selected
from ldm.saving import save_safetensors
from ldm.util import UserError


def write_export(concept: Concept, form: str, name: str, outdir: Path, config: SampleConfig | DictConfig,
                 rank: int | None = None, error: float = 0.05) -> list[Path]:
    """Writes a concept for other tools and returns the files, the main one first.

    Args:
        form: lora, diff, embedding, diffusers or ckpt.
        config: says which base; its weights are read where the form or the concept needs them.
        rank, error: of a LoRA.

    Raises:
        UserError: a file is there already, the concept is of another base or changes more than the form can say, or a
            value has no half precision.
    """
    check_model(concept, config)
    whole = form in ("diffusers", "ckpt")
    model, base = None, {}
    if whole or (concept.weights and form != "embedding"):
        model, identity = build_model(config.model, config.base)
        check_base(concept, identity, config.base.any_base)
        base = dict(model.model.diffusion_model.named_parameters())
    res_blocks = OmegaConf.select(config.model, "params.unet_config.params.num_res_blocks")
    files: dict[str, Exported] = {}
    if form == "lora":
        found = low_rank.spectra(concept, base)
        ranks = low_rank.by_rank(found, rank) if rank else low_rank.by_error(found, error)
        if not any(ranks.values()):
            raise UserError(f"a LoRA that may leave out {error:g} of what was learned is empty; give a lower --error.")
        files[name] = as_lora(concept, found, ranks, res_blocks)
    elif form == "diff":
        files[f"{name}-diff"] = as_diff(concept, low_rank.differences(concept, base), res_blocks)
    elif form == "diffusers":
        learned = low_rank.differences(concept, base)
        others = learned.keys() - set(selected(base, "crossattn-kv"))
        if others:
            raise UserError(f"the concept changes more than K/V ({named(sorted(others))}), which diffusers' Custom "
                            "Diffusion weights cannot say; export it --to diff or --to ckpt.")
        processors = as_processors(learned, base, res_blocks)
    words = embeddings(concept, name)
    lost = [key for file in files.values() for key in beyond_half(file.tensors)]
    if lost:
        raise UserError(f"half precision cannot hold '{lost[0]}'; the concept is damaged, or was trained too hot.")
    main = {"diffusers": outdir / f"{name}-custom_diffusion.safetensors", "ckpt": outdir / f"{name}-model.safetensors"}
    targets = [*([main[form]] if whole else []), *(outdir / f"{key}.safetensors" for key in [*files, *words])]
    for target in targets:
        if target.exists():
            raise UserError(f"'{target}' exists already; remove it first, or choose another folder with --outdir.")
    if form == "diffusers":
        save_safetensors(main[form], processors)
    elif form == "ckpt":
        AppliedConcept(model, concept, identity, config.base.any_base)
        save_safetensors(main[form], _without_words(model.state_dict()), {"format": "pt"})
    for key, file in {**files, **words}.items():
        save_safetensors(outdir / f"{key}.safetensors", file.tensors, file.metadata)
    return targets


def check_model(concept: Concept, config: SampleConfig | DictConfig) -> None:
    """Refuses a concept of another model than the configuration's: its layers would get other layers' names."""
    wrong = concept.misfits(dict(empty_model(config.model).model.diffusion_model.named_parameters()))
    if wrong:
        raise UserError(f"the concept's '{wrong[0]}' is none of this model's; name its model's configuration with -b, "
                        "such as configs/sample-sd-v1.yaml.")


def _without_words(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's weights in half precision; rows of new words have no place in other tools' models."""
    kept = {}
    for key, value in state.items():
        if ".token_embedding.extra" not in key:
            kept[key] = value if key in SCHEDULE_BUFFERS else to_half(key, value)
    return kept
