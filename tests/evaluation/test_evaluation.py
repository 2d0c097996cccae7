"""Tests of evaluations end to end: rows, tables and sheets of folders and concept files; missing metrics."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import LABELS, ROOT, Call, SmallWorld, contents
from PIL import Image, PngImagePlugin

from ldm.checkpoint import load_state
from ldm.evaluation import features, image_sets, scoring
from ldm.evaluation.features import LOADERS, Extractor, MissingWeights
from ldm.evaluation.scoring import Scorer, load_scorer
from ldm.evaluation.small_clip import TEXT_PREFIX, embedded, load_small_clip, text_vectors
from ldm.files import RECORD
from ldm.saving import save_safetensors
from ldm.sheets import SETTINGS_KEY, save_png
from ldm.training.run import Run
from ldm.util import UserError

RESULTS = {"rows.jsonl", "rows.csv", "summary.json", "table.md", "sheet.png"}

# Commands.

def test_a_concept_file_is_drawn_and_measured(call_script: Call, small_world: SmallWorld, small_run: Run,
                                              metric_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {} in the snow\na red {} on the beach\n")
    outcome = call_script("evaluate", "--delta_ckpt", small_run.concept, "--from_file", tmp_path / "prompts.txt",
                          "-b", *small_world.sampling_files, "steps=2", "--n_samples", 2, *metric_options,
                          "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["seed"] for row in rows} == {5, 6}
    assert {row["strength"] for row in rows} == {None, 1.0}
    assert all(-1 <= row["small_clip_t"] <= 1 and -1 <= row["small_clip_i"] <= 1 for row in rows)
    snow, beach = ([row for row in rows if place in row["prompt"]] for place in ("snow", "beach"))
    assert {row["judge_colour"] for row in snow} == {None} and None not in {row["judge_colour"] for row in beach}
    assert all(row["class_noun"] == "cat" and row["saw_noun"] in LABELS["noun"] for row in rows)
    with (tmp_path / "out" / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["picture"] for row in table] == [row["picture"] for row in rows]
    assert float(table[3]["small_clip_t"]) == rows[3]["small_clip_t"]
    assert "fine-tuned | DCI, lambda 1 |" in outcome.out
    for scale in ("cosine", "2.5 max(cosine, 0)", "100 max(cosine, 0)"):
        assert f"| CLIP-T, small CLIP, {scale} |" in (tmp_path / "out" / "table.md").read_text()
    assert outcome.out.count("| CLIP-T, ") == 1 and outcome.out.count("Higher is better") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    mean = sum(row["small_clip_i"] for row in rows if row["strength"] is None) / 4
    estimate = summary["metrics"]["fine-tuned"]["small_clip_i"]
    assert estimate["mean"] == pytest.approx(mean) and estimate["units"] == 2 and estimate["low"] <= mean
    judge = summary["measured_by"]["judge"]
    assert (judge["accuracy"], judge["held_out"], len(judge["weights"])) == ({"noun": 0.5}, 4, 16)
    with Image.open(tmp_path / "out" / "sheet.png") as page:                          # reference, two ways
        assert page.width == 3 * (160 + 8) + 8
    again = call_script("evaluate", "--images", tmp_path / "out", "--references", small_world.photos, *metric_options,
                        "--outdir", tmp_path / "again")
    assert again.status == 0, again.err
    close = [json.loads(line) for line in (tmp_path / "again" / "rows.jsonl").read_text().splitlines()]
    assert sorted(row["small_clip_t"] for row in close) == pytest.approx(sorted(row["small_clip_t"] for row in rows))
    assert set(contents(tmp_path / "again")) == {*RESULTS, RECORD}


def test_images_without_prompts_or_references(call_script: Call, metric_options: list[str], tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "p" / "a.png")
    outcome = call_script("evaluate", "--pictures", tmp_path / "p", *metric_options, "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "skipped image alignment" in outcome.out and "skipped text alignment" in outcome.out
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert (row["small_clip_t"], row["small_clip_i"], row["judge_edit"]) == (None, None, None)


def with_settings(path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS_KEY, text)
    Image.new("RGB", (8, 8), "red").save(path, pnginfo=info)


@pytest.mark.parametrize("text", [
    "hello", "[" * 100_000, "[1]", '"text"', "null", '{"prompt": 5}', '{"prompt": ["a"]}', '{"prompt": null}',
    '{"concept": "cat"}', '{"concept": {"class_noun": ["cat"]}}', '{"concept": {"class_noun": "cat\\u001b[31m"}}',
    '{"strength": "much"}', '{"strength": NaN}', '{"strength": 1e999}', '{"strength": 1' + "0" * 400 + "}",
    '{"seed": [1]}', '{"seed": true}', '{"seed": 1.5}', '{"text": "\\ud800"}', '{"sampler": {}}',
    '{"prompt": "' + "a" * 30000 + '"}'], ids=lambda text: text[:30])
def test_settings_inside_a_strangers_image_are_left_out(call_script: Call, metric_options: list[str], tmp_path: Path,
                                                         text: str) -> None:
    """The image is measured without them, and named."""
    (tmp_path / "p").mkdir()
    with_settings(tmp_path / "p" / "a.png", text)
    with_settings(tmp_path / "p" / "b.png", '{"prompt": "a cat", "strength": 1, "what others add": [1, {}]}')
    outcome = call_script("evaluate", "--images", tmp_path / "p", *metric_options, "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if "inside" in line][0].startswith(
        "warning: the settings inside 'a.png' are left out, as they are not what is written here (")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["picture"], row["prompt"]) for row in rows] == [("a.png", None), ("b.png", "a cat")]


def test_results_replace_no_file_of_another(call_script: Call, metric_options: list[str], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the work; our own results are replaced, those too of versions that kept no note of theirs."""
    (tmp_path / "p").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "p" / "a.png")
    out = tmp_path / "out"
    command = ["evaluate", "--images", tmp_path / "p", *metric_options, "--outdir", out]
    assert call_script(*command).status == 0 and call_script(*command).status == 0
    (out / RECORD).unlink()
    assert call_script(*command).status == 0
    (out / "summary.json").write_text('{"mine": 1}')
    (out / RECORD).unlink()
    before = contents(out)
    monkeypatch.setattr(Scorer, "rows", lambda *_: pytest.fail("it measured"))
    assert "holds 'rows.jsonl', which was not made here" in call_script(*command).error
    assert contents(out) == before


def test_a_image_that_goes_between_being_found_and_read(call_script: Call, metric_options: list[str], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / "p" / name)
    list_images = image_sets.list_images

    def find(folder: Path) -> object:
        found = list_images(folder)
        (tmp_path / "p" / "b.png").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(image_sets, "list_images", find)
    outcome = call_script("evaluate", "--images", tmp_path / "p", *metric_options, "--outdir", tmp_path / "out")
    assert f"image '{tmp_path / 'p' / 'b.png'}' does not exist; replace it or take it out" in outcome.error


def test_the_bare_base_model_is_not_called_fine_tuned(call_script: Call, metric_options: list[str],
                                                      tmp_path: Path) -> None:
    plain = {"prompt": "a cat", "strength": None, "seed": 1, "steps": 2, "sampler": "ddim", "scale": 3.0}
    tuned = plain | {"concept": {"words": ["<new1>"], "class_noun": "cat", "step": 2}}
    ways = {"base model": plain, "fine-tuned": tuned, "DCI, lambda 1": tuned | {"strength": 1.0}}
    for number, settings in enumerate(ways.values()):
        save_png(Image.new("RGB", (20, 20), "red"), tmp_path / "p" / f"{number}.png", settings)
    outcome = call_script("evaluate", "--images", tmp_path / "p", *metric_options, "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]) == list(ways)


def test_columns_go_from_plain_to_rising_lambda(call_script: Call, metric_options: list[str], tmp_path: Path) -> None:
    for number, strength in enumerate((0.0, 1.5, -1.0, None)):                  # as files of a run are sorted
        save_png(Image.new("RGB", (20, 20), "red"), tmp_path / "p" / f"{number}.png",
                 {"prompt": "a cat", "strength": strength, "seed": 1, "steps": 2, "sampler": "ddim", "scale": 3.0,
                  "concept": {"words": ["<new1>"], "class_noun": "cat", "step": 2}})
    outcome = call_script("evaluate", "--images", tmp_path / "p", "--metrics", "small_clip", "judge", "kid",
                          *metric_options[metric_options.index("--metric_weights"):], "--outdir", tmp_path / "out")
    assert "| fine-tuned | DCI, lambda -1 | DCI, lambda 0 | DCI, lambda 1.5 |" in outcome.out
    assert outcome.out.count("skipped kid") == 1 and "(fine-tuned; DCI, lambda -1; DCI, lambda 0" in outcome.out


def test_weights_nobody_gave_are_one_line(metric_files: dict[str, Path]) -> None:
    scorer = load_scorer(files={"judge": metric_files["judge"]})
    assert [reason for reason in scorer.skipped if "do not ship" in reason] == [
        "clip_b32, clip_l14, dino: their weights do not ship; give them with --metric_weights METRIC=FILE"]


def test_references_are_read_as_training_reads_them(call_script: Call, metric_options: list[str],
                                                    tmp_path: Path) -> None:
    for place, colors in (("p", ["red"]), ("mine", ["red", "blue"]), ("class/images", ["blue", "green"])):
        (tmp_path / place).mkdir(parents=True)
        for color in colors:
            Image.new("RGB", (20, 20), color).save(tmp_path / place / f"{color}.png")
    (tmp_path / "p" / "images.txt").write_text("none.png\n")                       # of drawn images it says nothing
    (tmp_path / "mine" / "images.txt").write_text("red.png\n")
    (tmp_path / "class" / "images.txt").write_text("images/blue.png\nimages/green.png\n")
    metrics = ["--metrics", "small_clip", "kid", *metric_options[metric_options.index("--metric_weights"):]]
    outcome = call_script("evaluate", "--images", tmp_path / "p", "--references", tmp_path / "mine",
                          "--kid_references", tmp_path / "class", *metrics, "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert row["small_clip_i"] == pytest.approx(1, abs=1e-5)
    assert "here are 1 drawn and 2 to compare with" in outcome.out


def test_a_folder_per_prompt(call_script: Call, metric_options: list[str], tmp_path: Path) -> None:
    for color in ("red", "green"):
        (tmp_path / "p" / f"a_{color}_cat").mkdir(parents=True)
        Image.new("RGB", (20, 20), color).save(tmp_path / "p" / f"a_{color}_cat" / "0.png")
    outcome = call_script("evaluate", "--images", tmp_path / "p", *metric_options, "--outdir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["picture"], row["prompt"]) for row in rows] == [("a_green_cat/0.png", "a green cat"),
                                                                 ("a_red_cat/0.png", "a red cat")]
    with Image.open(tmp_path / "out" / "sheet.png") as page:               # both are there, each once
        shown = {color for _, color in page.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 128, 0)} <= shown


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give either --images FOLDER or --delta_ckpt FILE"),
    (["--images", "{empty}"], "holds no usable image"),
    (["--images", "{full}", "steps=3"], "'steps=3' changes how images are drawn"),
    (["--images", "{full}", "--seed", "3"], "'--seed' changes how images are drawn"),
    (["--images", "{full}", "--from_file", "{lines}"], "'--from_file' changes how images are drawn"),
    (["--delta_ckpt", "none.safetensors", "--prompts", "{lines}"], "with --from_file"),
    (["--delta_ckpt", "none.safetensors", "--references", "{empty}"], "holds no usable image"),
    (["--images", "{full}", "--kid_references", "{full}", "--metrics", "small_clip"], "leaves kid out"),
    (["--images", "{full}", "--metrics", "dino"], "DINO ViT-S/16's weights are not given"),
    (["--images", "{full}", "--metrics", "beauty"], "metric 'beauty' is unknown"),
    (["--images", "{full}", "--metric_weights", "dino"], "must be written METRIC=FILE"),
    (["--images", "{full}", "--metrics", "clip_b32", "--metric_weights", "clip_b32=none.bin"], "does not exist"),
    (["--images", "{full}", "--metrics", "kid"], "no metric can be measured"),
    (["--images", "{full}", "--prompts", "{lines}", "{metrics}"], "class noun"),
    (["--images", "{full}", "--references", "{empty}", "{metrics}"], "holds no usable image"),
    (["--delta_ckpt", "none.safetensors", "{metrics}"], "does not exist")])
def test_bad_input(call_script: Call, metric_options: list[str], tmp_path: Path, arguments: list[str],
                   message: str) -> None:
    names = {"{empty}": tmp_path / "empty", "{full}": tmp_path / "full", "{lines}": tmp_path / "lines.txt"}
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "full" / "a.png")
    (tmp_path / "lines.txt").write_text("a {} in the snow\n")
    known = {"{metrics}": metric_options, **{name: [path] for name, path in names.items()}}
    filled = [part for item in arguments for part in known.get(item, [item])]
    assert message in call_script("evaluate", *filled, "--outdir", tmp_path / "out").error
    assert not (tmp_path / "out").exists()


# Loading metrics.

def test_what_cannot_be_loaded_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch,
                                                   metric_files: dict[str, Path]) -> None:
    def missing(path: Path | None, device: torch.device) -> Extractor:
        raise MissingWeights("no file.")

    monkeypatch.setattr(scoring, "LOADERS", dict.fromkeys(LOADERS, missing))
    scorer = load_scorer(files={"judge": metric_files["judge"]})
    assert scorer.skipped == tuple(f"{name}: no file" for name in LOADERS) and scorer.judge is not None
    assert (scorer.editability, scorer.fidelity) == ("judge_edit", None)
    with pytest.raises(UserError, match="no file"):
        load_scorer(["efficientnet"])


def test_the_small_clip_knows_its_text_tower(metric_files: dict[str, Path], tmp_path: Path) -> None:
    model, embedder = load_small_clip(metric_files["small_clip"], embedded("model.safetensors"))
    vectors = text_vectors(model, embedder, ["a cat", "a cat in the snow", "a cat"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3)) and torch.allclose(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0], vectors[1])
    state = load_state(embedded("model.safetensors"))
    state[f"{TEXT_PREFIX}text_model.final_layer_norm.bias"] += 1
    save_safetensors(tmp_path / "other.safetensors", {k: v for k, v in state.items() if k.startswith(TEXT_PREFIX)})
    with pytest.raises(UserError, match="was not trained with the text tower"):
        load_small_clip(metric_files["small_clip"], tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another kind of file"):
        load_small_clip(tmp_path / "other.safetensors", embedded("model.safetensors"))


def test_vision_networks_load_from_local_files(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    renamed = {f"x{index}": value for index, value in enumerate(model.state_dict().values())}     # in the same order
    torch.save(renamed, tmp_path / "lite0.pth")
    extractor = LOADERS["efficientnet"](tmp_path / "lite0.pth", torch.device("cpu"))
    image = Image.new("RGB", (224, 224), "#804020")
    x = torch.tensor([0x80, 0x40, 0x20]).view(1, 3, 1, 1).expand(1, 3, 224, 224) / 127.5 - 1
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(extractor.images([image]), expected, atol=1e-4)
    save_safetensors(tmp_path / "odd.safetensors", {"x": torch.zeros(3)})
    for name, message in (("efficientnet", "does not hold EfficientNet"), ("dino", "does not fit")):
        with pytest.raises(UserError, match=message):
            LOADERS[name](tmp_path / "odd.safetensors", torch.device("cpu"))


def test_programs_in_disguise_are_refused(tmp_path: Path) -> None:
    import zipfile
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        archive.writestr("model/code/run.py", "")
    with pytest.raises(UserError, match="TorchScript program"):
        LOADERS["clip_b32"](tmp_path / "ViT-B-32.pt", torch.device("cpu"))


def test_what_stands_for_editability_and_fidelity(metric_files: dict[str, Path]) -> None:
    def fake(name: str, texts: bool) -> Extractor:
        return Extractor(name, name, None, None, (lambda texts: None) if texts else None, {})

    judge = load_scorer(["judge"], {"judge": metric_files["judge"]}).judge
    small, b32 = fake("small_clip", True), fake("clip_b32", True)
    lite, dino = fake("efficientnet", False), fake("dino", False)
    for extractors, asked, expected in (
            ((small, lite), judge, ("judge_edit", "efficientnet_i")),
            ((small,), None, ("small_clip_t", "small_clip_i")),
            ((small, lite, b32, dino), judge, ("clip_b32_t", "dino_i")), ((lite,), None, (None, "efficientnet_i"))):
        scorer = Scorer(extractors, asked, False, ())
        assert (scorer.editability, scorer.fidelity) == expected


# Sets.

def test_kid_needs_enough_images(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = features._transform(8, 8, (0, 0, 0), (1, 1, 1))
    mean = Extractor("mean", "mean color", prepare, lambda x: x.mean(dim=(2, 3)), None, {})
    scorer = Scorer((mean,), None, True, ())
    reds, blues = (scorer.features([Image.new("RGB", (8, 8), color)] * 3) for color in ("red", "blue"))
    assert scorer.of_set(reds, None) == {"diversity_mean": pytest.approx(0, abs=1e-6)}
    assert scorer.of_set(reds, blues) == {"diversity_mean": pytest.approx(0, abs=1e-6)}
    assert "here are 3 drawn and 3 to compare with" in scorer.why_no_kid(3, 3)
    monkeypatch.setattr(scoring, "KID_LEAST", 3)
    # k = (x y / 3 + 1)^3: within both sets (4/3)^3, across 1.
    assert scorer.of_set(reds, blues)["kid_mean"] == pytest.approx(2 * (4 / 3) ** 3 - 2)
    assert scorer.why_no_kid(3, 3) is None and Scorer((mean,), None, False, ()).why_no_kid(1, 1) is None


def test_evaluation_prompts_are_the_sweeps(call_script: Call) -> None:
    assert "configs/prompts/evaluation.txt" in (ROOT / "configs" / "sweep" / "tiny.yaml").read_text()
