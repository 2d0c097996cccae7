"""Which Python the commands choose, when they install, and that the lists of packages agree with each other."""
from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import packaging
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Poses as a Python of another version when it is asked for its own; all else is done by the one that runs the tests.
PYTHON_STUB = f"""#!/bin/sh
if [ "$1" = -c ]; then exec '{sys.executable}' -c "import sys; sys.version_info = (${{STUB_VERSION:-3, 12}}, 0); $2"; fi
exec '{sys.executable}' "$@"
"""
# Writes down what it is told and has Python's own tools do it; fails where it should not reach PyTorch's index.
UV_STUB = f"""#!/bin/sh
echo "$@" >> "$UV_LOG"
case "$1 $2 $*" in
    "pip install"*"--torch-backend auto") echo "error: Failed to fetch: torch"; exit 2 ;;
    "pip install"*) target="$4"; shift 4; exec "$target" -I -m pip install "$@" ;;
    venv*) for folder; do :; done; exec '{sys.executable}' -m venv "$folder" ;;
    run*) shift 5; exec '{sys.executable}' "$@" ;;
esac
"""


@dataclass
class Checkout:
    """A small repository that asks for made-up packages, and a PATH that holds only what a test puts there."""

    folder: Path

    @property
    def root(self) -> Path:
        """The repository; its path holds a space."""
        return self.folder / "a repository"

    @property
    def venv(self) -> Path:
        """The repository's own environment."""
        return self.root / ".venv"

    def ask(self, core: str = "madeup>=1", test: str = "pytest>=7", retrieval: str = "madeup>=1",
            pins: str = "madeup==1.0") -> None:
        """Writes the requirements of pyproject.toml (one each) and the text of both lists of pins."""
        (self.root / "pyproject.toml").write_text(
            f"[project]\nname = 'small'\ndependencies = ['{core}']\n[project.optional-dependencies]\n"
            f"test = ['{test}']\nretrieval = ['{retrieval}']\n")
        for name in ("requirements.txt", "requirements-retrieval.txt"):
            (self.root / name).write_text(pins + "\n")

    def run(self, *command: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the folder; nothing of pip's or Python's comes from outside."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("PIP_", "PYTHON", "UV_")) and name not in ("VIRTUAL_ENV", "BASH_ENV")}
        ours = {"PATH": str(self.folder / "bin"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.folder),
                "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1", "UV_LOG": str(self.folder / "uv.log")}
        return subprocess.run(command, cwd=self.folder, env=kept | ours | changes, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True)

    def choose(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs scripts/environment.sh; its output is the chosen Python."""
        return self.run("bash", self.root / "scripts/environment.sh", *words, **changes)

    def stub(self, name: str, text: str) -> None:
        """Puts an executable script on the PATH."""
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)


def write_wheel(folder: Path, version: str) -> None:
    """Writes the package `madeup`, a module with its version, as a wheel; it brings packaging, as transformers does."""
    info = f"madeup-{version}.dist-info"
    with zipfile.ZipFile(folder / f"madeup-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("madeup.py", f"VERSION = '{version}'\n")
        for path in Path(packaging.__path__[0]).glob("*.py"):
            wheel.write(path, f"packaging/{path.name}")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: madeup\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
                                        "Tag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"madeup.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A small repository without any environment of its own; madeup 1.0 and 2.0 can be installed."""
    checkout = Checkout(tmp_path)
    for name in ("scripts/environment.sh", "scripts/environment.py", "tests/run.sh"):
        (checkout.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout.root / name)
    (checkout.root / "ldm").mkdir()
    (checkout.root / "ldm/__init__.py").touch()
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "cat", "dirname", "sh"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    checkout.stub("python3", PYTHON_STUB)
    write_wheel(tmp_path, "1.0")
    write_wheel(tmp_path, "2.0")
    checkout.ask()
    return checkout


@pytest.fixture
def installed(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A repository in which madeup 1.0 is installed, which is done once for all tests."""
    kept = tmp_path_factory.getbasetemp() / "installed"
    if not kept.exists():
        checkout.choose()
        checkout.venv.rename(kept)
    shutil.copytree(kept, checkout.venv, symlinks=True)
    return checkout


def site_packages(checkout: Checkout) -> Path:
    """Returns the folder that holds what is installed in .venv."""
    return next(checkout.venv.glob("lib/python*/site-packages"))


def assert_ready(checkout: Checkout, version: str = "1.0") -> None:
    """Asserts that .venv imports madeup of that version, and that the next command uses it without a word."""
    run = checkout.choose()
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{checkout.venv}/bin/python\n", "")
    shown = checkout.run(run.stdout.strip(), "-c", "import madeup; print(madeup.VERSION)")
    assert shown.stdout == f"{version}\n"


@pytest.mark.parametrize(("words", "version"), [((), "3, 11"), (("test",), "3, 15")])
def test_an_active_environment_that_has_everything_is_used_in_silence(checkout: Checkout, words: tuple[str, ...],
                                                                      version: str) -> None:
    checkout.ask(core="packaging>=20")
    run = checkout.choose(*words, STUB_VERSION=version)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{sys.executable}\n", "")


def test_the_first_run_says_so_and_installs_the_pins(checkout: Checkout) -> None:
    run = checkout.choose()
    assert (run.returncode, run.stdout) == (0, f"{checkout.venv}/bin/python\n"), run.stderr
    for word in ("requirements.txt", str(checkout.venv), f"{sys.executable} lacks madeup", "6 GB", "a few minutes"):
        assert word in run.stderr.splitlines()[0]
    assert "Successfully installed madeup-1.0" in (checkout.venv / "install.log").read_text()
    assert_ready(checkout)


def test_the_test_extra_is_asked_for_only_by_the_tests(installed: Checkout) -> None:
    installed.ask(test="madeup>=1")
    assert installed.choose().stderr == ""
    assert "Installing" in installed.choose("test").stderr
    assert installed.choose("test").stderr == ""
    assert_ready(installed)     # with the extra there is enough without it, too


def test_a_package_out_of_range_is_not_enough(checkout: Checkout) -> None:
    checkout.ask(core="pytest>=1000")
    said = checkout.run(sys.executable, checkout.root / "scripts/environment.py", "--check")
    assert (said.returncode, said.stdout) == (1, f"has pytest {pytest.__version__}, not >=1000\n")


def cut_short(checkout: Checkout) -> None:
    """Leaves what a kill in the middle of a package leaves: metadata, but not its last files."""
    (site_packages(checkout) / "madeup.py").unlink()
    (checkout.venv / ".installed").write_text("")


def hold_another_venv(checkout: Checkout) -> None:
    """Leaves a folder that a user filled."""
    (checkout.venv / ".installed").unlink()
    lose_package(checkout)


def date_back(checkout: Checkout) -> None:
    """Leaves what this script's first version made."""
    (checkout.venv / ".installed").rename(checkout.venv / ".installed-0123456789ab")
    lose_package(checkout)


def lose_package(checkout: Checkout) -> None:
    """Leaves the note, but not the package."""
    (site_packages(checkout) / "madeup.py").unlink()
    shutil.rmtree(site_packages(checkout) / "madeup-1.0.dist-info")


def lose_python(checkout: Checkout) -> None:
    """Leaves links to a Python that is gone."""
    for path in (checkout.venv / "bin").glob("python*"):
        path.unlink()
        path.symlink_to("/nowhere/python")


@pytest.mark.parametrize(("damage", "afresh"), [(cut_short, True), (hold_another_venv, False), (date_back, True),
                                                (lose_python, True), (lose_package, False)])
def test_an_incomplete_venv_is_repaired(installed: Checkout, damage: Callable[[Checkout], None], afresh: bool) -> None:
    (site_packages(installed) / "of_the_user.py").touch()
    damage(installed)
    run = installed.choose()
    assert run.returncode == 0 and "Installing" in run.stderr, run.stderr
    assert_ready(installed)
    assert (site_packages(installed) / "of_the_user.py").exists() is not afresh


def test_a_complete_venv_made_by_hand_is_used_as_it_is(installed: Checkout) -> None:
    (installed.venv / ".installed").unlink()
    assert_ready(installed)


def test_changed_pins_are_installed_over_the_old(installed: Checkout) -> None:
    installed.ask(pins="madeup==2.0")
    assert "Installing" in installed.choose(PYTHON=str(installed.venv / "bin/python")).stderr   # activated, too
    assert_ready(installed, "2.0")


def test_a_failure_is_short_and_the_next_run_takes_it_up(installed: Checkout) -> None:
    installed.ask(pins="madeup==3.0")
    run = installed.choose()
    assert (run.returncode, run.stdout) == (1, "")
    assert "No matching distribution found for madeup==3.0" in run.stderr
    assert str(installed.venv / "install.log") in run.stderr.splitlines()[-1] and len(run.stderr.splitlines()) <= 5
    assert "Installing" in installed.choose().stderr
    installed.ask()
    assert_ready(installed)     # as it was before: a failure alone loses nothing


def test_of_two_runs_at_once_one_installs(installed: Checkout) -> None:
    pytest.importorskip("fcntl")
    lose_package(installed)
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: installed.choose(), range(2)))
    assert [run.stdout for run in runs] == [f"{installed.venv}/bin/python\n"] * 2, runs
    assert sum("Installing" in run.stderr for run in runs) == 1
    assert_ready(installed)


def test_a_python_that_is_too_old_is_refused_in_a_sentence(checkout: Checkout) -> None:
    run = checkout.choose(STUB_VERSION="3, 10")
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"Python 3\.11 to 3\.14 is needed, .*: python3 python .*environment\.yaml\.\n", run.stderr)
    checkout.stub("python3.13", '#!/bin/sh\n[ "$1" = -c ] || echo taken\n')
    assert checkout.choose(STUB_VERSION="3, 10").stdout == "taken\n"


def test_a_chosen_python_that_cannot_serve_is_named(installed: Checkout) -> None:
    assert "there is none among: /nowhere/python;" in installed.choose(PYTHON="/nowhere/python").stderr
    run = installed.choose(PYTHON=str(installed.folder / "bin/python3"))
    assert run.stdout == f"{installed.venv}/bin/python\n"
    assert run.stderr == f"Using {installed.venv}, because {sys.executable} lacks madeup.\n"


def test_uv_installs_where_there_is_one_and_chooses_the_builds_unless_told(checkout: Checkout) -> None:
    checkout.stub("uv", UV_STUB)
    run = checkout.choose()                     # PyTorch's own index is out of reach here
    assert run.returncode == 0 and "Failed to fetch" not in run.stderr, run.stderr
    assert_ready(checkout)
    made, refused, done = (checkout.folder / "uv.log").read_text().splitlines()
    assert made.startswith("venv ") and "--seed" in made and made.endswith(f" {checkout.venv}")
    assert refused == f"{done} --torch-backend auto"
    assert done == f"pip install --python {checkout.venv}/bin/python -r {checkout.root}/requirements.txt"
    lose_package(checkout)
    assert "Failed" not in checkout.choose(UV_TORCH_BACKEND="cpu").stderr
    assert_ready(checkout)


def test_uv_brings_a_python_where_there_is_none(checkout: Checkout) -> None:
    checkout.ask(core="packaging>=20")
    checkout.stub("uv", UV_STUB)
    assert checkout.choose(STUB_VERSION="3, 8").stdout == f"{sys.executable}\n"
    assert "--python >=3.11,<3.15" in (checkout.folder / "uv.log").read_text()


def test_retrieval_has_an_environment_of_its_own(checkout: Checkout) -> None:
    checkout.stub("python3.12", PYTHON_STUB)       # for where the tests run on a later one
    checkout.ask(core="packaging>=20")
    run = checkout.choose("retrieval")
    assert run.stdout == f"{checkout.root}/.venv-retrieval/bin/python\n", run.stderr
    assert "requirements-retrieval.txt" in run.stderr and not checkout.venv.exists()
    assert checkout.choose("retrieval").stderr == ""
    checkout.ask(retrieval="packaging>=20")                                 # the active one has all it takes
    assert checkout.choose("retrieval").stdout == f"{sys.executable}\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/environment.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("environment")


@pytest.mark.parametrize(("uv", "chosen"), [("uv", ">=3.11,<3.13"), (None, "python3.11"), (None, None)])
def test_a_python_too_new_for_the_pins_gives_way(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 uv: str | None, chosen: str | None) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13))
    monkeypatch.setattr(script, "works", lambda name, *rest: name == chosen)
    monkeypatch.setattr(script.subprocess, "run", lambda command, **named: sys.exit(f"ran with {command}"))
    with pytest.raises(SystemExit, match=f"ran with .*'{chosen}'" if chosen else r"Python 3\.11 to 3\.12 .*, or uv"):
        script.make(script.Environment(tmp_path / "venv", tmp_path, [], [], newest=12), uv)


def test_an_installer_is_heard_while_it_works(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "TICK", 0.2)
    code = "import time; print('Downloading torch', flush=True); time.sleep(1.5); print('ERROR: no space'); exit(1)"
    assert script.watch([sys.executable, "-c", code], tmp_path / "log") is False
    assert "s: Downloading torch\n" in capsys.readouterr().err
    assert script.last_lines(tmp_path / "log", 1) == "ERROR: no space"


def test_sourcing_sets_two_variables_and_leaks_nothing(checkout: Checkout) -> None:
    checkout.ask(core="packaging>=20")
    (checkout.folder / "ldm").mkdir()
    (checkout.folder / "ldm/__init__.py").touch()  # another checkout's, in the folder the command is given in
    script = checkout.folder / "caller.sh"
    script.write_text("""before="$(set -o; declare -F)"
source "$1/scripts/environment.sh"
[[ "$before" == "$(set -o; declare -F)" ]] && echo "$PYTHON" && echo "$work$candidates" \\
    && "$PYTHON" -P -c 'import ldm; print(ldm.__file__)'
""")
    run = checkout.run("bash", script, checkout.root)
    assert (run.stdout.splitlines(), run.stderr) == ([sys.executable, "", f"{checkout.root}/ldm/__init__.py"], "")


def test_the_test_command_keeps_the_exit_status(checkout: Checkout) -> None:
    checkout.ask(core="packaging>=20")
    tests = "def test_good():\n    import ldm\ndef test_bad():\n    assert False\n"
    (checkout.root / "tests/test_one.py").write_text(tests)
    command = ("bash", checkout.root / "tests/run.sh", "-p", "no:cacheprovider", "tests/test_one.py")
    assert checkout.run(*command, "-k", "good").returncode == 0
    failed = checkout.run(*command)
    assert failed.returncode == 1 and "1 failed, 1 passed" in failed.stdout


def pins(name: str) -> dict[str, str]:
    """Returns the version that a list pins for each package, under its normalized name."""
    lines = (ROOT / name).read_text().splitlines()
    exact = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in exact}


def test_every_range_of_pyproject_has_one_pin_within_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = list(map(Requirement, project["dependencies"]))
    core, retrieval = pins("requirements.txt"), pins("requirements-retrieval.txt")
    assert {canonicalize_name(wanted.name) for wanted in ranges} == set(core)
    for wanted in ranges:
        name = canonicalize_name(wanted.name)
        assert wanted.specifier.contains(core[name]), wanted
        assert wanted.specifier.contains(retrieval.get(name, core[name])), wanted
    own = list(map(Requirement, project["optional-dependencies"]["retrieval"]))
    assert all(wanted.specifier.contains(retrieval[wanted.name]) for wanted in own)
    assert set(retrieval) <= {*core, *(wanted.name for wanted in own)}
    for wanted in map(Requirement, project["optional-dependencies"]["test"]):
        assert [bound.operator for bound in wanted.specifier] == ["=="], wanted
    assert project["requires-python"] == ">=3.11"  # scripts/environment.sh says the same


@pytest.mark.parametrize("name, good, bad", [("numpy", ["1.26.0", "2.4.1"], ["1.25.2", "3.0.0"]),
                                             ("transformers", ["4.40.0", "5.9.0"], ["4.39.3", "6.0.0"]),
                                             ("torch", ["2.6.0", "2.14.1+cu130"], ["2.5.1"])])
def test_ranges_hold_the_promised_versions(name: str, good: list[str], bad: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = next(wanted.specifier for wanted in map(Requirement, project["dependencies"]) if wanted.name == name)
    assert all(map(allowed.contains, good)) and not any(map(allowed.contains, bad))


def test_the_conda_environment_takes_its_pins_from_requirements() -> None:
    described = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert described["name"] == "ldm"
    *conda, pip = described["dependencies"]
    assert conda == ["python=3.13", "pip"]
    assert pip == {"pip": ["-r requirements.txt", "-e .[evaluation,test]"]}
