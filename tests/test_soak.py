"""Keeps the campaigns of tests/soak alive: a handful of each kind; bash tests/soak.sh runs all of them."""
from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import web
from conftest import ROOT
from soak import files, hostile, inputs
from soak.campaign import Campaign, Ended, call, why_bad

SEED = 1


@pytest.mark.parametrize(("kind", "count"), [(files, 16), (inputs, 30)])
def test_some_of_what_is_hostile_or_mutated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    campaign = Campaign(kind.__name__.rpartition(".")[2], tmp_path, seed=SEED, count=count)
    kind.run(campaign)
    assert not campaign.failures and sum(campaign.counts.values()) == count, campaign.failures
    assert campaign.counts["refused"] > count / 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize(("kind", "count"), [("kills", 2), ("power", 2), ("servers", 2), ("signals", 1)])
def test_some_bad_luck(kind: str, count: int) -> None:
    """In a process of its own: one that has computed has threads, and forks no more."""
    if kind == "servers" and not hasattr(web, "HOSTILE"):
        pytest.skip("no hostile server is listed")
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "scripts"), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", "soak", kind, "--count", str(count), "--slack", "60"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
                          check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and said.startswith(f"{kind}: {count} cases (seed 0): "), said


def test_a_campaign_tells_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign = Campaign("files", tmp_path, seed=3, count=2)
    for index, _, _ in campaign.cases():
        campaign.fail("bad") if index else campaign.count_as("refused")
    campaign.tell()
    assert capsys.readouterr().out == ("files: 2 cases (seed 3): 1 FAILED, 1 refused\n"
                                       "FAILED bash tests/soak.sh files --seed 3 --only 1\n    bad\n")


@pytest.mark.parametrize(("ended", "bad"), [
    (Ended(0, "", "", ""), False), (Ended(1, "", "error: no.\n", ""), False), (Ended(1, "", "", ""), True),
    (Ended(1, "", "error: a\nerror: b\n", ""), True), (Ended(None, "", "", "Traceback\nKeyError: 1"), True),
    (Ended(70, "", "error: no.\n", ""), True)], ids=str)
def test_what_no_command_may_do(ended: Ended, bad: bool) -> None:
    assert (why_bad(ended) is not None) == bad


def test_a_script_that_hangs_or_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.cli.Parser.parse_command", lambda *_: signal.pause())
    assert "hang: more than 0.1 s" in call("convert", limit=0.1).fault
    monkeypatch.setattr("ldm.cli.Parser.parse_command", lambda *_: {}["x"])
    assert "KeyError: 'x'" in call("convert").fault


def test_hostile_programs_do_run_where_they_are_let(tmp_path: Path) -> None:
    """Else a campaign in which nothing runs would say nothing."""
    canary = tmp_path / "canary"
    pickles = {name: pickle.dumps(runs) for name, runs in hostile.payloads(canary).items()} | hostile.opcodes(canary)
    for name in ("os.system", "exec", "Path.touch", "subprocess", "eval", "open", "INST", "OBJ", "GLOBAL", "posix"):
        with suppress(Exception):
            pickle.loads(pickles[name])
        assert canary.exists(), name
        canary.unlink()


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    first, second = (hostile.text(Random("files 0 4"), tmp_path, tmp_path) for _ in range(2))
    assert first == second != hostile.text(Random("files 0 5"), tmp_path, tmp_path)
