"""Stage 6: packs the trained parts into ldm/tiny (SD key layout, fp16)."""
from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_file
from ldm.evaluation.judge import load_judge
from ldm.evaluation.small_clip import pack_small_clip
from ldm.files import write_atomically
from ldm.saving import save_safetensors
from ldm.util import instantiate_from_config


def pack_model(state: Path, config_path: Path, out: Path) -> None:
    """Writes model.safetensors and the latents' scale into the model's YAML file."""
    model = instantiate_from_config(OmegaConf.load(config_path).model)
    model.first_stage_model.load_state_dict(load_file(state / "autoencoder.pt")["averaged"])
    text = {key.removeprefix("text."): value for key, value in
            load_file(state / "text_encoder.pt")["averaged"].items() if key.startswith("text.")}
    model.cond_stage_model.transformer.load_state_dict(text)
    saved = load_file(state / "diffusion.pt")
    model.model.diffusion_model.load_state_dict(saved["averaged"])
    scale = 1.0 / float(load_file(state / "latents.pt")["latents"][:4000].float().std())
    schedule = {name for name, _ in model.named_buffers()}
    tensors = {key: value.half() for key, value in model.state_dict().items() if key not in schedule}
    save_safetensors(out / "model.safetensors", tensors, {"format": "sd-v1 key layout", "step": saved["step"]})
    text = re.sub(r"scale_factor: \S+", f"scale_factor: {scale:.5f}", config_path.read_text())
    write_atomically(config_path, lambda part: part.write_text(text))
    size = (out / "model.safetensors").stat().st_size / 1e6
    print(f"{out / 'model.safetensors'}: {size:.1f} MB, scale_factor {scale:.5f}, {saved['step']} steps")


def pack_metrics(state: Path, config_path: Path, out: Path) -> None:
    """Writes clip.safetensors and, where one was trained, judge.safetensors: what evaluations measure with."""
    text_config = OmegaConf.to_container(OmegaConf.load(config_path).model.params.cond_stage_config.params)
    path = pack_small_clip(load_file(state / "text_encoder.pt")["averaged"], text_config, out / "clip.safetensors")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if not (state / "judge.safetensors").exists():
        print(f"no judge in {state}; train one with scripts/pretrain/judge.py")
        return
    right = load_judge(state / "judge.safetensors").accuracy
    shutil.copyfile(state / "judge.safetensors", out / "judge.safetensors")
    print("judge: " + ", ".join(f"{head} {100 * share:.1f} %" for head, share in right.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("pretrain_state"))
    parser.add_argument("--config", type=Path, default=Path("configs/model/tiny.yaml"))
    parser.add_argument("--out", type=Path, default=Path("ldm/tiny"))
    args = parser.parse_args()
    torch.manual_seed(0)
    pack_model(args.state, args.config, args.out)
    pack_metrics(args.state, args.config, args.out)


if __name__ == "__main__":
    main()
