"""Mutated input of every kind: command lines, configurations, prompts, captions, lists, images, settings, names."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image, PngImagePlugin

from soak.campaign import Campaign, Ended, call, why_bad
from soak.world import World

COUNT = 4000
LIMIT = 40          # seconds; all of these end long before
WORDS = ["", " ", "-", "--", "=", "a=b=c", "nan", "-inf", "1e400", "-1", "0", "9" * 400, "1_000", "0x10", "١", "null",
         "true", "[]", "{}", "[[", "{a: b}", "*a", "&a", "!x", "!!python/name:os.system", "${oc.env:HOME}", "${",
         "${x}", "${oc.decode:x}", "???", "<new1>", "<new1>+<new1>", "<>", "{} {}", "{0}", "{x}", "%s%n", "\\",
         "'", '"', "#", "x" * 300, "x" * 5000, "a/b", "./..", "a\nb", "\t", "\x1b[31m", "\u202e", "\u2028", "💥",
         "é" * 200, "\udce9", "none.yaml", "a cat", "auto", "cat", "@file", "~/x", "a,b", "1,2", "1.5", "-b",
         "--help", "key=", "=value", "concepts.0.name=", "concepts=5", "concepts.9.name=x", "method=1",
         "dci.agg_lambda=[a]", "trainer.seed=1e3", "model.params=[]", "seed=null", "data.crop=x", "method.words=[]",
         "method.prefix=' '", "preview.prompts=5"]
VALUES = ["0", "1", "-1", "0.5", "1.5", "31", "32", "33", "102400", "1e30", "1e-30", ".nan", ".inf", "4294967295",
          "9223372036854775807", "1000000000", "' '", "'{}'", "'a {} {}'", "'a {} cat'", "'<new1>'", "[]", "['']",
          "[' ']", "[.nan]", "['{}']", "[<new1>]", "[<a>, <a>]", "[<a>, <b>, <c>]", "[1.0]", "[0, 0]", "fp16", "bf16",
          "','", "full", "auto", "false", "pad", "grey", "'#12345'", "generate", "retrieve", "none", "shared", "common",
          "no_full_prompt", "last_layer", "base_weights", "uniform", "random", "attn2", "all", "a photo of a", "photo"]
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n\n\n", b"[" * 3000, b"{" * 3000, b"${x}",
         "\u2028\x85💥".encode(), b"\x1b[2J", b": ", b"- ", b"\t", b"&a *a", b"!!", b"'", b'"', b"%", b"NaN", b"1e999"]
YAML = "name: x\nmethod: {steps: 2, words: [<new1>, <new2>], prefix: a, learning_rate: 1.0e-3}\ntrainer: {seed: 1}\n" \
       "data: {crop: center, reg: {num: 3}}\npreview: {prompts: [a {} in the snow], steps: 2}\n"
SUBJECTS = '[{"instance_data_dir": "photos", "class_prompt": "cat", "instance_prompt": "photo of a <new1> cat", ' \
           '"class_data_dir": "class"}]'
SETTINGS = {"prompt": "a {} in the snow", "seed": 4, "strength": 1.0, "steps": 4, "sampler": "ddim", "scale": 3.0,
            "text": "a cat", "concept": {"words": ["<new1>"], "class_noun": "cat", "step": 2}}


def run(campaign: Campaign) -> None:
    world = World(campaign.folder)
    doors: list[Callable[[World, Path, Random], Ended]] = [
        train_line, sample_line, sample_line, evaluate_line, other_line, yaml, prompts, captions, subjects, image,
        settings, names, names, train_whole, sample_whole]
    prepared = world.concept, world.metrics
    assert all(prepared)
    home = Path.cwd()
    for index, rng, folder in campaign.cases():
        os.chdir(folder)            # whatever a mutated path means, it is in here
        door = doors[index % len(doors)]
        ended = door(world, folder, rng)
        os.chdir(home)
        if why := why_bad(ended):
            campaign.fail(f"{door.__name__}: {why}")
        else:
            campaign.count_as("refused" if ended.status else "taken")
        shutil.rmtree(folder)


def mutated(rng: Random, words: Sequence[object]) -> list[str]:
    """Changes a command line in one to three places."""
    line = list(map(str, words))
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(line) + 1), rng.choice(["replace", "replace", "insert", "drop", "double", "value"])
        word = rng.choice(WORDS)
        if kind == "insert" or at == len(line):
            line.insert(at, word)
        elif kind == "value" and "=" in line[at]:
            line[at] = line[at].split("=")[0] + "=" + word
        elif kind == "drop":
            del line[at]
        elif kind == "double":
            line.insert(at, line[at])
        else:
            line[at] = word
    return [word.replace("\0", "") for word in line]


def damaged(rng: Random, data: bytes) -> bytes:
    """Changes bytes in one to four places."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        kind = rng.choice(["insert", "insert", "flip", "cut", "take", "double"])
        if kind == "insert":
            content[at:at] = rng.choice([*BYTES, *(word.encode(errors="surrogateescape") for word in WORDS)])
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "take":
            del content[at:at + rng.randint(1, 12)]
        else:
            content[at:at] = content[at:at + rng.randint(1, 40)]
    return bytes(content)


# --- command lines: each ends before there is much work ---------------------------------------------------------------

def train_line(world: World, folder: Path, rng: Random) -> Ended:
    line = ["-b", *world.small.training_files, "--datapath", world.small.photos, "--class_noun", "cat", "--name", "x",
            "--seed", 5, "--init_ctx", "photo of a", "--modifier_token", "<new1>+<new2>", "method.steps=1",
            "trainer.save_every=1", "--caption", "a <new1> <new2> cat", "--gpus", "0,"]
    stop = [["--print_config"], ["--inspect", "seen"], ["-r", "none"]]
    return call("train", *mutated(rng, rng.sample(line[4:], 6) + line[:4]), *rng.choice(stop), limit=LIMIT)


TRAINED = ("method.prefix", "method.suffix", "method.words", "method.initial_words", "method.learning_rate",
           "method.prior_weight", "method.weight_decay", "method.train", "method.prefix_length", "data.background",
           "data.crop", "data.alpha_mask", "data.reg.mode", "data.captions", "trainer.save_dtype", "trainer.seed",
           "trainer.precision", "trainer.cache", "trainer.image_size", "preview.prompts", "preview.agg_time", "name",
           "preview.agg_lambda", "concepts.0.class_noun", "concepts.0.name", "concepts.0.words",
           "concepts.0.regularization", "concepts.0.regularization_caption", "base.name", "base.ckpt", "base.vae")
DRAWN = ("--prompt", "--replace_noun", "--agg_lambda", "--agg_time", "--scale", "--ddim_eta", "--seed", "--precision",
         "--class_noun", "--modifier_token", "--n_samples", "--use_dci", "--share_guidance", "--H", "--W", "sampler=",
         "dci.token_gain=", "dci.spatial_gain=", "dci.mask_sum=", "dci.noise=", "dci.ablation=", "dci.match_cost=",
         "base.any_base=", "batch_size=")


def train_whole(world: World, folder: Path, rng: Random) -> Ended:
    """A step of training with a setting or two of another value."""
    settings = [f"{key}={rng.choice(VALUES + WORDS[::3])}" for key in rng.sample(TRAINED, rng.randint(1, 2))]
    return call("train", "-b", *world.small.training_files, "method.steps=1", "preview.prompts=[]", "-l", "logs",
                "data.reg.num=2", "data.reg.steps=2", *settings, limit=LIMIT)


def sample_whole(world: World, folder: Path, rng: Random) -> Ended:
    """Two steps of drawing with an option or two of another value."""
    options = []
    for name in rng.sample(DRAWN, rng.randint(1, 2)):
        word = rng.choice(VALUES + WORDS[::3])
        options += [f"{name}{word}"] if name.endswith("=") else [f"{name}={word}"]
    return call("sample", "-b", *world.small.sampling_files, "--delta_ckpt", world.concept, "--prompt", "a {}",
                "--outdir", "out", *options, "--ddim_steps", 2, limit=LIMIT)


def sample_line(world: World, folder: Path, rng: Random) -> Ended:
    line = ["-b", *world.small.sampling_files, "--delta_ckpt", world.concept, "--prompt", "a {} in the snow",
            "--class_noun", "cat", "--ddim_steps", 4, "--scale", 2.5, "--n_samples", 1, "--H", 32, "--seed", 3,
            "--replace_noun", "dog", "--agg_lambda", 0.5, 1, "--agg_time", 0.5, "--precision", "full", "dci.use=true"]
    stop = rng.choice(["--print_config", "--show_tokens", "--show_tokens", "--show_tokens"])
    return call("sample", *mutated(rng, line), stop, limit=LIMIT)


def evaluate_line(world: World, folder: Path, rng: Random) -> Ended:
    line = ["--images", world.small.photos, "--references", world.small.photos, "--metrics", "judge",
            "--metric_weights", f"judge={world.metrics['judge']}", "--outdir", "out", "--class_noun", "cat"]
    return call("evaluate", *mutated(rng, line), limit=LIMIT)


def other_line(world: World, folder: Path, rng: Random) -> Ended:
    """Scripts whose work is long get a line that is wrong in any case."""
    lines = {"convert": [world.small.checkpoint, "-o", "out.safetensors", "--half"],
             "tradeoff": ["claim", "dci", "-b", "none.yaml", "seeds=1", "--workers", 1, "--outdir", "out"],
             "retrieve": ["--class_noun", "cat", "--num", 3, "--out", "set", "--oversample", 2.0, "--url", "http://[x"],
             "benchmark": ["--small", "--rows", "none", "--repeats", 1, "--images", 1, 2]}
    script = rng.choice(list(lines))
    return call(script, *mutated(rng, lines[script]), *(["--workers", 0] if script == "retrieve" else []),
                *(["--rows", "nothing"] if script == "benchmark" else []),
                *(["--workers", 0] if script == "tradeoff" else []), limit=LIMIT)


# --- files ------------------------------------------------------------------------------------------------------------

def yaml(world: World, folder: Path, rng: Random) -> Ended:
    (folder / "a.yaml").write_bytes(damaged(rng, YAML.encode()))
    return call("train", "-b", *world.small.training_files, "a.yaml", "--print_config", limit=LIMIT)


def prompts(world: World, folder: Path, rng: Random) -> Ended:
    texts = "a {} in the snow\na red {} at night\nein Kätzchen {}\n".encode()
    (folder / "prompts.txt").write_bytes(damaged(rng, texts))
    return call("sample", "-b", *world.small.sampling_files, "--delta_ckpt", world.concept, "--from-file",
                "prompts.txt", "--show_tokens", limit=LIMIT)


def captions(world: World, folder: Path, rng: Random) -> Ended:
    for name in ("a.png", "b.png"):
        shutil.copyfile(world.small.photos / "0.png", folder / name)
    texts = {"a.txt": "a cat on a chair", "metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\n' * 2,
             "metadata.csv": 'file_name,text\na.png,"a cat, red"\nb.png,a dog\n', "a.png.caption": "a cat"}
    name = rng.choice(list(texts))
    (folder / name).write_bytes(damaged(rng, texts[name].encode()))
    if rng.random() < 0.2:
        (folder / "images.txt").write_bytes(damaged(rng, b"a.png\nb.png\n"))
    return inspect(world, folder, "data.captions=true")


def inspect(world: World, photos: Path, *more: str) -> Ended:
    return call("train", "-b", *world.small.training_files, f"concepts.0.images={photos}",
                "concepts.0.regularization=null", *more, "--inspect", photos / "seen", limit=LIMIT)


def subjects(world: World, folder: Path, rng: Random) -> Ended:
    (folder / "list.json").write_bytes(damaged(rng, SUBJECTS.encode()))
    shutil.copytree(world.small.photos, folder / "photos")
    return call("train", "-b", *world.small.training_files, "--concepts_list", "list.json",
                *rng.choice([["--print_config"], ["--inspect", "seen"]]), limit=LIMIT)


def image(world: World, folder: Path, rng: Random) -> Ended:
    photos = folder / "photos"
    shutil.copytree(world.small.photos, photos)
    file = BytesIO()
    kind = rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
    Image.effect_noise((24, 36), 90).convert("RGB").save(file, kind)
    (photos / f"bad.{kind.lower()}").write_bytes(damaged(rng, file.getvalue()))
    if rng.random() < 0.7:
        return inspect(world, photos)
    return evaluate(world, photos)


def evaluate(world: World, images: Path) -> Ended:
    return call("evaluate", "--images", images, "--metrics", "judge", "--metric_weights",
                f"judge={world.metrics['judge']}", "--outdir", "out", limit=LIMIT)


def settings(world: World, folder: Path, rng: Random) -> Ended:
    """Settings inside an image: another text, or another value somewhere."""
    info = PngImagePlugin.PngInfo()
    content = damaged(rng, json.dumps(SETTINGS).encode())
    info.add_text("dci-ico", content.decode("latin-1"), zip=rng.random() < 0.3)
    (folder / "p").mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "p" / "a.png", pnginfo=info)
    return evaluate(world, folder / "p")


def names(world: World, folder: Path, rng: Random) -> Ended:
    """Names of folders and images that are long, no text, or look like something else."""
    word = rng.choice([word for word in WORDS if word.strip("./") and "/" not in word])
    name = os.fsencode(word)[:rng.choice([20, 200, 251])].replace(b"\0", b"")
    place = Path(os.fsdecode(os.path.join(os.fsencode(folder), b"d" + name)))
    place.mkdir()
    shutil.copyfile(world.small.photos / "0.png", place / os.fsdecode(name[:200] + b".png"))
    door = rng.choice(["inspect", "evaluate", "print", "convert"])
    if door == "inspect":
        return call("train", "-b", *world.small.training_files, "--datapath", place, "--class_noun", "cat",
                    "--inspect", place / "seen", limit=LIMIT)
    if door == "evaluate":
        return call("evaluate", "--images", place, "--metrics", "judge", "--metric_weights",
                    f"judge={world.metrics['judge']}", "--outdir", place / "out", limit=LIMIT)
    if door == "convert":
        return call("convert", place / "none.ckpt", "-o", place / os.fsdecode(name + b".safetensors"), limit=LIMIT)
    return call("train", "-b", *world.small.training_files, "-n", word, "-l", place, "--print_config", limit=LIMIT)
