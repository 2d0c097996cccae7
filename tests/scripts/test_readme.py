"""Tests that what README and docs tell to type can be typed: files are there, flags are known, the commands run."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, Call, load_script

README = ROOT / "README.md"
PAGES = [README, ROOT / "real_reg" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OUR_FILES = r"(?<![\w./-])(?:configs|docs|ldm|real_reg|scripts|tests)/[\w./-]*\w"
THEIRS = r"real_reg/(?:my_|samples_|generated)"      # folders that users make
QUICK = {"train": ["method.steps=2", "preview.prompts=[]", "trainer.save_every=1"], "sample": ["steps=2"],
         "evaluate": ["steps=2", "--from_file", "configs/prompts/tiny.txt", "--n_samples", "1", "dci.agg_lambda=[1.0]",
                      "--metrics", "judge"]}


def blocks(page: Path, language: str) -> list[str]:
    """Returns the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Returns the words of a page's calls of scripts; in some, ... stands for options that are left out."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and words[1].startswith("scripts/"):
                found.append(words[1:])
    return found


def check_flags(name: str, arguments: list[str]) -> None:
    """Parses a script's arguments as the script would."""
    script = load_script(name)
    if name != "retrieve":
        script.parser().parse_command(arguments)
    elif arguments[0] in script.COMMANDS:
        script.command_parser(arguments[0]).parse_command(arguments[1:])
    else:
        script.retrieval_parser().parse_command(arguments)


def test_links_and_files_are_there() -> None:
    for page in PAGES:
        text = page.read_text()
        for target, section in re.findall(r"\]\(([^)#]+)(?:#([\w-]+))?\)", text):
            linked = page.parent / target
            assert target.startswith("http") or linked.exists(), (page.name, target)
            if section:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                assert section in [title.lower().replace(" ", "-") for title in titles], (page.name, section)
        for path in re.findall(OUR_FILES, text):
            known = (ROOT / path).exists() or (page.parent / path).exists() or re.match(THEIRS, path)
            assert known, (page.name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page: Path, call_script: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag and key is known; of training and sampling the whole configuration is made."""
    monkeypatch.chdir(ROOT)
    for script, *arguments in commands(page):
        name = Path(script).stem
        given = [word for word in arguments if word != "..."]
        if name in SCRIPTS:
            check_flags(name, given)
        whole = given == arguments and not {"--resume", "-r"} & set(arguments)
        if whole and name in ("train", "sample"):
            outcome = call_script(name, *arguments, "--print_config")
            assert outcome.status == 0 and "model:" in outcome.out, (page.name, arguments, outcome.err)


def test_variables_of_the_two_commands_are_theirs() -> None:
    """README and docs set no variable that train.sh or inference.sh does not read."""
    seen = set()
    for page in PAGES:
        for setting, command in re.findall(r"((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )+)bash (train|inference)\.sh",
                                           page.read_text()):
            for variable in re.findall(r"([A-Z_]+)=", setting):
                assert f'{variable}="${{{variable}:-' in (ROOT / f"{command}.sh").read_text(), (page.name, variable)
                seen.add(variable)
    assert {"CKPT", "DATAPATH", "CLASS_NOUN", "REG_DATAPATH", "PROMPT", "LAMBDAS"} <= seen


def test_the_usage_runs_on_the_embedded_model(call_script: Call, tmp_path: Path) -> None:
    """README's block, with the embedded model for Stable Diffusion and fewer steps."""
    ours = {"configs/sd-v1.yaml": "configs/tiny.yaml", "configs/sample-sd-v1.yaml": "configs/sample-tiny.yaml",
            "photos/my_cat": "ldm/tiny/concepts/striped_cat"}
    ran = []
    for script, *arguments in commands(README):
        name = Path(script).stem
        if name not in QUICK:
            continue
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


def test_what_is_told_of_python_can_be_imported() -> None:
    (code,) = blocks(ROOT / "docs" / "python.md", "python")
    compile(code, "python.md", "exec")
    imports = [line for line in code.splitlines() if line.startswith("from ldm")]
    exec("\n".join(imports), {})
    assert imports


def test_the_readme_fits_on_two_screens_and_names_the_tests() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1100
    assert "`bash tests/run.sh`" in text
