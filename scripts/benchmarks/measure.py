"""Times contestants fairly: interleaved in one process, medians, peak memory; a table and JSON of what was found."""
from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from ldm.files import claim_results, write_text
from ldm.records import Record, is_record


@dataclass(frozen=True)
class Contestant:
    """One way to do a row's work: `ready` is called before each timed `run` and takes no part in its time."""

    run: Callable[[], object]
    ready: Callable[[], object] | None = None


@dataclass(frozen=True)
class Finding:
    """What one contestant needed for one row's work.

    Attributes:
        seconds: median over `repeats`, or None where the row is not about time.
        memory: bytes beyond what was there before, at the peak; None where the system does not say.
        note: how the number came about where it was not timed directly.
    """

    row: str
    contestant: str
    seconds: float | None
    memory: int | None = None
    repeats: int = 1
    note: str = ""


class Peak:
    """Peak memory of a call: the allocator's on a GPU, the process's resident memory on a CPU (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        """Forgets earlier peaks."""
        gc.collect()                         # or an earlier contestant's garbage counts as this one's
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        _give_back()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:                      # not Linux, or not allowed
            self.before = None
            return
        self.before = resident("VmRSS")

    def stop(self) -> int | None:
        """Waits for the device and returns the bytes at the peak beyond those at the start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return None if self.before is None else max(0, resident("VmHWM") - self.before)


def _give_back() -> None:
    """Returns freed memory to the system (glibc), or an earlier call's would hide what this one needs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
    """Returns bytes of this process's resident memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024       # the system says kB


def interleave(row: str, contestants: Mapping[str, Contestant], repeats: int, device: torch.device) -> list[Finding]:
    """Runs every contestant once to warm up, then all of them in turn, `repeats` times over."""
    # In turn, so that a machine that slows down or warms up slows all of them alike.
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    memory: dict[str, int | None] = {}
    for lap in range(repeats + 1):
        for name, contestant in contestants.items():
            if contestant.ready:
                contestant.ready()
            peak = Peak(device)
            peak.start()
            start = time.perf_counter()
            contestant.run()
            used = peak.stop()               # within the time: a GPU's work ends only there
            if lap:                          # the first warms up: caches fill, kernels are chosen
                seconds[name].append(time.perf_counter() - start)
                memory[name] = None if used is None else max(used, memory.get(name) or 0)
    return [Finding(row, name, statistics.median(times), memory[name], repeats) for name, times in seconds.items()]


def table(findings: Sequence[Finding]) -> str:
    """Lays findings out as a markdown table; each row's times also as multiples of its first contestant's."""
    lines = ["| work | contestant | time | x first | peak memory | |", "|---|---|---|---|---|---|"]
    first: dict[str, float] = {}
    for finding in findings:
        seconds, ratio = "", ""
        if finding.seconds is not None:
            first.setdefault(finding.row, finding.seconds)
            seconds, ratio = f"{finding.seconds:.4g} s", f"{finding.seconds / first[finding.row]:.3f}"
        memory = "" if finding.memory is None else f"{finding.memory / 1e6:.1f} MB"
        lines.append(f"| {finding.row} | {finding.contestant} | {seconds} | {ratio} | {memory} | {finding.note} |")
    return "\n".join(lines)


class _Findings(Record):
    """What is written, and nothing beside it."""

    model_config = ConfigDict(extra="forbid")

    machine: dict[str, Any]
    findings: list[dict[str, Any]]


def claim(path: Path) -> None:
    """Notes that findings are written to `path`; findings of earlier versions, which made no note, are ours too.

    Raises:
        UserError: there is another file.
    """
    claim_results(path.parent, [path.name], known=is_record(_Findings, path))


def save(findings: Sequence[Finding], machine: Mapping[str, object], path: Path) -> Path:
    """Writes findings and the machine they hold for as JSON."""
    content = {"machine": dict(machine), "findings": [asdict(finding) for finding in findings]}
    return write_text(path, json.dumps(content, indent=1) + "\n")
