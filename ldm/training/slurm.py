"""Jobs that Slurm stops and starts again: the same command continues the run it began."""
from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

COMMAND = "command.txt"      # in a run's folder: what began the run


def job(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the name by which Slurm knows this job, None outside of one; a member of an array has its own."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def command_text() -> str:
    """Returns what began this process, and the job it belongs to."""
    name = job()
    text = shlex.join(sys.argv) + "\n"
    if name:
        text += f"# Slurm job {name}\n"
    return text


def earlier_run(logdir: Path) -> Path | None:
    """Returns the folder of the run that this command began before Slurm started its job again; None without one."""
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 or not logdir.is_dir():
        return None
    for folder in sorted(logdir.iterdir(), reverse=True):
        with suppress(OSError, UnicodeError):
            began = (folder / COMMAND).read_text(encoding="utf-8")
            if began == command_text() and (folder / "checkpoints" / "last.ckpt").is_file():
                return folder
    return None
