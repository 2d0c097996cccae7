"""Times this code against diffusers on the same random weights: contestants interleaved, medians, peak memory."""
from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm import cli
from ldm.util import UserError, shipped

MODELS = {False: "configs/model/sd-v1.yaml", True: "configs/model/tiny.yaml"}


def parser() -> cli.Parser:
    """Makes the parser."""
    parser = cli.Parser(__doc__, configured=False)
    parser.add_argument("--rows", nargs="+", help="which comparisons: unet run vae startup file training; default all")
    parser.add_argument("--small", action="store_true", help="at the embedded model's size instead of SD v1.4's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="full", help="full, bf16 or fp16, of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each contestant")
    parser.add_argument("--steps", type=int, default=50, help="steps S of the whole runs")
    parser.add_argument("--agg_time", type=float, default=0.3, help="share of them with two branches")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2],
                        help="concept images of a training step; as many class images come with them")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's own choice")
    parser.add_argument("--compile", action="store_true", help="time our U-Net compiled as well, in the run row")
    parser.add_argument("--ours_only", action="store_true", help="leave diffusers out")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark.json"), help="JSON file to write")
    return parser


def check(options, rows: Sequence[str]) -> None:
    """Refuses what cannot be measured."""
    unknown = [row for row in options.rows or () if row not in rows]
    if unknown:
        raise UserError(f"--rows '{unknown[0]}' is unknown; use some of {', '.join(rows)}.")
    for name in ("repeats", "steps", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; give at least 1.")
    if min(options.images) < 1:
        raise UserError(f"--images {min(options.images)} is no number of images; give at least 1.")
    if not 0.0 <= options.agg_time <= 1.0:
        raise UserError(f"--agg_time is {options.agg_time}; give a share of the steps between 0 and 1.")


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    import torch
    from benchmarks.cases import ROWS, make_bench, needed_memory
    from benchmarks.measure import claim, save, table

    from ldm.device import available_memory, choose_device, supported_precision
    check(options, list(ROWS))
    device = choose_device(options.device)
    precision = supported_precision(options.precision, device)
    if precision == "autocast":
        raise UserError("--precision autocast is not compared; use full, bf16 or fp16.")
    if options.threads:
        torch.set_num_threads(options.threads)
    node = OmegaConf.load(shipped(MODELS[options.small])).model
    need, there = needed_memory(node, options.ours_only), available_memory(device)
    if there is not None and there < need:
        raise UserError(f"the comparison needs {need / 1e9:.1f} GB on '{device}', and {there / 1e9:.1f} GB are free; "
                        "give --ours_only, --small, or another --device.")
    bench = make_bench(node, device, precision, options.repeats, options.steps, options.agg_time, options.ours_only,
                       options.compile, tuple(options.images))
    claim(options.out)
    findings = []
    for name in options.rows or ROWS:
        findings += ROWS[name](bench)
    machine = {"processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
               "device": device.type, "precision": precision, "threads": torch.get_num_threads(),
               "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "model": MODELS[options.small]}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(table(findings))
    print(f"JSON: {save(findings, machine, options.out)}")


if __name__ == "__main__":
    cli.run(main)
