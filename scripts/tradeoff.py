"""Fidelity against editability: concepts x methods x steps x lambda to curves, and the paper's claims one by one.

python scripts/tradeoff.py                      all that configs/sweep/tiny.yaml lists
python scripts/tradeoff.py claim NAME ...       claims of the paper, by name; all is every one:
  tradeoff dci methods lambda chosen ablations masks nouns phase guidance replaced gains all
python scripts/tradeoff.py claim dci --quick    one claim on fewer concepts, prompts and seeds
An interrupted sweep goes on where it was when the same command is given again.
"""
from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm import cli
from ldm.config_files import merge
from ldm.flags import read_flags
from ldm.util import UserError

EMBEDDED, QUICK = ("configs/sweep/tiny.yaml",), "configs/sweep/quick.yaml"


def parser() -> cli.Parser:
    """Makes the parser; words that are no overrides name claims."""
    parser = cli.Parser(__doc__)
    parser.usage = "%(prog)s [claim NAME ...] [options] [key=value ...]"
    parser.add_argument("--quick", action="store_true", help=f"merge {QUICK}: the same comparisons on less")
    parser.add_base()
    parser.add_argument("--metrics", nargs="+", help="small_clip efficientnet clip_b32 clip_l14 dino judge; default: "
                        "all that can be loaded")
    parser.add_argument("--metric_weights", nargs="+", default=[], metavar="METRIC=FILE",
                        help="weights that do not ship: clip_b32, clip_l14, dino")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work; 2 suit 2 cores")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/tradeoff"), help="where everything goes")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_command(arguments)
    words = [item for item in (*options.overrides, *(options.base or ())) if item == "claim" or "=" not in item]
    names, files = read_words(words, options.base)
    from experiments.claims import SWEEP, find_claims
    from experiments.jobs import BASE, Job, SweepConfig
    from experiments.plots import check_plots

    from ldm.evaluation.scoring import load_scorer, read_weights
    claims = [SWEEP] if names is None else find_claims(names)
    overrides = [item for item in options.overrides if "=" in item]
    config = merge(SweepConfig, [*files, *([QUICK] if options.quick else [])], overrides)
    base = [f"{key}={value}" for key, value in read_flags(options).items()]
    config = OmegaConf.merge(config, {name: [*config[name], *base] for name in ("training", "sampling")})
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; give at least 1.")
    check_plots()       # the last thing that is made; hours may lie before it
    from experiments.experiment import claim_names, jobs_of, overview, run_claim
    from experiments.sweep import Sweep, share_out

    from ldm.device import choose_device
    device = choose_device(Job("", BASE, 0).sampling(config).device)
    metrics = options.metrics, read_weights(options.metric_weights), device
    sweep = Sweep(config, options.outdir, load_scorer(*metrics))
    for reason in sweep.scorer.skipped:
        print(f"skipped {reason}")
    claim_names(claims, sweep)
    if options.workers > 1:
        jobs = list(dict.fromkeys(job for claim in claims for job in jobs_of(claim, sweep)))
        sweep.check(jobs)
        share_out(sweep, metrics, jobs, options.workers)
    command, reports = "python " + shlex.join(["scripts/tradeoff.py", *sys.argv[1:]]), []
    for claim in claims:
        reports.append(run_claim(claim, sweep, command))
        print(f"{reports[-1].text}\n\nreport: {reports[-1].folder / 'report.md'}", flush=True)
    if len(reports) > 1:
        print(f"all of them: {overview(reports, sweep, command)}")


def read_words(words: Sequence[str], base: Sequence[str] | None) -> tuple[list[str] | None, Sequence[str]]:
    """Tells claims' names from configuration files, which -b takes together; None is the sweep, not a claim."""
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    rest = [word for word in words if word not in files]
    if rest and rest[0] != "claim":
        raise UserError(f"'{rest[0]}' is neither 'claim' nor an override; write: claim NAME, or key=value.")
    return (rest[1:] if rest else None), (files if base is not None else EMBEDDED)


if __name__ == "__main__":
    cli.run(main)
