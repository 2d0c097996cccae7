"""Stage 6: packs the trained parts into ldm/tiny (SD key layout, fp16) and draws the example data that ships."""
from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image
from small_world.world import CONCEPTS, NOUNS, SmallWorld
from world import REFERENCE_SCENES, WORLD

from ldm.checkpoint import load_file
from ldm.data.regularization import write_regularization
from ldm.evaluation.judge import load_judge
from ldm.evaluation.small_clip import pack_small_clip
from ldm.files import write_atomically
from ldm.saving import save_safetensors
from ldm.sheets import save_png
from ldm.util import instantiate_from_config

# Of the pictures that fidelity is measured on; some references have a scene of these too.
HELD_OUT_SCENES = ("meadow", "room", "city street", "mountains", "sunset")


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


def draw_examples(assets: Path, out: Path, regularization: Path, pictures: int) -> None:
    """Draws five references and five held-out pictures of each concept whose noun is known, and sets of the classes."""
    world, known = SmallWorld(assets), list(NOUNS)[:WORLD.nouns]
    concepts = {name: concept for name, concept in CONCEPTS.items() if concept.noun in known}
    for name, concept in concepts.items():
        scenes = NOUNS[concept.noun].scenes
        for index, scene in enumerate(REFERENCE_SCENES):
            picture = world.draw_concept(name, 1000 + index, scene=scenes[scene % len(scenes)])
            save_png(Image.fromarray(picture.image), out / "concepts" / name / f"{index}.png")
            unseen = world.draw_concept(name, 2000 + index, scene=HELD_OUT_SCENES[index])
            save_png(Image.fromarray(unseen.image), out / "held_out" / name / f"{index}.png")
    for noun in sorted({concept.noun for concept in concepts.values()}):
        drawn = [world.draw(7000 + seed, noun=noun, style="photo", relation="") for seed in range(pictures)]
        folder = regularization / f"samples_{noun.replace(' ', '_')}"
        shutil.rmtree(folder, ignore_errors=True)      # numbers would go on from an earlier set's
        write_regularization(folder, noun, [(Image.fromarray(picture.image), picture.caption, "") for picture in drawn])
    print(f"{len(concepts)} example concepts, regularisation sets of {pictures} pictures each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path, help="the assets folder of the npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--state", type=Path, default=Path("pretrain_state"))
    parser.add_argument("--config", type=Path, default=Path("configs/model/tiny.yaml"))
    parser.add_argument("--out", type=Path, default=Path("ldm/tiny"))
    parser.add_argument("--regularization", type=Path, default=Path("real_reg/tiny"))
    parser.add_argument("--pictures", type=int, default=24)
    args = parser.parse_args()
    torch.manual_seed(0)
    draw_examples(args.assets, args.out, args.regularization, args.pictures)
    pack_model(args.state, args.config, args.out)
    pack_metrics(args.state, args.config, args.out)


if __name__ == "__main__":
    main()
