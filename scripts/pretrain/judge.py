"""Stage 5: trains the judge of evaluations on renders of its own, in which scenes do not betray nouns."""
from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import from_pictures, launch, save_sheet, stage_parser, train
from small_world.scenes import SCENES
from small_world.sprites import COLOURS
from small_world.styles import STYLES
from small_world.world import NOUNS, WorldConfig
from torch import Tensor, nn
from world import WORLD, draw_range

from ldm.evaluation.judge import HEADS, AttributeClassifier, Judge, save_judge
from ldm.files import write_atomically

FIRST_SEED = 50_000_000     # far from the seeds of the pictures the generator learns from
HELD_OUT = 2_000
UNNAMED = -1                # a colour that the picture does not name, so that any answer would be right
COLOURLESS = ("pencil sketch", "old photograph")     # styles that leave no colour to be seen


def labels(nouns: int) -> dict[str, tuple[str, ...]]:
    """Returns the labels of each head for a world of so many nouns."""
    return dict(zip(HEADS, (tuple(NOUNS)[:nouns], tuple(SCENES), tuple(STYLES), tuple(COLOURS)), strict=True))


def phrases() -> dict[str, dict[str, list[str]]]:
    """Returns the wordings that ask for a scene, a painted style or a colour."""
    styles = {name: [re.sub(r"^an? | of$", "", prefix) for prefix in style.prefixes]
              for name, style in STYLES.items() if name != "photo"}     # "a photo of" asks for nothing
    return {"scene": {name: list(scene.phrases) for name, scene in SCENES.items()},
            "style": styles, "colour": {name: [name] for name in COLOURS}}


def draw(assets: Path, state: Path, nouns: int, pictures: int, workers: int) -> None:
    """Draws the renders once, with every noun in every scene alike and many styles and colours."""
    path = state / "judge_pictures.npy"
    if path.exists() and len(np.load(path, mmap_mode="r")) == pictures:
        return
    config = WorldConfig(nouns=nouns, typical=0.0, p_style=0.4, p_colour=0.45, p_pattern=0.25, p_pair=0.06)
    last = FIRST_SEED + pictures
    jobs = [(assets, config, first, min(first + 500, last)) for first in range(FIRST_SEED, last, 500)]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(draw_range, jobs))
    truths = [truth for part in parts for truth in part[2]]
    write_atomically(state / "judge_truths.json", lambda part: part.write_text(json.dumps(truths)))
    drawn = np.concatenate([part[0] for part in parts])
    write_atomically(path, lambda part: _save(part, drawn))


def _save(path: Path, array: np.ndarray) -> None:
    """Saves under exactly this name (numpy.save would add a suffix)."""
    with path.open("wb") as file:
        np.save(file, array)


def targets(truths: list[dict], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Returns label numbers: (N,) of scene and style; (N, 2) of nouns and colours, the second like the first for one.

    Of two things side by side either may be said. Colours count only where they cover the thing (a cat with red stripes
    is its own colour too) and can be seen.
    """
    numbers = {head: torch.tensor([names[head].index(truth[head]) for truth in truths]) for head in ("scene", "style")}
    nouns, colours = [], []
    for truth in truths:
        said = [truth["noun"], truth["second"] if truth["second"] in names["noun"] else truth["noun"]]
        nouns.append([names["noun"].index(noun) for noun in said])
        named = [names["colour"].index(colour) for colour in truth["colours"]]
        covered = len(named) == 2 or (named and truth["pattern"] is None)
        seen = covered and truth["style"] not in COLOURLESS
        colours.append([named[0], named[-1]] if seen else [UNNAMED, UNNAMED])
    return {**numbers, "noun": torch.tensor(nouns), "colour": torch.tensor(colours)}


def weathered(x: Tensor, rng: torch.Generator) -> Tensor:
    """Mirrors, shifts, blurs and roughens pictures (B, 3, H, W): a generator's are never as crisp as renders."""
    if torch.rand((), generator=rng) < 0.5:
        x = x.flip(3)
    top, left = torch.randint(0, 5, (2,), generator=rng).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, top:top + x.shape[2], left:left + x.shape[3]]
    blur = 0.8 * torch.rand(len(x), 1, 1, 1, generator=rng).to(x.device)
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(x.shape, generator=rng).to(x.device)
    return x + blur * (smooth - x) + 0.04 * noise


def shared_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy with the probability shared by two right answers (B, 2); rows that name none do not count."""
    named = answers[:, 0] != UNNAMED
    if not named.any():
        return logits.sum() * 0.0
    spread = 0.5 * (F.one_hot(answers[named, 0], logits.shape[1]) + F.one_hot(answers[named, 1], logits.shape[1]))
    return F.cross_entropy(logits[named], spread, label_smoothing=0.02)


@torch.no_grad()
def accuracies(judge: AttributeClassifier, x: Tensor, truth: dict[str, Tensor]) -> dict[str, float]:
    """Returns the share of right answers per head on pictures (N, 3, H, W)."""
    outputs = [judge.read(part) for part in x.split(250)]
    logits = {head: torch.cat([output[head] for output in outputs]).cpu() for head in HEADS}
    right = {head: (logits[head].argmax(1) == truth[head]).float().mean().item() for head in ("scene", "style")}
    right["noun"] = (logits["noun"].argmax(1)[:, None] == truth["noun"]).any(dim=1).float().mean().item()
    named = truth["colour"][:, 0] != UNNAMED
    best, colours = logits["colour"][named].argsort(dim=1, descending=True)[:, :2], truth["colour"][named]
    one = colours[:, 0] == colours[:, 1]
    single = best[:, 0] == colours[:, 0]
    pair = best.sort(dim=1).values.eq(colours.sort(dim=1).values).all(dim=1)
    right["colour"] = torch.where(one, single, pair).float().mean().item()
    return right


def main() -> None:
    parser = stage_parser(__doc__, minutes=30)
    parser.add_argument("assets", type=Path, help="the assets folder of the npm package @lobehub/fluent-emoji-3d")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--nouns", type=int, default=WORLD.nouns, help="how many of the world's nouns to tell apart")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step, all processes together")
    prepare(parser.parse_args())


def prepare(args: argparse.Namespace) -> None:
    """Draws what is missing, then trains."""
    args.state.mkdir(parents=True, exist_ok=True)
    draw(args.assets, args.state, args.nouns, args.pictures, max(args.threads, args.workers))
    launch(work, args)


def work(rank: int, args: argparse.Namespace) -> None:
    """Trains in process `rank`, and leaves the judge with its accuracy in the state folder."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = labels(args.nouns)
    pictures = np.load(args.state / "judge_pictures.npy", mmap_mode="r")
    # As `draw` left it.
    truth = targets(json.loads((args.state / "judge_truths.json").read_text()), names)
    judge = AttributeClassifier(names).to(args.device)
    forward = torch.compile(judge) if args.compile else judge
    held_out = from_pictures(pictures[:HELD_OUT])

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)          # a resumed run goes on as if it had never stopped
        rows = (torch.randperm(len(pictures) - HELD_OUT, generator=rng)[:args.batch] + HELD_OUT).sort().values
        rows = rows[rank::args.workers]                                                   # this process's share
        rng.manual_seed(step * args.workers + rank)
        logits = forward(weathered(from_pictures(pictures[rows.numpy()]).to(args.device), rng))
        answers = {head: truth[head][rows].to(args.device) for head in HEADS}
        single = [F.cross_entropy(logits[head], answers[head], label_smoothing=0.02) for head in ("scene", "style")]
        return sum(single) + shared_loss(logits["noun"], answers["noun"]) + shared_loss(logits["colour"],
                                                                                        answers["colour"])

    def sheet(averaged: nn.Module, path: Path) -> str:
        right = accuracies(averaged, held_out.to(args.device), {head: truth[head][:HELD_OUT] for head in HEADS})
        save_sheet([pictures[:12], pictures[12:24]], path)
        save_judge(Judge(averaged, phrases(), right, HELD_OUT), args.state / "judge.safetensors")
        shares = ", ".join(f"{head} {100 * right[head]:.1f} %" for head in HEADS)
        return f"right on {HELD_OUT} held-out renders: {shares}"

    train("judge", judge, loss_of, args, peak_lr=2e-3, sheet=sheet, weight_decay=0.02)


if __name__ == "__main__":
    main()
