"""Tests of sweeps and claims: what is on disk is not done again, comparisons and areas with known answers."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Call, SmallWorld, contents
from experiments import experiment, plots, training
from experiments.claims import CHOSEN, CLAIMS, SWEEP, Line, find_claims, like_with_like, schemes
from experiments.comparisons import BOTH_RIGHT, Comparison, compare, comparison_table
from experiments.experiment import (
    compare_curves,
    jobs_of,
    overview,
    run_claim,
    sheet_columns,
    sheet_rows,
)
from experiments.jobs import AUXILIARY, BASE, NOUN, Job, Subject, SweepConfig, subjects, training_of
from experiments.pace import Pace, sampling_rows, shares
from experiments.plots import Curve, marked, tradeoff_figure
from experiments.store import Stored
from experiments.sweep import Sweep, rows_by_point, share_out
from experiments.training import steps_of
from omegaconf import OmegaConf
from PIL import Image

from ldm.config import typed
from ldm.config_files import merge
from ldm.customization.tokens import CONTEXT_NOUNS, noun_for_context
from ldm.evaluation.features import Extractor, _transform
from ldm.evaluation.scoring import Scorer, load_scorer
from ldm.evaluation.statistics import Estimate
from ldm.files import RECORD
from ldm.pipeline import Generator
from ldm.sheets import mask_panel
from ldm.util import UserError

MEAN = Extractor("mean", "mean color", _transform(8, 8, (0, 0, 0), (1, 1, 1)), lambda x: x.mean(dim=(2, 3)),
                 lambda texts: torch.tensor([[1.0, 0.0, 0.0]]).expand(len(texts), 3), {"weights": "none"})
SCORER = Scorer((MEAN,), None, False, ())
AXES = ("mean_t", "mean_i")


def sweep_file(world: SmallWorld, folder: Path, **changes: object) -> Path:
    """Writes the configuration of a sweep over the small world's one concept."""
    (folder / "prompts.txt").write_text("a {} in the snow\na {} on the beach\n")
    manual = ['method.prefix=""', 'method.suffix=""', "method.template=photo of a {}"]
    content = {"model_files": [str(world.folder / "model.yaml")], "sampling": ["steps=2", "batch_size=1"],
               "training_files": [str(world.folder / "method.yaml")], "prompts": str(folder / "prompts.txt"),
               "sampling_files": [str(world.folder / "sampling.yaml")], "methods": {"manual": manual, "ICO": []},
               "concept_files": [str(world.folder / "concept.yaml")], "seeds": 1,
               "steps": [1, 2], "method": "ICO", "step": 2, "strength": 1.0, "strengths": [1.0], "lambdas": [0, 1],
               "agg_times": [0.5, 1.0], "nouns": {"preset": None, "by context": "auto"}, "gains": [500], **changes}
    OmegaConf.save(OmegaConf.create(content), folder / "sweep.yaml")
    return folder / "sweep.yaml"


@pytest.fixture
def config(small_world: SmallWorld, tmp_path: Path) -> SweepConfig:
    return merge(SweepConfig, [sweep_file(small_world, tmp_path)])


JOBS = [Job("thing", "ICO", 1), Job("thing", "ICO", 1, 1.0), Job("thing", "ICO", 2)]


# Resuming.

def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(config: SweepConfig, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sweep(config, tmp_path / "whole", SCORER).run(JOBS)
    generate, taught = Generator.generate, []

    def interrupted(self: Generator, *arguments: object) -> Iterator:
        for number, sample in enumerate(generate(self, *arguments)):
            if number:
                raise KeyboardInterrupt
            yield sample

    fine_tune = training.fine_tune
    monkeypatch.setattr(training, "fine_tune", lambda *given: taught.append(given[1]) or fine_tune(*given))
    monkeypatch.setattr(Generator, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        Sweep(config, tmp_path / "cut", SCORER).run(JOBS)
    (first,) = (tmp_path / "cut" / "pictures").rglob("*.png")
    stamp = first.stat().st_mtime_ns
    assert not (tmp_path / "cut" / "points").exists() and taught == [None]
    monkeypatch.setattr(Generator, "generate", generate)
    resumed = Sweep(config, tmp_path / "cut", SCORER).run(JOBS)
    assert first.stat().st_mtime_ns == stamp and taught == [None]          # neither drawn nor taught twice
    assert resumed == whole
    images = [{name: data for name, data in contents(tmp_path / run / "pictures").items()} for run in ("whole", "cut")]
    assert images[0] == images[1] and len(images[0]) == 6

    monkeypatch.setattr(Sweep, "draw", None)                               # all that is left is reading
    assert Sweep(config, tmp_path / "cut", SCORER).run(JOBS) == whole
    monkeypatch.undo()
    other = Scorer((Extractor(**{**MEAN.__dict__, "name": "other"}),), None, False, ())
    monkeypatch.setattr(Generator, "generate", None)                       # other metrics measure the same images
    assert "other_t" in Sweep(config, tmp_path / "cut", other).run(JOBS)[JOBS[0]][0]


def test_what_is_damaged_is_set_aside_and_made_again(config: SweepConfig, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    whole, out = Sweep(config, tmp_path / "whole", SCORER).run(JOBS), tmp_path / "out"
    sweep = Sweep(config, out, SCORER)
    sweep.run(JOBS)
    drawn = contents(out / "pictures")
    point, image = sweep.store.path(JOBS[0]), sweep.store.image(JOBS[1], 0, 0)
    (run,) = (out / "runs").glob("*/2*")
    point.write_text(point.read_text()[:40])
    image.write_bytes(image.read_bytes()[:20])
    assert Sweep(config, out, SCORER).run(JOBS) == whole
    assert {path.name for path in out.rglob("*.damaged")} == {f"{point.name}.damaged", f"{image.name}.damaged"}
    told = capsys.readouterr().out
    assert f"{point.name}' is damaged; it is kept as" in told and f"{image.name}' is damaged; it is kept as" in told

    state = run / "checkpoints" / "last.ckpt"       # only met where the run is needed: something has to be drawn
    state.write_bytes(state.read_bytes()[:100])
    image.unlink()
    assert Sweep(config, out, SCORER).run(JOBS) == whole
    assert f"{run.name}' holds a damaged file; it is kept as" in capsys.readouterr().out
    kept = {name: data for name, data in contents(out / "pictures").items() if not name.endswith(".damaged")}
    assert kept == drawn


def test_results_follow_what_lists_name(small_world: SmallWorld, config: SweepConfig, tmp_path: Path) -> None:
    """A changed photo or caption outside the concept's folder is another experiment."""
    for name, color in (("photos/a.png", "red"), ("class/b.png", "blue")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), color).save(tmp_path / name)
    (tmp_path / "photos.txt").write_text("photos/a.png\n")
    for name, text in (("images.txt", "class/b.png\n"), ("caption.txt", "a cat\n"), ("words.txt", "a cat\n")):
        (tmp_path / name).write_text(text)
    concept = OmegaConf.load(small_world.folder / "concept.yaml")
    concept.concepts[0] |= {"images": str(tmp_path / "photos.txt"), "regularization": str(tmp_path / "images.txt")}

    def key() -> str:
        OmegaConf.save(concept, tmp_path / "listed.yaml")
        changed = OmegaConf.merge(config, {"concept_files": [str(tmp_path / "listed.yaml")]})
        return Sweep(changed, tmp_path / "out", SCORER).store.training_key(JOBS[0])

    keys = [key(), key()]
    assert keys[0] == keys[1]
    Image.new("RGB", (32, 32), "green").save(tmp_path / "photos/a.png")
    keys.append(key())
    Image.new("RGB", (32, 32), "green").save(tmp_path / "class/b.png")
    keys.append(key())
    (tmp_path / "caption.txt").write_text("a dog\n")
    keys.append(key())
    concept.concepts[0].regularization_caption = str(tmp_path / "words.txt")
    keys.append(key())
    (tmp_path / "words.txt").write_text("a dog\n")
    keys.append(key())
    assert len(set(keys)) == 6


def test_processes_share_the_work(small_world: SmallWorld, tmp_path: Path, call_script: Call,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards everything is on disk; a mistake in any of them is told as if it had happened here."""
    concept = OmegaConf.load(small_world.folder / "concept.yaml")
    concept.concepts[0].name = "other"
    OmegaConf.save(concept, tmp_path / "other.yaml")
    file = sweep_file(small_world, tmp_path, concept_files=[str(small_world.folder / "concept.yaml"),
                                                            str(tmp_path / "other.yaml")])
    config, metrics = merge(SweepConfig, [file]), (["small_clip"], {})
    jobs = [Job(name, "ICO", step) for name in ("thing", "other") for step in (1, 2)]
    sweep = Sweep(config, tmp_path / "out", load_scorer(*metrics))
    share_out(sweep, metrics, jobs, workers=2)
    monkeypatch.setattr(Sweep, "draw", None)                               # all that is left is reading
    rows = Sweep(config, tmp_path / "out", load_scorer(*metrics)).run(jobs)
    assert [len(rows[job]) for job in jobs] == [2] * 4
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2
    with pytest.raises(UserError, match="metric 'smell' is unknown"):
        share_out(sweep, (["smell"], {}), jobs, workers=2)
    assert "--workers is 0" in call_script("tradeoff", "-b", file, "--workers", "0").error


def test_a_killed_sweep_takes_its_processes_along() -> None:
    """Without it they drew on for nobody."""
    code = ("import multiprocessing, os, time\nfrom concurrent.futures import ProcessPoolExecutor\n"
            "from experiments.sweep import end_with_parent\n"
            "pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), end_with_parent)\n"
            "print(pool.submit(os.getpid).result(), flush=True)\npool.submit(time.sleep, 100).result()\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": path})
    child = int(parent.stdout.readline())
    os.kill(child, 0)                   # it is there
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and alive(child):
        time.sleep(0.1)
    assert not alive(child)


def alive(process: int) -> bool:
    """Says whether a process runs; one that has ended and waits to be fetched does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_longer_run_goes_on_from_the_shorter(config: SweepConfig, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    resumed, fine_tune = [], training.fine_tune
    monkeypatch.setattr(training, "fine_tune", lambda *given: resumed.append(given[1]) or fine_tune(*given))
    sweep = Sweep(config, tmp_path / "out", SCORER)
    short = sweep.runs.concept_file(Job("thing", "ICO", 1), [Job("thing", "ICO", 1)])
    long = sweep.runs.concept_file(Job("thing", "ICO", 3), [Job("thing", "ICO", 3)])
    assert (short.name, long.name) == ("step-000001.safetensors", "step-000003.safetensors")
    assert resumed == [None, short.parent.parent] and long.parent == short.parent
    # Step 2 was passed without being kept (both runs saved every 1 and 3 steps): only a new run reaches it.
    assert sweep.runs.concept_file(Job("thing", "ICO", 2), [Job("thing", "ICO", 2)]).is_file()
    assert resumed[2] is None


def test_runs_differ_by_their_seed_and_are_pooled(config: SweepConfig, tmp_path: Path) -> None:
    twice = merge(SweepConfig, [tmp_path / "sweep.yaml"], ["runs=2", "steps=[1]"])
    sweep = Sweep(twice, tmp_path / "out", SCORER)
    jobs = jobs_of(CLAIMS["tradeoff"], sweep)
    assert [(job.method, job.run) for job in jobs] == [("manual", 0), ("manual", 1), ("ICO", 0), ("ICO", 1)]
    assert [job.run for job in jobs_of(CLAIMS["replaced"], sweep) if job.method == BASE] == [0, 0]
    # Run 1 is what another first seed teaches, and its images are of the same prompts and seeds.
    (subject,) = subjects(twice)
    seed = subject.training(twice, "ICO").trainer.seed
    assert subject.training(twice, "ICO", run=1).trainer.seed == seed + 1
    other = Sweep(merge(SweepConfig, [tmp_path / "sweep.yaml"], [f"training=[trainer.seed={seed + 1}]"]),
                  tmp_path / "out", SCORER)
    assert other.store.path(Job("thing", "ICO", 1)) == sweep.store.path(jobs[3]) != sweep.store.path(jobs[2])
    report = run_claim(CLAIMS["tradeoff"], sweep)
    assert "2 fine-tuning runs x 2 prompts" in report.text
    rows = [json.loads(line) for line in (report.folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["run"]) for row in rows] == [(job.method, job.run) for job in jobs for _ in range(2)]
    first, second = ([row["mean_i"] for row in rows if row["method"] == "ICO" and row["run"] == run] for run in (0, 1))
    assert first != second
    summary = json.loads((report.folder / "summary.json").read_text())["points"]["ICO, 1 steps"]
    assert summary["mean_i"]["mean"] == pytest.approx(sum(first + second) / 4) and summary["mean_i"]["units"] == 2
    with pytest.raises(UserError, match="runs is 0"):
        jobs_of(CLAIMS["tradeoff"], Sweep(merge(SweepConfig, [tmp_path / "sweep.yaml"], ["runs=0"]), tmp_path, SCORER))


def test_images_are_named_by_what_decides_them(config: SweepConfig, tmp_path: Path) -> None:
    sweep = Sweep(config, tmp_path, SCORER)
    keys = [sweep.store.key(job) for job in (JOBS[0], JOBS[1], JOBS[2], Job("thing", "manual", 1),
                                       Job("thing", "ICO", 1, 1.0, ("dci.agg_time=1.0",)),
                                       Job("thing", "ICO", 1, words=NOUN), Job("thing", BASE, 0, words=NOUN))]
    assert len(set(keys)) == 7
    assert sweep.store.key(Job("thing", "ICO", 1, 1.0, ("dci.agg_time=0.5",))) == keys[1]      # what it is anyway
    faster = merge(SweepConfig, [tmp_path / "sweep.yaml"], ['sampling=[steps=2,batch_size=2]'])
    slower = merge(SweepConfig, [tmp_path / "sweep.yaml"], ['sampling=[steps=3,batch_size=1]'])
    assert Sweep(faster, tmp_path, SCORER).store.key(JOBS[0]) == keys[0]
    assert Sweep(slower, tmp_path, SCORER).store.key(JOBS[0]) != keys[0]


def test_what_lies_in_the_folders_decides_too(config: SweepConfig, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 40), "red").save(photos / "a.png")
    merged = OmegaConf.merge(OmegaConf.structured(SweepConfig), config,
                             {"training": [f"concepts.0.images={photos}"], "held_out": str(tmp_path)})
    (tmp_path / "thing").mkdir()
    Image.new("RGB", (40, 40), "green").save(tmp_path / "thing" / "a.png")

    def names() -> tuple[str, str]:
        sweep = Sweep(merged, tmp_path / "out", SCORER)
        return sweep.store.training_key(JOBS[0]), sweep.store.path(JOBS[0]).name

    first = names()
    assert names() == first
    Image.new("RGB", (40, 40), "blue").save(photos / "a.png")                # the same name, another photo
    other = names()
    assert other[0] != first[0]
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "thing" / "a.png")    # another unseen image: measured again
    assert names()[0] == other[0] and names()[1] != other[1]
    (tmp_path / "thing").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"held_out: there is no folder '.*thing'"):
        Sweep(merged, tmp_path / "out", SCORER)


def test_fidelity_is_measured_on_the_photos_that_teach(config: SweepConfig, tmp_path: Path) -> None:
    photos, unseen = tmp_path / "photos", tmp_path / "unseen" / "thing"
    for folder, chosen in ((photos, "images/red.png"), (unseen, "images/blue.png")):
        (folder / "images").mkdir(parents=True)
        for color in ("red", "blue"):
            Image.new("RGB", (40, 40), color).save(folder / "images" / f"{color}.png")
        (folder / "images.txt").write_text(f"{chosen}\n")
    concept = {"concepts": [{"name": "thing", "images": str(photos), "class_noun": "cat"}]}
    OmegaConf.save(OmegaConf.create(concept), tmp_path / "concept.yaml")
    image = Image.new("RGB", (8, 8), "red")
    for held_out, similarity in ((None, 1), (str(tmp_path / "unseen"), 0)):
        changed = OmegaConf.merge(OmegaConf.structured(SweepConfig), config,
                                  {"concept_files": [str(tmp_path / "concept.yaml")], "held_out": held_out})
        sweep = Sweep(changed, tmp_path / "out", SCORER)
        sweep.check(JOBS)
        rows = sweep.measure(JOBS[0], [image, image])
        assert [row["mean_i"] for row in rows] == pytest.approx([similarity] * 2, abs=1e-6)


def test_images_of_another_noun_are_compared_with_its_own_text(config: SweepConfig, tmp_path: Path) -> None:
    sweep, jobs = Sweep(config, tmp_path, SCORER), [Job("thing", "ICO", 1, words=words) for words in (NOUN, AUXILIARY)]
    subject = sweep.subjects["thing"]
    assert JOBS[0].said(subject) == jobs[0].said(subject) == ["a cat in the snow", "a cat on the beach"]
    assert jobs[1].said(subject) == jobs[1].prompts(subject) == ["a dog in the snow", "a dog on the beach"]


@pytest.mark.parametrize(("prompt", "settings", "message"), [
    ("a {} in the snow", "dci.replace_noun=cat", "is the class noun itself"),
    ("a{} in the snow", "dci.agg_time=0.5", "run into the concept"),
    ("{}s in the snow", "dci.agg_time=0.5", "run into the concept"),
    ("a {}", "dci.ablation=no_full_prompt", "says nothing but the concept")])
def test_prompts_that_cannot_be_drawn_are_refused_first(config: SweepConfig, tmp_path: Path, prompt: str,
                                                        settings: str, message: str) -> None:
    (tmp_path / "prompts.txt").write_text(f"a {{}} on the beach\n{prompt}\n")
    sweep = Sweep(config, tmp_path / "out", SCORER)
    with pytest.raises(UserError, match=message):
        sweep.check([JOBS[0], Job("thing", "ICO", 1, 1.0, (settings,))])
    sweep.check([JOBS[0]])                                                   # without DCI they can be


def test_work_counts_unet_rows(config: SweepConfig, tmp_path: Path) -> None:
    sweep = Sweep(config, tmp_path, SCORER)                    # 2 prompts, 1 seed, 2 steps, half of them joint
    assert [sampling_rows(sweep.store, job) for job in JOBS] == [2 * 2 * 2, 2 * 2 * (2 + 0.5 * 2), 2 * 2 * 2]
    shared = Job("thing", "ICO", 1, 1.0, ("dci.guidance=shared",))
    matched = Job("thing", "ICO", 1, 1.0, ("dci.match_cost=true",))
    assert (sampling_rows(sweep.store, shared), sampling_rows(sweep.store, matched)) == (2 * 2 * 2.5, 2 * 2 * 2)
    # Two steps of an image and a class image come on top, three times the work of drawing.
    assert shares(sweep.runs, JOBS) == {JOBS[0]: (3 * 2 * 1 * 2, 8), JOBS[1]: (0, 12), JOBS[2]: (0, 8)}
    assert steps_of(JOBS[0], [*JOBS, Job("other", "ICO", 9)]) == [1, 2]


def test_what_is_left_is_told_when_it_is_measured() -> None:
    base, other = Job("thing", BASE, 0), Job("other", "ICO", 1)
    pace = Pace({base: (0, 10), JOBS[0]: (100, 8), JOBS[1]: (0, 12), other: (50, 20)})
    assert pace.seconds() is None and str(pace) == ""                # nothing was done
    pace.finish(base, Stored(rows=[], seconds=5.0, taught=0.0))
    assert pace.seconds() is None                                   # nor was anything taught, and that is another rate
    pace.finish(JOBS[0], Stored(rows=[], seconds=204.0, taught=200.0))
    # Fine-tuning takes 2 s a row, sampling (5 + 4) / (10 + 8) s.
    assert pace.seconds() == 50 * 2 + (12 + 20) * 0.5 and str(pace) == "about 01:56 left; "
    pace.finish(JOBS[1], Stored(rows=[], seconds=6.0, taught=0.0))
    pace.finish(other, Stored(rows=[], seconds=0.0, taught=0.0))
    assert pace.seconds() == 0
    halved = Pace({base: (0, 10), JOBS[1]: (0, 12)}, workers=2)
    halved.finish(base, Stored(rows=[], seconds=5.0, taught=0.0))
    assert halved.seconds() == 3


@pytest.mark.parametrize(("intervals", "text"), [
    ([(0.1, 0.3), (-0.2, -0.1)], ""), ([], ""), ([(None, None), (None, None)], "Nothing is decided: one prompt"),
    ([(0.1, 0.3), (-0.2, 0.1)], "Not decided with 24 images a point: 1 of 2 differences")])
def test_a_report_says_what_it_does_not_decide(intervals: list[tuple[float | None, float | None]], text: str) -> None:
    estimates = [Estimate(0.0, low, high) for low, high in intervals]
    comparisons = [Comparison("a", "b", *estimates, (0, 0), 1)] if estimates else []
    said = experiment.verdict(comparisons, None, 24)
    assert said.startswith(text) and bool(said) == bool(text)


def test_a_plot_says_what_it_shows() -> None:
    assert experiment.plot_title(CLAIMS["dci"], 24) == (
        "Does DCI beat the raw model of the same concept file at equal U-Net work?\n"
        "dci (Fig. 6), 24 images a point, 95 % intervals")


# What is drawn.

@pytest.mark.parametrize("name", ["tiny", "sd-v1"])
def test_shipped_sweeps_can_be_carried_out(name: str) -> None:
    config = merge(SweepConfig, [ROOT / "configs" / "sweep" / f"{name}.yaml"])
    methods = {scheme: training_of(config, scheme).method for scheme in config.methods}
    pairs = {"ICO 1/1/3": "manual n=3", "ICO 3/1/2": "manual n=2", "ICO 3/1/1": "manual n=1"}
    embedded = {"ICO 1/1/6": "manual n=6"} if name == "tiny" else {}
    assert like_with_like(config, methods) == pairs | embedded
    for scheme, method in methods.items():
        contexts, _, words = scheme.removeprefix("ICO ").removeprefix("manual n=").rpartition("/")
        assert len(method.words) == int(words) and len(method.prefix.split()) == int(contexts[:1] or 0)
    if name == "sd-v1":
        rare = ["ucd</w>", "pll", "ktn"]
        assert all(method.initial_words == rare[-len(method.words):] for method in methods.values())
    points = {point for claim in [SWEEP, *CLAIMS.values()] for line in claim.lines(config) for point in line.points}
    for point in points:
        typed(point.sampling(config))


def test_a_sweep_takes_a_checkpoint_by_its_flag(small_world: SmallWorld, tmp_path: Path, call_script: Call,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taught and drawn with; the small world's model file names another, which would be there."""
    file = sweep_file(small_world, tmp_path)
    outcome = call_script("tradeoff", "-b", file, "--ckpt", tmp_path / "none.ckpt", "--outdir", tmp_path / "out")
    assert f"'{tmp_path / 'none.ckpt'}' does not exist" in outcome.err
    asked = []

    def run(self: Sweep, jobs: list[Job]) -> None:
        asked.append((self, jobs[0]))
        raise UserError("enough")

    monkeypatch.setattr(Sweep, "run", run)
    call_script("tradeoff", "-b", file, "--ckpt", small_world.checkpoint, "--outdir", tmp_path / "out")
    ((sweep, job),) = asked
    assert sweep.store.settings(job).base.ckpt == str(small_world.checkpoint)
    assert sweep.subjects["thing"].training(sweep.config, "ICO").base.ckpt == str(small_world.checkpoint)


def test_a_missing_plot_library_is_told_before_any_work(small_world: SmallWorld, tmp_path: Path, call_script: Call,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    outcome = call_script("tradeoff", "-b", sweep_file(small_world, tmp_path), "--outdir", tmp_path / "out")
    assert "pip install matplotlib" in outcome.error and not (tmp_path / "out").exists()


def test_other_words_in_the_concepts_place() -> None:
    subject = Subject("s", "owl", ("a {} in the snow", "{}"), Path("."))
    assert Job("s", "m", 1).prompts(subject) == ["a {} in the snow", "{}"]
    assert Job("s", "m", 1, words=NOUN).prompts(subject) == ["an owl in the snow", "owl"]
    assert Job("s", "m", 1, words=AUXILIARY).prompts(subject) == ["a cat in the snow", "cat"]


def test_tuned_weights_draw_plain_texts_and_the_base_is_restored(config: SweepConfig, tmp_path: Path) -> None:
    sweep = Sweep(config, tmp_path / "out", SCORER)
    jobs = [Job("thing", "ICO", 2, words=NOUN), Job("thing", BASE, 0, words=NOUN)]
    rows = sweep.run(jobs)
    images = [(tmp_path / "out" / rows[job][0]["picture"]).read_bytes() for job in jobs]
    assert images[0] != images[1]
    assert rows[jobs[0]][0]["prompt"] == "a {} in the snow" and rows[jobs[0]][0]["seed"] == config.first_seed
    assert sweep.generator.concept is None


def test_subjects(config: SweepConfig, small_world: SmallWorld, tmp_path: Path) -> None:
    (subject,) = subjects(config)
    assert (subject.name, subject.class_noun, subject.references) == ("thing", "cat", small_world.photos)
    (tmp_path / "unseen" / "thing").mkdir(parents=True)
    (subject,) = subjects(merge(SweepConfig, [tmp_path / "sweep.yaml"], [f"held_out={tmp_path / 'unseen'}"]))
    assert subject.references == tmp_path / "unseen" / "thing"
    entry = {"instance_data_dir": str(small_world.photos), "class_prompt": "cat", "prompt_filename": "prompts.txt"}
    (tmp_path / "dataset.json").write_text(json.dumps([entry]))
    (subject,) = subjects(merge(SweepConfig, [tmp_path / "sweep.yaml"],
                                [f"dataset={tmp_path / 'dataset.json'}", "prompts=null", "concept_files=[]"]))
    training = subject.training(config, "ICO")
    assert subject.prompts == ("a {} in the snow", "a {} on the beach")
    assert (training.concepts[0].name, training.concepts[0].images) == ("photos", str(small_world.photos))


# Comparisons with known answers.

def made_rows(point: Job, values: dict[tuple[str, str], tuple[float, float]]) -> list[dict]:
    return [{"concept": concept, "prompt": prompt, "mean_t": x, "mean_i": y}
            for (concept, prompt), (x, y) in values.items()]


def test_comparisons_by_hand() -> None:
    raw, joint = Job("", "ICO", 1), Job("", "ICO", 1, 1.0)
    units = [("a", "snow"), ("a", "beach"), ("b", "snow")]
    rows = {raw: made_rows(raw, dict(zip(units, [(0.2, 0.9), (0.4, 0.9), (0.6, 0.9)], strict=True))),
            joint: made_rows(joint, dict(zip(units, [(0.5, 0.8), (0.7, 0.8), (0.6, 0.8)], strict=True)))}
    lines = [Line("raw", (raw,), ("",)), Line("DCI", (joint,), ("x",), "raw")]
    (found,) = compare(lines, rows, AXES)
    assert (found.name, found.baseline) == ("DCI, x", "raw")
    assert found.editability.mean == pytest.approx(0.2) and found.fidelity.mean == pytest.approx(-0.1)
    assert found.fidelity.excludes_zero and (found.fidelity.low, found.fidelity.high) == pytest.approx((-0.1, -0.1))
    assert (found.rose, found.concepts) == ((1, 0), 2)                     # concept b did not rise
    assert compare_curves(lines, rows, AXES) is None                       # points are no curves


def test_what_stands_beside_a_comparison_by_hand() -> None:
    """Class noun and CLIP-I of all images; fidelity of those that are right in both points alone."""
    raw, joint = Job("", "ICO", 1), Job("", "ICO", 1, 1.0)

    def rows_of(values: list[tuple[float, float, float, float]]) -> list[dict]:
        return [{"concept": "a", "run": 0, "prompt": prompt, "seed": seed, "judge_edit": right, "judge_noun": noun,
                 "small_clip_t": 0.0, "small_clip_i": alike, "efficientnet_i": fidelity}
                for (prompt, seed), (right, noun, alike, fidelity)
                in zip([("snow", 1), ("snow", 2), ("beach", 1)], values, strict=True)]

    rows = {raw: rows_of([(1, 1, 0.5, 0.6), (0.5, 1, 0.5, 0.9), (1, 0, 0.5, 0.5)]),
            joint: rows_of([(1, 1, 0.4, 0.5), (1, 0, 0.4, 0.1), (1, 1, 0.2, 0.6)])}
    lines = [Line("raw", (raw,), ("",)), Line("DCI", (joint,), ("",), "raw")]
    columns = ["judge_edit", "judge_noun", "small_clip_t", "small_clip_i", "efficientnet_i"]
    (found,) = compare(lines, rows, ("judge_edit", "efficientnet_i"), columns)
    assert list(found.beside) == ["judge_noun", "small_clip_i", BOTH_RIGHT]
    means = [found.beside[name].mean for name in found.beside]
    # Prompts count alike: of noun (-1/2, 1), of CLIP-I (-0.1, -0.3); seed 2 of the snow was not right without DCI.
    assert means == pytest.approx([0.25, -0.2, 0.0])
    table = comparison_table([found], {"judge_edit": "right", "judge_noun": "noun", "small_clip_i": "CLIP-I",
                                       "efficientnet_i": "likeness"}, ("judge_edit", "efficientnet_i"))
    assert table.splitlines()[0] == ("| difference [95 % interval] | right | rose in | likeness | rose in | noun | "
                                     "CLIP-I | likeness, images right in both |")


def test_areas_of_lines() -> None:
    lines, rows = [], {}
    for label, shift in (("manual", 0.0), ("ICO", 0.5)):
        jobs = tuple(Job("", label, step) for step in (1, 2))
        lines.append(Line(label, jobs, ("1", "2"), "manual" if shift else None))
        for job, (x, y) in zip(jobs, ((0.0, 1.0), (1.0, 0.0)), strict=True):
            rows[job] = made_rows(job, {("a", "snow"): (x + shift, y + shift), ("a", "moon"): (x + shift, y + shift)})
    lines.append(Line("single", (Job("", "ICO", 1),), ("",)))
    areas = compare_curves(lines, rows, AXES)
    assert areas.box == (1.5, 1.5) and list(areas.areas) == ["manual", "ICO"]
    # manual: a triangle of sides 2/3; ICO: level to 1/3 at height 1, then down to 1/3 at 1.
    assert areas.areas["manual"].mean == pytest.approx(2 / 9)
    assert areas.areas["ICO"].mean == pytest.approx(1 / 3 + 2 / 3 * (1 + 1 / 3) / 2)
    assert areas.differences["ICO", "manual"].excludes_zero


def test_every_claim_is_made_of_legal_jobs(tmp_path: Path) -> None:
    config = merge(SweepConfig, [ROOT / "configs" / "sweep" / "tiny.yaml", ROOT / "configs" / "sweep" / "quick.yaml"])
    for claim in (*CLAIMS.values(), SWEEP):
        lines = claim.lines(config)
        labels = [line.label for line in lines]
        known = (None, *labels, CHOSEN) if claim.chosen else (None, *labels)
        assert len(set(labels)) == len(labels) and all(line.baseline in known for line in lines), claim.name
        for point in {point for line in lines for point in line.points}:
            settings = point.sampling(config)
            assert settings.dci.use == (point.strength is not None) and not settings.plain
            assert point.method == BASE or point.method in config.methods
    assert like_with_like(config, schemes(config)) == {"ICO 1/1/6": "manual n=6"}
    whole = merge(SweepConfig, [ROOT / "configs" / "sweep" / "tiny.yaml"])
    assert like_with_like(whole, whole.methods) == {
        "ICO 1/1/6": "manual n=6", "ICO 1/1/3": "manual n=3", "ICO 3/1/2": "manual n=2", "ICO 3/1/1": "manual n=1"}
    raw, joint = CLAIMS["dci"].lines(config)
    assert all(point.sampling(config).dci.match_cost for point in joint.points) and raw.points[0].strength is None
    assert {point.sampling(config).steps for line in (raw, joint) for point in line.points} == {config.work_steps}
    three = CLAIMS["methods"].lines(config)
    assert [(line.label, line.baseline) for line in three] == [
        ("manual n=6", None), ("ICO 1/1/6", "manual n=6"), ("ICO 1/1/6 + DCI", "ICO 1/1/6")]
    assert [line.points[0].strength for line in three] == [None, None, config.strength]
    assert {line.points[0].step for line in three} == {config.step}
    found = {concept.class_noun for concept in subjects(config)}
    assert len(found) == 3 and all(len(subject.prompts) == 8 for subject in subjects(config))
    assert len(subjects(merge(SweepConfig, [ROOT / "configs" / "sweep" / "tiny.yaml"]))) >= 6


def test_all_claims_write_their_reports(config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: Sweep, job: Job, jobs: object, bar: object = None) -> list[Image.Image]:
        """Paints solid images instead of sampling them."""
        found = []
        for prompt in range(len(self.subjects[job.concept].prompts)):
            shade = hash((job.method, job.step, job.strength, job.settings)) % 200
            image = Image.new("RGB", (8, 8), (200 - prompt, shade, 30))
            path = self.store.image(job, prompt, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            found.append(image)
        return found

    monkeypatch.setattr(Sweep, "draw", draw)
    monkeypatch.setattr(experiment, "draw_masks", lambda *given: "| masks |")
    sweep, reports = Sweep(config, tmp_path / "out", SCORER), []
    for claim in (*CLAIMS.values(), SWEEP):
        reports.append(run_claim(claim, sweep, "the command"))
        report = reports[-1]
        files = set(contents(tmp_path / "out" / claim.name))
        plots = set() if claim.masks else {"plot.png"}                     # one point would be a dot in an empty plot
        assert files == plots | {"rows.jsonl", "rows.csv", "summary.json", "sheet.png", "report.md"}
        summary = json.loads((report.folder / "summary.json").read_text())
        assert summary["command"] == "the command" and summary["minutes"] >= 0
        assert claim.question in report.text and ("| masks |" in report.text) == claim.masks
        compared = sum(len(line.points) for line in claim.lines(config) if line.baseline)
        assert len(report.comparisons) == compared + claim.chosen
    whole = overview(reports, sweep, "the command").read_text()
    assert whole.count("\n| dci | ") == 2 and f"# {len(reports)} experiments" in whole
    for target in re.findall(r"\]\((.*?)\)", whole):             # links still lead to the images
        assert (tmp_path / "out" / target).is_file(), target
    rows = (tmp_path / "out" / "dci" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 2 * 2 and {json.loads(row)["seed"] for row in rows} == {1000}


def test_the_chosen_point_has_each_image_of_the_strength_that_the_rule_picks(
        config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The redder an image, the closer to a prompt (MEAN): lambda 1's on the first prompt, lambda 0's on the other."""
    def draw(self: Sweep, job: Job, jobs: object, bar: object = None) -> list[Image.Image]:
        red = {None: (90, 90), 0.0: (100, 160), 1.0: (120, 150)}[job.strength]
        found = []
        for prompt in range(2):
            path = self.store.image(job, prompt, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            found.append(Image.new("RGB", (8, 8), (red[prompt], 90, 90)))
            found[-1].save(path)
        return found

    monkeypatch.setattr(Sweep, "draw", draw)
    sweep = Sweep(OmegaConf.merge(config, {"sampling": [*config.sampling, "dci.choice.margin=2"]}), tmp_path, SCORER)
    report = run_claim(CLAIMS["chosen"], sweep)
    rows = [json.loads(line) for line in (report.folder / "rows.jsonl").read_text().splitlines()]
    assert [row["strength"] for row in rows if row.get("chosen")] == [1.0, 0.0]
    assert [item.name for item in report.comparisons] == ["lambda 0", "lambda 1", "lambda chosen"]


def test_a_sheet_shows_every_concept_and_like_beside_like(tmp_path: Path) -> None:
    def things(count: int, prompts: int) -> list[Subject]:
        return [Subject(f"thing {i}", "thing", tuple(map(str, range(prompts))), tmp_path) for i in range(count)]

    assert sheet_rows(things(2, 2)) == [("thing 0", "0"), ("thing 0", "1"), ("thing 1", "0"), ("thing 1", "1")]
    for count, prompts in [(6, 16), (3, 8), (7, 2), (1, 16), (2, 7)]:
        shown = sheet_rows(things(count, prompts))
        assert len(set(shown)) == len(shown) == 12
        assert len({name for name, _ in shown}) == count and {"0"} <= {prompt for _, prompt in shown}
        assert max(int(prompt) for _, prompt in shown) >= prompts - 2
    points_ = tuple(Job("", "ICO", step) for step in (1, 2, 3))
    three, four, ten = ([Line(str(i), points_, ("1", "2", "3")) for i in range(count)] for count in (3, 4, 10))
    assert sheet_columns(three) == tuple((line, index) for line in three for index in range(3))
    assert sheet_columns(four) == tuple((line, index) for line in four for index in (0, 2))
    assert sheet_columns(ten) == tuple((line, 2) for line in ten[:9])

    def over(count: int) -> Line:
        return Line("over lambda", tuple(Job("", "ICO", 1, strength) for strength in range(count)), ("",) * count)

    shown = {tuple(index for _, index in sheet_columns([over(count)])) for count in (9, 17, 18)}
    assert shown == {tuple(range(9)), tuple(range(0, 17, 2)), (0, 2, 4, 6, 8, 11, 13, 15, 17)}
    short = Line("raw", points_[:1], ("",))
    assert sheet_columns([short, over(9)])[1:] == tuple((over(9), index) for index in (0, 1, 2, 3, 5, 6, 7, 8))
    assert [index for _, index in sheet_columns([short, over(5), over(5)])] == [0, 0, 1, 3, 4, 0, 1, 3, 4]


def test_a_plot_says_once_what_all_curves_say() -> None:
    def curve(label: str, *places: tuple[float, float, str]) -> Curve:
        return Curve(label, [(Estimate(x), Estimate(y), mark) for x, y, mark in places])

    long, short = curve("long", (0, 0, "a"), (1, 0, "b")), curve("short", (0, 0, "a"), (0.5, 0, "b"))
    alone, other = curve("alone", (5, 9, "")), curve("other", (0, 0, "a"), (9, 0, "c"))
    assert marked([short, long]) == [long] and marked([alone, short, long]) == [long]
    assert marked([long, other]) == [long, other] and marked([alone]) == [alone]
    # Both axes count alike: a tenth of a wide one is less than all of a narrow one.
    high = curve("high", (0, 0, "a"), (0, 0.01, "b"))
    assert marked([curve("wide", (0, 0, "a"), (1, 0, "b")), curve("far", (10, 0, "a"), (10, 0, "b")), high]) == [high]


def test_a_plots_legend_stays_inside_and_its_marks_lie_apart() -> None:
    def draw(*curves: Curve):
        figure = tradeoff_figure(curves, "agreement", "similarity", "title")
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, page, boxes = legend.get_window_extent(), figure.bbox, [text.get_window_extent() for text in
                                                                     figure.axes[0].texts]
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
        assert not any(box.count_overlaps(boxes[:index]) for index, box in enumerate(boxes))
        return legend, figure.axes[0].texts

    labels = [f"separate guidance, independent noise {index}" for index in range(4)]
    legend, _ = draw(*(Curve(label, [(Estimate(0.9), Estimate(index), "")]) for index, label in enumerate(labels)))
    assert legend.get_title().get_text() == ""
    draw(Curve("a method with " + "many " * 60 + "words", [(Estimate(0), Estimate(0), "")]))
    places = [(0.954, 0.4955, "0"), (0.9688, 0.4925, "0.3"), (0.97, 0.4922, "0.5"), (0.97, 0.4922, "0.6")]
    curve = Curve("phase", [(Estimate(x), Estimate(y), mark) for x, y, mark in places])
    legend, texts = draw(curve)
    assert [text.get_text() for text in texts] == ["0", "0.3", "0.5", "0.6"] and legend.get_title().get_text() == ""
    legend, texts = draw(curve, Curve("short", curve.points[:1] * 4), Curve("other", curve.points[::-1]))
    assert len(texts) == 12 and legend.get_title().get_text() == ""        # marks differ: each curve says its own
    short = Curve("short", [(Estimate(0.96), Estimate(0.49), mark) for *_, mark in places])
    legend, texts = draw(curve, short)
    assert len(texts) == 4 and legend.get_title().get_text() == "markers grow along a curve, from 0 to 0.6"


def test_points_join_concepts() -> None:
    jobs = [Job("a", "ICO", 1), Job("b", "ICO", 1), Job("a", "ICO", 2)]
    assert rows_by_point({job: [{"n": index}] for index, job in enumerate(jobs)}) == {
        Job("", "ICO", 1): [{"n": 0}, {"n": 1}], Job("", "ICO", 2): [{"n": 2}]}


# The command.

def test_claims_from_the_command_line(call_script: Call, small_world: SmallWorld, metric_options: list[str],
                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = []
    monkeypatch.setattr(experiment, "mask_panel", lambda *given: panels.append(given) or mask_panel(*given))
    file = sweep_file(small_world, tmp_path)
    command = ["tradeoff", "claim", "masks", "-b", file, "seeds=1", *metric_options, "--outdir", tmp_path / "out"]
    outcome = call_script(*command)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "out" / "masks"
    assert set(contents(folder)) == {"rows.jsonl", "rows.csv", "summary.json", "sheet.png", "report.md",
                                     "masks/thing.png", RECORD, f"masks/{RECORD}"}
    ((image, _, title),) = panels
    assert title == "a [thing] in the snow (seed 1000, lambda 1)"
    with Image.open(next((tmp_path / "out" / "pictures").rglob("000-00.png"))) as drawn:    # it is that very image
        assert drawn.tobytes() == image.tobytes()
    text = (folder / "report.md").read_text()
    assert "1 concepts x 2 prompts x 1 seeds" in text and "| 8 x 8 |" in text
    assert "![masks of thing](masks/thing.png)" in text and "plot.png" not in text
    assert "sweep: 100%" in outcome.err and f"report: {folder / 'report.md'}" in outcome.out
    again = call_script(*command)
    assert again.status == 0 and "fine-tuning" not in again.err
    (folder / RECORD).unlink()
    assert call_script(*command).status == 0                        # so an earlier version leaves it
    (folder / "summary.json").write_text("{}")
    (folder / RECORD).unlink()
    monkeypatch.setattr(Sweep, "run", lambda *_: pytest.fail("it works before it refuses"))
    assert "holds 'rows.jsonl', which was not made here" in call_script(*command).error


def test_help_keeps_its_lines_and_names_every_claim(call_script: Call) -> None:
    outcome = call_script("tradeoff", "--help")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert outcome.status == 0 and [*CLAIMS, "all"] in lines
    assert {"NAME", "dci"} <= {line[3] for line in lines if line[:3] == ["python", "scripts/tradeoff.py", "claim"]}


@pytest.mark.parametrize(("arguments", "message"), [
    (["claim"], "no claim is named; claims: tradeoff, dci"), (["claim", "nothing"], "claim 'nothing' is unknown"),
    (["dci"], "'dci' is neither 'claim' nor an override"),
    (["claim", "dci", "method=none"], "method 'none' is unknown"),
    (["claim", "dci", "strenght=1"], "did you mean 'strength'"), (["claim", "dci", "concept_files=[]"], "no concepts"),
    (["claim", "dci", "prompts=null"], "has no prompts"),
    (["claim", "dci", "sampling=[steps=0]"], "steps is 0"), (["--metrics", "dino"], "DINO ViT-S/16's weights")])
def test_bad_input(call_script: Call, small_world: SmallWorld, metric_options: list[str], tmp_path: Path,
                   arguments: list[str], message: str) -> None:
    options = [] if "--metrics" in arguments else metric_options
    outcome = call_script("tradeoff", *arguments, "-b", sweep_file(small_world, tmp_path), *options, "--outdir",
                          tmp_path / "out")
    assert message in outcome.error


def test_two_sides_are_needed(config: SweepConfig, tmp_path: Path) -> None:
    blind = Scorer((Extractor(**{**MEAN.__dict__, "encode_texts": None}),), None, False, ())
    with pytest.raises(UserError, match="needs a metric of prompt agreement"):
        run_claim(CLAIMS["dci"], Sweep(config, tmp_path, blind))
    assert [claim.name for claim in find_claims(["all"])] == list(CLAIMS)


def test_prompts_that_ask_nothing_the_judge_knows(config: SweepConfig, tmp_path: Path, metric_files: dict[str, Path],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a {} of stone\n")
    judge = load_scorer(["judge"], {"judge": metric_files["judge"]}).judge
    sweep = Sweep(config, tmp_path / "out", Scorer((MEAN,), judge, False, ()))
    monkeypatch.setattr(Sweep, "draw", None)                               # nothing is drawn for that
    with pytest.raises(UserError, match="can be said of no prompt"):
        run_claim(CLAIMS["masks"], sweep)


# The automatic auxiliary noun.

def test_auto_chooses_another_noun_by_context(small_world: SmallWorld) -> None:
    model, _ = small_world.build()
    embedder = model.cond_stage_model
    chosen = noun_for_context(embedder, "cat", ["a photo of a ", " in the snow"])
    assert chosen in CONTEXT_NOUNS and chosen != "cat"
    states = {}
    for text in ["in the snow", *(f"a photo of a {noun}" for noun in CONTEXT_NOUNS)]:
        ids = embedder.tokenize([text])
        end = ids[0].tolist().index(embedder.tokenizer.eos_token_id)
        states[text] = torch.nn.functional.normalize(embedder([text])[0, end], dim=0)
    near = {noun: float(states["in the snow"] @ states[f"a photo of a {noun}"])
            for noun in CONTEXT_NOUNS if noun != "cat"}
    assert near[chosen] == pytest.approx(max(near.values()), abs=1e-6)
    assert noun_for_context(embedder, chosen, ["a photo of a ", " in the snow"]) != chosen
    assert noun_for_context(embedder, "cat", ["", ""]) == "dog"           # nothing to go by: the preset's
