"""What every pretraining stage shares: a resumable training loop on a time budget, EMA, logs, sample sheets."""
from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from muon import optimizers_for
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoint import load_file
from ldm.device import supported_precision
from ldm.files import write_atomically


def stage_parser(description: str, minutes: float, shared: bool = True) -> argparse.ArgumentParser:
    """Makes the options of a stage; `shared`: one that several processes can share, and that can be compiled."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--state", type=Path, default=Path("pretrain_state"), help="folder of all stages' files")
    parser.add_argument("--minutes", type=float, default=minutes, help="training time, resumed runs included")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("full", "bf16"), default="full", help="what forward passes compute in")
    if shared:
        parser.add_argument("--workers", type=int, default=1, help="CPU processes that share each batch")
        parser.add_argument("--compile", action="store_true", help="fuse the network's kernels with torch.compile")
    return parser


class Averaged:
    """Exponential moving average of a module's weights, ramped so that early steps do not linger."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module, self.decay, self.steps = copy.deepcopy(module).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the weights of `module`."""
        self.steps += 1
        weight = 1.0 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, value in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(value, weight)


def learning_rate(peak: float, step: int, progress: float, warmup: int = 200, hold: float = 0.4) -> float:
    """Warms up over steps, holds, then falls along a cosine to zero as the time budget runs out."""
    fall = min(max((progress - hold) / (1.0 - hold), 0.0), 1.0)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * fall))


def train(name: str, module: nn.Module, loss_of: Callable[[int], Tensor], args: argparse.Namespace, *,
          peak_lr: float, sheet: Callable[[nn.Module, Path], str], betas: tuple[float, float] = (0.9, 0.99),
          weight_decay: float = 0.01, decay: float = 0.999, save_seconds: float = 180.0) -> nn.Module:
    """Trains `module` for `args.minutes`, resuming `args.state/<name>.pt`; returns the averaged weights.

    Args:
        loss_of: gives the loss of training step k.
        sheet: draws a sample sheet of the averaged module into a file and returns a line for the log.
    """
    path, device = args.state / f"{name}.pt", torch.device(args.device)
    precision = supported_precision(args.precision, device)
    optimizers = optimizers_for(module, peak_lr, betas, weight_decay)
    averaged, step, spent = Averaged(module, decay), 0, 0.0
    if path.exists():
        saved = load_file(path)
        module.load_state_dict(saved["module"])
        averaged.module.load_state_dict(saved["averaged"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, spent, averaged.steps = saved["step"], saved["spent"], saved["step"]
        print(f"{name}: resumed at step {step}, {spent / 60:.1f} of {args.minutes:g} minutes", flush=True)
    last_save = last_log = time.monotonic()
    running, count = 0.0, 0
    rank = dist.get_rank() if dist.is_initialized() else 0

    def save() -> None:
        state = {"module": module.state_dict(), "averaged": averaged.module.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step, "spent": spent}
        write_atomically(path, lambda part: torch.save(state, part))

    while spent < args.minutes * 60:
        start = time.monotonic()
        lr = learning_rate(peak_lr, step, spent / (args.minutes * 60))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(step)
        module.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(module)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        averaged.update(module)
        step, running, count = step + 1, running + loss.item(), count + 1
        now = time.monotonic()
        spent += now - start
        if dist.is_initialized():       # the first process's clock decides for all
            clock = torch.tensor(spent, dtype=torch.float64)
            dist.broadcast(clock, 0)
            spent = clock.item()
        if rank > 0:
            continue
        if now - last_log > 30:
            print(f"{name}: {spent / 60:6.1f} min, step {step}, loss {running / count:.5f}, lr {lr:.2e}, "
                  f"{(now - last_log) / count * 1000:.0f} ms a step", flush=True)
            last_log, running, count = now, 0.0, 0
        if now - last_save > save_seconds:
            save()
            print(f"{name}: {sheet(averaged.module, args.state / f'{name}.png')}", flush=True)
            last_save = last_log = time.monotonic()
            running, count = 0.0, 0
    if rank > 0:
        return averaged.module
    save()
    print(f"{name}: done, {sheet(averaged.module, args.state / f'{name}.png')}", flush=True)
    return averaged.module


def average_gradients(module: nn.Module) -> None:
    """Averages gradients over processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def launch(worker: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs `worker(rank, args)` in `args.workers` processes that average their gradients; in this one if it is one.

    On a CPU two processes of one thread are faster than one of two: they meet once a step, not once an operation.
    """
    if args.workers == 1:
        worker(0, args)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 1000))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # a normal exit takes the processes along
    torch.multiprocessing.spawn(_join, args=(worker, args), nprocs=args.workers, daemon=True)


def _join(rank: int, worker: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    worker(rank, args)
    dist.destroy_process_group()


def to_pictures(x: Tensor) -> np.ndarray:
    """Converts (B, 3, H, W) in [-1, 1] into (B, H, W, 3) uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_pictures(pictures: np.ndarray) -> Tensor:
    """Converts (B, H, W, 3) uint8 into (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def save_sheet(rows: list[np.ndarray], path: Path, scale: int = 2) -> None:
    """Saves rows of pictures (n, H, W, 3) uint8 as one image, enlarged `scale` times."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = Image.fromarray(sheet)
    size = (picture.width * scale, picture.height * scale)
    write_atomically(path, lambda part: picture.resize(size, Image.NEAREST).save(part, format="png"))
