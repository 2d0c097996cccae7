"""Hostile files, each through the door that reads such ones: nothing runs, hangs, or is taken without a word."""
from __future__ import annotations

import os
from pathlib import Path
from random import Random

from PIL import Image

from soak import hostile
from soak.campaign import Campaign, Ended, call, why_bad
from soak.world import World

COUNT = 420
TENSORS = (hostile.program, hostile.torn, hostile.altered, hostile.told, hostile.lying, hostile.program)
DOORS = ("concept", "base", "resume", "judge", "small_clip", "convert", "concept", "resume", "dino")
SUFFIXES = (".ckpt", ".safetensors", ".pt", ".bin", "")


def run(campaign: Campaign) -> None:
    world = World(campaign.folder)
    canary, path = campaign.folder / "canary", os.environ["PATH"]
    os.environ["PATH"] = f"{programs(campaign.folder / 'programs', canary)}{os.pathsep}{path}"
    for index, rng, folder in campaign.cases():
        what, must, named, ended = case(index, rng, folder, world, canary)
        fault = why_bad(ended)
        if canary.exists():
            canary.unlink()
            campaign.fail(f"{what}: it ran code")
        elif fault:
            campaign.fail(f"{what}: {fault}")
        elif ended.status == 0 and must and named not in ended.text:
            campaign.fail(f"{what}: taken without a word")
        else:
            campaign.count_as("refused" if ended.status else "named" if named in ended.text else "harmless")
    os.environ["PATH"] = path


def programs(folder: Path, canary: Path) -> Path:
    """Puts programs that image readers start into a folder."""
    folder.mkdir()
    for name in ("gs", "gswin64c", "ffmpeg", "convert", "inkscape", "rsvg-convert"):
        (folder / name).write_text(f"#!/bin/sh\ntouch '{canary}'\n")
        (folder / name).chmod(0o755)
    return folder


def case(index: int, rng: Random, folder: Path, world: World, canary: Path) -> tuple[str, bool, str, Ended]:
    """Returns what was given to whom, whether it must be refused or named, its name, and what came of it."""
    if index % 5 == 3:
        bad = hostile.image(rng, world.small.photos, canary)
        door, path, ended = give_image(rng, folder, world, bad.data)
    elif index % 10 == 4:
        bad = hostile.text(rng, world.small.photos, canary)
        door, path, ended = give_text(rng, folder, world, bad.data)
    else:
        door = rng.choice(DOORS)
        make = TENSORS[index % len(TENSORS)]
        if make is hostile.told and not hostile.metadata(world.valid[door]):
            door = "concept"
        bad = make(rng, world.valid[door], canary)
        path = folder / f"hostile{rng.choice(SUFFIXES)}"
        path.write_bytes(bad.data)
        ended = world.give(door, path, folder)
        # Conversion is of any tensors; of a state and of metrics' networks only what is needed is looked at.
        plain = make in (hostile.program, hostile.lying) or door in ("concept", "base")
        return f"{bad.what} to {door}", bad.must and plain, path.name, ended
    return f"{bad.what} to {door}", bad.must, path.name, ended


def give_image(rng: Random, folder: Path, world: World, data: bytes) -> tuple[str, Path, Ended]:
    """Puts an image among good ones, where a script reads such folders."""
    door = rng.choice(["inspection", "evaluation", "training", "references", "single"])
    photos = folder / "photos"
    if door == "references":
        photos = folder / "run" / "images" / "references"
    photos.mkdir(parents=True)
    path = photos / f"000{rng.choice(['.png', '.jpg', '.webp'])}"
    if door == "references":
        path = path.with_suffix(".png")
    path.write_bytes(data)
    if door != "single":
        Image.effect_noise((40, 40), 90).convert("RGB").save(photos / "good.png")
    configured = ["train", "-b", *world.small.training_files, f"concepts.0.images={photos}"]
    if door == "evaluation":
        return door, path, call("evaluate", "--images", photos, "--metrics", "judge", "--metric_weights",
                                f"judge={world.metrics['judge']}", "--outdir", folder / "out")
    if door == "references":
        concept = folder / "run" / "checkpoints" / "step.safetensors"
        concept.parent.mkdir()
        concept.write_bytes(world.concept.read_bytes())
        return door, path, call("sample", "-b", *world.small.sampling_files, "--delta_ckpt", concept, "--prompt",
                                "a {}", "--ddim_steps", 2, "--use_dci", "false", "--outdir", folder / "out")
    if door == "training":
        return door, path, call(*configured, "-l", folder / "logs", "preview.prompts=[]", "method.steps=1",
                                "concepts.0.regularization=null")
    return door, path, call(*configured, "concepts.0.regularization=null", "--inspect", folder / "out")


def give_text(rng: Random, folder: Path, world: World, data: bytes) -> tuple[str, Path, Ended]:
    """Gives a text to a reader of configurations, lists, prompts or captions."""
    door = rng.choice(["train -b", "sample -b", "tradeoff -b", "concepts_list", "prompts.json", "metadata.jsonl"])
    path = folder / ("hostile.yaml" if door.endswith("-b") else door.replace("concepts_list", "hostile.json"))
    path.write_bytes(data)
    if door == "train -b":
        return door, path, call("train", "-b", *world.small.training_files, path, "method.steps=1", "-l", folder / "l")
    if door == "sample -b":
        return door, path, call("sample", "-b", *world.small.sampling_files, path, "--prompt", "a cat", "--outdir",
                                folder / "out", "--ddim_steps", 1)
    if door == "tradeoff -b":
        return door, path, call("tradeoff", "-b", "configs/sweep/tiny.yaml", path, "--metrics", "judge",
                                "concept_files=[]", "--outdir", folder / "out")
    if door == "concepts_list":
        return door, path, call("train", "-b", *world.small.training_files, "--concepts_list", path, "--print_config")
    Image.effect_noise((40, 40), 90).convert("RGB").save(folder / "good.png")
    if door == "prompts.json":
        return door, path, call("evaluate", "--images", folder, "--prompts", path, "--metrics", "judge",
                                "--metric_weights", f"judge={world.metrics['judge']}", "--outdir", folder / "out")
    return door, path, call("train", "-b", *world.small.training_files, f"concepts.0.images={folder}",
                            "data.captions=true", "--inspect", folder / "out")
