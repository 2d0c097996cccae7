"""Tests of progress bars: a line a minute in a file, one moving line on a terminal, nowhere a bar of another kind."""
from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from ldm.progress import LOG_INTERVAL, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_at_the_start_each_minute_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=600, desc="work", unit="row") as bar:
        now = bar.start_t = bar.last_print_t = int(bar._time())       # whole seconds, whose differences are exact
        for second in range(1, 601):
            assert not bar.dynamic_miniters and bar.miniters == 0       # so that tqdm's monitor leaves it alone
            bar._time = lambda second=second: now + second
            bar.update()
    written = capsys.readouterr().err
    counts = [int(re.search(r" (\d+)/600 ", line)[1]) for line in written.splitlines()]
    assert counts == [*range(0, 601, int(LOG_INTERVAL))]
    assert "\r" not in written and "\x1b" not in written


def test_bars_within_bars_write_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=2, desc="outer", unit="job") as outer:
        for _ in range(2):
            assert list(progress("ab", desc="inner", unit="letter")) == ["a", "b"]
            outer.update()
    written = capsys.readouterr().err
    assert [line.split(":")[0] for line in written.splitlines()] == ["outer", *["inner"] * 4, "outer"]
    assert "\x1b" not in written


def test_a_terminal_gets_one_line_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), desc="work", unit="row")) == [0, 1, 2]
    assert sys.stderr.getvalue().count("\r") > 1 and sys.stderr.getvalue().count("\n") == 1


def test_a_bar_within_another_takes_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(total=2, desc="outer", unit="job") as outer:
        for _ in range(2):
            assert list(progress("ab", desc="inner", unit="letter")) == ["a", "b"]
            outer.update()
    assert "\x1b" not in sys.stderr.getvalue()          # the cursor never goes up


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), desc="work", unit="row", quiet=True)) == [0, 1, 2]
    assert not capsys.readouterr().err


def test_every_bar_is_made_here() -> None:
    sources = [path for folder in ("ldm", "scripts") for path in Path(ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if "tqdm(" in path.read_text("utf-8")] == ["progress.py"]
