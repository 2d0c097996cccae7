"""Runs campaigns one after the other; each is one line of counts, and every failure the command that repeats it."""
from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys
import traceback
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NoReturn

from soak.campaign import Campaign

KINDS = ("files", "inputs", "kills", "power", "servers", "signals")
MEMORY = 16 * 2 ** 30       # bytes of addresses, so that a bomb ends the campaign and not the machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of {' '.join(KINDS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other cases")
    parser.add_argument("--count", type=int, help="cases; default: each kind's own number")
    parser.add_argument("--only", type=int, help="the one case of this number")
    parser.add_argument("--slack", type=float, default=3.0, help="seconds beyond those allowed, for a busy machine")
    options = parser.parse_args()
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"'{unknown[0]}' is no kind; kinds: {' '.join(KINDS)}")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return max([in_child(kind, options) for kind in options.kinds or KINDS])


def in_child(kind: str, options: argparse.Namespace) -> int:
    """Runs a kind in a process of its own; one that dies fails, and what it was at is told."""
    module = importlib.import_module(f"soak.{kind}")
    with TemporaryDirectory(prefix=f"soak-{kind}-") as folder:
        count = module.COUNT if options.count is None else options.count
        campaign = Campaign(kind, folder, options.seed, count, options.only, options.slack)
        sys.stdout.flush()
        if (process := os.fork()) == 0:
            carry_out(module, campaign)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status not in (0, 1):
            print(f"{kind}: the campaign itself died ({status}) in: {campaign.current()}", flush=True)
    return min(1, abs(status))


def carry_out(module: ModuleType, campaign: Campaign) -> NoReturn:
    """Runs a kind and leaves the process, by 3 where the campaign itself is at fault."""
    status = 3
    try:
        module.run(campaign)
        campaign.tell()
        status = int(bool(campaign.failures))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
