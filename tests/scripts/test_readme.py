"""Tests that what README and docs tell to type can be typed: files are there, flags are known, the commands run."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, Call, load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OUR_FILES = r"\b(?:configs|ldm|docs|scripts|real_reg/tiny)/[\w./-]+\.(?:yaml|py|md|png|txt)"
QUICK = {"train": ["method.steps=2", "preview.prompts=[]", "trainer.save_every=1"], "sample": ["steps=2"],
         "evaluate": ["steps=2", "--from_file", "configs/prompts/tiny.txt", "--n_samples", "1", "dci.agg_lambda=[1.0]",
                      "--metrics", "judge"]}


def commands(page: Path) -> list[list[str]]:
    """Returns the words of a page's calls of scripts, but for those that leave something out (...)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and words[1].startswith("scripts/") and "..." not in line:
                found.append(words[1:])
    return found


def test_links_and_files_are_there() -> None:
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
        for path in re.findall(OUR_FILES, text):
            assert (ROOT / path).exists() or (page.parent / path).exists(), (page.name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_parse(page: Path, call_script: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag and key is known; of training and sampling the whole configuration is made."""
    monkeypatch.chdir(ROOT)
    for script, *arguments in commands(page):
        name = Path(script).stem
        if name in ("train", "sample") and not {"--resume", "-r"} & set(arguments):
            outcome = call_script(name, *arguments, "--print_config")
            assert outcome.status == 0 and "model:" in outcome.out, (page.name, arguments, outcome.err)
        elif name in SCRIPTS and name != "retrieve":       # whose command line has commands of its own
            load_script(name).parser().parse_command(arguments)


def test_the_usage_runs_on_the_embedded_model(call_script: Call, tmp_path: Path) -> None:
    """README's block, with the embedded model for Stable Diffusion and fewer steps."""
    ours = {"configs/sd-v1.yaml": "configs/tiny.yaml", "configs/sample-sd-v1.yaml": "configs/sample-tiny.yaml",
            "photos/my_cat": "ldm/tiny/concepts/striped_cat"}
    ran = []
    for script, *arguments in commands(ROOT / "README.md"):
        name = Path(script).stem
        words = [ours.get(word, word) for word in arguments if word not in ("--ckpt", "sd-v1-4.ckpt")]
        if ran:
            (run,) = (tmp_path / "logs").iterdir()
            words = [word.replace("logs/<run>", str(run)).replace("<file>", "step-000002.safetensors")
                     for word in words]
        words = [word for word in words if not word.startswith("method.steps")]
        if "--resume" in words:
            words += ["method.steps=3"]
        else:
            words += QUICK[name] + (["-l", tmp_path / "logs"] if name == "train" else ["--outdir", tmp_path / name])
        outcome = call_script(name, *words)
        assert outcome.status == 0, outcome.err
        ran.append(name)
    assert ran == ["train", "train", "sample", "evaluate"]
    assert list((tmp_path / "sample").glob("masks/*.png")) and (tmp_path / "evaluate" / "table.md").is_file()


def test_the_readme_fits_on_two_screens() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1100
