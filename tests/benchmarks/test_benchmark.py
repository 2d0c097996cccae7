"""Tests of the benchmark: contestants compute the same, measurements are honest, the script runs and refuses."""
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from benchmarks import cases
from benchmarks.cases import ROWS, Bench, make_bench, needed_memory
from benchmarks.measure import Contestant, Finding, Peak, claim, interleave, table
from conftest import small_model_config

from ldm.files import RECORD
from ldm.util import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench(small_model_config().model, CPU, "full", repeats=1, steps=10, agg_time=0.3, ours_only=False,
                      images=(1,))


@torch.no_grad()
def test_contestants_have_the_same_weights(bench: Bench) -> None:
    x, text, t = bench.latents(2), bench.text(2), torch.tensor([500, 500])
    pairs = [(bench.model.apply_model(x, t, text), bench.theirs[0](x, t, text).sample),
             (bench.model.first_stage_model.decode(x), bench.theirs[1].decode(x).sample)]
    for ours, others in pairs:
        assert others.std() > 1e-3 and (ours - others).abs().max() < 1e-5 * max(1.0, float(others.abs().max()))


def test_measurements_are_interleaved_and_medians(monkeypatch) -> None:
    calls: list[str] = []
    clock = iter([0.0, 0.0] + [value for lap in range(3) for value in (0.0, 1.0 + lap, 0.0, 4.0 - lap)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = interleave("work", {name: Contestant(lambda name=name: calls.append(name), lambda: calls.append("ready"))
                                for name in ("one", "two")}, 3, CPU)
    assert calls == ["ready", "one", "ready", "two"] * 4                     # the first lap warms up
    assert [(finding.contestant, finding.seconds, finding.repeats) for finding in found] == [
        ("one", 2.0, 3), ("two", 3.0, 3)]
    text = table([*found, Finding("size", "ours", None, 39_000_000, note="on disk")])
    assert "| work | two | 3 s | 1.500 |" in text and "| size | ours |  |  | 39.0 MB | on disk |" in text


def test_peak_memory_is_that_of_the_call() -> None:
    peak = Peak(CPU)
    peak.start()
    if peak.before is None:
        pytest.skip("this system does not tell")
    for _ in range(2):                   # the second time in memory the first has freed
        blocks = [torch.ones(25_000) for _ in range(1000)]
        keep, blocks = blocks[-1], None                                          # noqa: F841
        assert 90e6 < peak.stop() < 130e6
        peak.start()


def test_every_row_is_measured(bench: Bench) -> None:
    """All rows but start-up, whose test is elsewhere; the whole run is the sum of its steps."""
    found = [finding for name in ("unet", "run", "vae", "file", "training") for finding in ROWS[name](bench)]
    assert {*ROWS} == {"unet", "run", "vae", "file", "training", "startup"}
    works = {finding.row for finding in found}
    assert works == {"U-Net, 2 rows", "U-Net, 3 rows", "DBIM in 3 rows", "guided step, 2 rows", "guided step, 3 rows",
                     "guided run, S=10, plain guidance", "guided run, S=10, DCI shared, agg_time 0.3",
                     "VAE decode", "VAE encode", "concept file", "training step, 1+1 images"}
    by_name = {(finding.row, finding.contestant): finding.seconds for finding in found}
    for name in ("ours", "release's cost model"):
        assert by_name["guided run, S=10, DCI shared, agg_time 0.3", name] == pytest.approx(
            3 * by_name["guided step, 3 rows", name] + 7 * by_name["guided step, 2 rows", name])
    assert all(finding.seconds is None or finding.seconds > 0 for finding in found)


@torch.no_grad()
@pytest.mark.parametrize("joint", [False, True])
def test_the_releases_way_to_step_predicts_the_same(bench: Bench, joint: bool) -> None:
    """It differs in rounding alone."""
    bench.model.double()
    try:
        ours = cases.guided(bench, joint)()
        with cases.as_the_release(CPU, torch.float32):
            release = cases.guided(bench, joint)()
    finally:
        bench.model.float()
    assert torch.allclose(ours, release, rtol=1e-5, atol=1e-5) and ours.std() > 1e-3


def test_the_memory_a_comparison_needs() -> None:
    node = small_model_config().model
    assert needed_memory(node, ours_only=False) == 1.5 * needed_memory(node, ours_only=True) > 1e6


def test_diffusers_may_be_missing(monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.contestants.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package 'diffusers'"):
        make_bench(small_model_config().model, CPU, "full", 1, 10, 0.3, ours_only=False)


def test_the_script_writes_a_table_and_json(tmp_path: Path, call_script) -> None:
    done = call_script("benchmark", "--small", "--rows", "vae", "file", "--repeats", "1", "--threads", "1",
                       "--out", tmp_path / "found.json")
    assert done.status == 0 and "| VAE decode | ours |" in done.out
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["machine"]["model"] == "configs/model/tiny.yaml" and content["machine"]["date"]
    assert {finding["row"] for finding in content["findings"]} == {"VAE decode", "VAE encode", "concept file"}
    (tmp_path / "notes.json").write_text("{}")
    refused = call_script("benchmark", "--small", "--out", tmp_path / "notes.json").error
    assert "holds 'notes.json', which was not made here" in refused
    (tmp_path / RECORD).unlink()
    claim(tmp_path / "found.json")                                  # as an earlier version left it


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rows", "all"], "--rows 'all' is unknown; use some of unet, run, vae"), (["--repeats", "0"], "--repeats is 0"),
    (["--images", "1", "0"], "--images 0 is no number"),
    (["--agg_time", "2"], "--agg_time is 2.0"), (["--device", "tpu"], "device 'tpu' is unknown"),
    (["--precision", "half"], "precision 'half' is unknown"), (["--precision", "autocast"], "autocast is not compared"),
    (["--precision", "fp16"], "fp16 has no use on a CPU"), (["--quick"], "unrecognized arguments: --quick")])
def test_what_cannot_be_measured_is_refused(call_script, arguments: list[str], message: str) -> None:
    assert message in call_script("benchmark", "--small", *arguments).error


def test_a_machine_without_the_memory_is_told_how_much_it_takes(call_script, monkeypatch) -> None:
    monkeypatch.setattr("ldm.device.available_memory", lambda device: 2_000_000_000)
    error = call_script("benchmark").error
    assert "needs 12.8 GB on 'cpu', and 2.0 GB are free; give --ours_only, --small" in error
