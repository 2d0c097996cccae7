"""Which Python the commands choose, when they install, and that the lists of packages agree with each other."""
from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import packaging
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "dirname", "sh")
# Poses as a Python of another version when it is asked for its own; all else is done by the one that runs the tests.
PYTHON_STUB = f"""#!/bin/sh
version="${{STUB_VERSION:-3, 12}}"
if [ "$1" = -c ]; then exec '{sys.executable}' -c "import sys; sys.version_info = ($version, 0); $2"; fi
if [ "$1" = --version ]; then echo "Python $version"; exit; fi
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

    root: Path
    tools: Path
    wheels: Path

    @property
    def venv(self) -> Path:
        """The repository's own environment."""
        return self.root / ".venv"

    def ask(self, core: str = "", test: str = "", pins: str = "", retrieval: str = "") -> None:
        """Writes the requirements of pyproject.toml (one each) and the text of both lists of pins."""
        (self.root / "pyproject.toml").write_text(
            f"[project]\nname = 'small'\ndependencies = {[core] if core else []}\n[project.optional-dependencies]\n"
            f"test = {[test] if test else []}\nretrieval = {[retrieval] if retrieval else []}\n")
        for name in ("requirements.txt", "requirements-retrieval.txt"):
            (self.root / name).write_text(pins)

    def environment(self, **changes: str) -> dict[str, str]:
        """Returns the variables a command runs under: nothing of pip's or Python's comes from outside."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("PIP_", "PYTHON", "UV_")) and name not in ("VIRTUAL_ENV", "BASH_ENV")}
        return kept | {"PATH": str(self.tools), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels),
                       "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1",
                       "UV_LOG": str(self.root.parent / "uv.log"), **changes}

    def bash(self, *command: str, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs bash with the arguments `command`."""
        return subprocess.run(["bash", *command], cwd=cwd or self.root.parent, env=self.environment(**changes),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def choose(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs scripts/environment.sh; its output is the chosen Python."""
        return self.bash(str(self.root / "scripts/environment.sh"), *words, **changes)


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


@pytest.fixture(scope="module")
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Checkout]:
    """Returns a maker of small repositories; their paths hold a space."""
    wheels = tmp_path_factory.mktemp("wheels")
    write_wheel(wheels, "1.0")
    write_wheel(wheels, "2.0")

    def make() -> Checkout:
        folder = tmp_path_factory.mktemp("checkout")
        checkout = Checkout(folder / "a repository", folder / "bin", wheels)
        for name in ("scripts/environment.sh", "scripts/environment.py", "tests/run.sh"):
            (checkout.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout.root / name)
        (checkout.root / "ldm").mkdir()
        (checkout.root / "ldm/__init__.py").touch()
        checkout.tools.mkdir()
        for tool in TOOLS:
            if (path := shutil.which(tool)) is not None:
                (checkout.tools / tool).symlink_to(path)
        stub(checkout, "python3", PYTHON_STUB)
        return checkout

    return make


def stub(checkout: Checkout, name: str, text: str) -> None:
    """Puts an executable script on the PATH."""
    (checkout.tools / name).write_text(text)
    (checkout.tools / name).chmod(0o755)


@pytest.fixture
def checkout(make_checkout: Callable[[], Checkout]) -> Checkout:
    """A small repository without any environment of its own."""
    return make_checkout()


@pytest.fixture(scope="module")
def first_run(make_checkout: Callable[[], Checkout]) -> tuple[Checkout, subprocess.CompletedProcess[str]]:
    """A repository whose first command installed its one pin, and what that command said; not to be changed."""
    checkout = make_checkout()
    checkout.ask(core="madeup>=1", pins="madeup==1.0\n")
    return checkout, checkout.choose()


@pytest.fixture
def installed(first_run: tuple[Checkout, subprocess.CompletedProcess[str]], checkout: Checkout) -> Checkout:
    """A repository in which madeup 1.0 is installed, to be changed at will."""
    checkout.ask(core="madeup>=1", pins="madeup==1.0\n")
    shutil.copytree(first_run[0].venv, checkout.venv, symlinks=True)
    return checkout


def site_packages(checkout: Checkout) -> Path:
    """Returns the folder that holds what is installed in .venv."""
    return next(checkout.venv.glob("lib/python*/site-packages"))


def assert_ready(checkout: Checkout, version: str = "1.0") -> None:
    """Asserts that .venv imports madeup of that version, and that the next command uses it without a word."""
    run = checkout.choose()
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{checkout.venv}/bin/python\n", "")
    shown = subprocess.run([run.stdout.strip(), "-c", "import madeup; print(madeup.VERSION)"], text=True,
                           capture_output=True)
    assert shown.stdout.strip() == version


@pytest.mark.parametrize("words", [(), ("test",)])
@pytest.mark.parametrize("version", ["3, 11", "3, 14", "3, 15"])
def test_an_active_environment_that_has_everything_is_used_in_silence(checkout: Checkout, words: tuple,
                                                                      version: str) -> None:
    checkout.ask(core="packaging>=20", test="pytest>=7", pins="madeup==1.0\n")
    run = checkout.choose(*words, STUB_VERSION=version)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{sys.executable}\n", "")
    assert not checkout.venv.exists()


def test_the_first_run_says_so_and_installs_the_pins(
        first_run: tuple[Checkout, subprocess.CompletedProcess[str]]) -> None:
    checkout, run = first_run
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{checkout.venv}/bin/python\n"
    for word in ("requirements.txt", str(checkout.venv), f"{sys.executable} lacks madeup", "6 GB", "a few minutes"):
        assert word in run.stderr.splitlines()[0]
    assert "Successfully installed madeup-1.0" in (checkout.venv / "install.log").read_text()
    assert_ready(checkout)


def test_the_test_extra_is_asked_for_only_by_the_tests(installed: Checkout) -> None:
    installed.ask(core="packaging>=20", test="madeup==2.0", pins="madeup==1.0\n")
    assert installed.choose().stdout == f"{sys.executable}\n"
    installed.ask(core="madeup>=1", test="packaging>=20", pins="madeup==1.0\n")
    assert installed.choose().stderr == ""  # madeup is in .venv
    assert "Installing" in installed.choose("test").stderr  # packaging is nowhere to be had: no wheel of it
    installed.ask(core="madeup>=1", test="madeup>=1", pins="madeup==1.0\n")
    assert "Installing" in installed.choose("test").stderr
    assert installed.choose("test").stderr == ""
    assert_ready(installed)  # with the extra there is enough without it, too


def test_a_package_out_of_range_is_not_enough(checkout: Checkout) -> None:
    checkout.ask(core="pytest>=1000")
    said = subprocess.run([sys.executable, checkout.root / "scripts/environment.py", "--check"], text=True,
                          capture_output=True, env=checkout.environment())
    assert (said.returncode, said.stdout) == (1, f"has pytest {pytest.__version__}, not >=1000\n")


def cut_short(checkout: Checkout) -> None:
    """Leaves what a kill in the middle of a package leaves: metadata, but not its last files."""
    (site_packages(checkout) / "madeup.py").unlink()
    (checkout.venv / ".installed").write_text("")


def lose_package(checkout: Checkout) -> None:
    """Leaves the note, but not the package."""
    (site_packages(checkout) / "madeup.py").unlink()
    shutil.rmtree(site_packages(checkout) / "madeup-1.0.dist-info")


def date_back(checkout: Checkout) -> None:
    """Leaves what this script's first version made, and a pin that changed since."""
    (checkout.venv / ".installed").rename(checkout.venv / ".installed-0123456789ab")
    lose_package(checkout)


def lose_python(checkout: Checkout) -> None:
    """Leaves links to a Python that is gone."""
    for path in (checkout.venv / "bin").glob("python*"):
        path.unlink()
        path.symlink_to("/nowhere/python")


@pytest.mark.parametrize(("damage", "afresh"), [(cut_short, True), (date_back, True), (lose_python, True),
                                                (lose_package, False)])
def test_an_incomplete_venv_is_mended(installed: Checkout, damage: Callable[[Checkout], None], afresh: bool) -> None:
    (site_packages(installed) / "of_the_user.py").touch()
    damage(installed)
    run = installed.choose()
    assert run.returncode == 0 and "Installing" in run.stderr, run.stderr
    assert_ready(installed)
    assert (site_packages(installed) / "of_the_user.py").exists() is not afresh


def test_a_complete_venv_made_by_hand_is_used_as_it_is(installed: Checkout) -> None:
    (installed.venv / ".installed").unlink()
    before = sorted(installed.venv.rglob("*"))
    assert_ready(installed)
    assert sorted(installed.venv.rglob("*")) == before


def test_changed_pins_are_installed_over_the_old(installed: Checkout) -> None:
    installed.ask(core="madeup>=1", pins="madeup==2.0\n")
    assert "Installing" in installed.choose(PYTHON=str(installed.venv / "bin/python")).stderr   # activated, too
    assert_ready(installed, "2.0")


def test_a_failure_is_short_and_the_next_run_takes_it_up(installed: Checkout) -> None:
    installed.ask(core="madeup>=1", pins="madeup==3.0\n")
    run = installed.choose()
    assert (run.returncode, run.stdout) == (1, "")
    assert "No matching distribution found for madeup==3.0" in run.stderr
    assert str(installed.venv / "install.log") in run.stderr.splitlines()[-1]
    assert len(run.stderr.splitlines()) <= 5
    assert "Installing" in installed.choose().stderr
    installed.ask(core="madeup>=1", pins="madeup==1.0\n")
    assert_ready(installed)     # as it was before: a failure alone loses nothing


def test_of_two_runs_at_once_one_installs(installed: Checkout) -> None:
    pytest.importorskip("fcntl")
    lose_package(installed)
    command = ["bash", installed.root / "scripts/environment.sh"]
    runs = [subprocess.Popen(command, env=installed.environment(), stdin=subprocess.DEVNULL, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [path for path, _ in said] == [f"{installed.venv}/bin/python\n"] * 2
    assert sum("Installing" in line for _, line in said) == 1
    assert_ready(installed)


@pytest.mark.parametrize("version", ["2, 7", "3, 10"])
def test_a_python_that_is_too_old_is_refused_in_a_sentence(checkout: Checkout, version: str) -> None:
    checkout.ask(core="madeup>=1", pins="madeup==1.0\n")
    run = checkout.choose(STUB_VERSION=version)
    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"Python 3.11 to 3.14 is needed, but python3 is Python {version}; ")
    assert "environment.yaml" in line
    (checkout.tools / "python3").unlink()
    assert "but python3 is missing;" in checkout.choose().stderr


@pytest.mark.parametrize("version", ["3, 10", "3, 15"])
def test_of_several_pythons_one_that_the_pins_are_known_for_is_taken(checkout: Checkout, version: str) -> None:
    stub(checkout, "python3.13", '#!/bin/sh\n[ "$1" = -c ] || echo taken\n')
    assert checkout.choose(STUB_VERSION=version).stdout == "taken\n"


def test_a_chosen_python_that_cannot_serve_is_named(installed: Checkout) -> None:
    assert "but /nowhere/python is missing;" in installed.choose(PYTHON="/nowhere/python").stderr
    run = installed.choose(PYTHON=str(installed.tools / "python3"))
    assert run.stdout == f"{installed.venv}/bin/python\n"
    assert run.stderr == f"Using {installed.venv}, because {sys.executable} lacks madeup.\n"


def test_uv_installs_where_there_is_one_and_chooses_the_builds_unless_told(checkout: Checkout) -> None:
    checkout.ask(core="madeup>=1", pins="madeup==1.0\n")
    stub(checkout, "uv", UV_STUB)
    run = checkout.choose()                     # PyTorch's own index is out of reach here
    assert run.returncode == 0 and "Failed to fetch" not in run.stderr, run.stderr
    assert_ready(checkout)
    made, refused, done = (checkout.root.parent / "uv.log").read_text().splitlines()
    assert made.startswith("venv ") and "--seed" in made and made.endswith(f" {checkout.venv}")
    assert refused == f"{done} --torch-backend auto"
    assert done == f"pip install --python {checkout.venv}/bin/python -r {checkout.root}/requirements.txt"
    lose_package(checkout)
    assert "Failed" not in checkout.choose(UV_TORCH_BACKEND="cpu").stderr
    assert_ready(checkout)


def test_uv_brings_a_python_where_there_is_none(checkout: Checkout) -> None:
    checkout.ask(core="packaging>=20")
    stub(checkout, "uv", UV_STUB)
    assert checkout.choose(STUB_VERSION="3, 8").stdout == f"{sys.executable}\n"
    assert "--python >=3.11,<3.15" in (checkout.root.parent / "uv.log").read_text()


def test_retrieval_has_an_environment_of_its_own(checkout: Checkout) -> None:
    stub(checkout, "python3.12", PYTHON_STUB)       # for where the tests run on a later one
    checkout.ask(core="packaging>=20", retrieval="madeup>=1", pins="madeup==1.0\n")
    run = checkout.choose("retrieval")
    assert run.stdout == f"{checkout.root}/.venv-retrieval/bin/python\n", run.stderr
    assert "requirements-retrieval.txt" in run.stderr and not checkout.venv.exists()
    assert checkout.choose("retrieval").stderr == ""
    checkout.ask(retrieval="packaging>=20")                                 # the active one has all it takes
    assert checkout.choose("retrieval").stdout == f"{sys.executable}\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts/environment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "environment", module)
    spec.loader.exec_module(module)
    return module


def test_a_python_too_new_for_retrieval_looks_for_an_older_one(script: ModuleType,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14))
    assert script.base_python((3, 12), "uv") == ">=3.11,<3.13"
    monkeypatch.setattr(script, "works", lambda name, *rest: name == "python3.11")
    assert script.base_python((3, 12), None) == "python3.11"
    monkeypatch.setattr(script, "works", lambda *command: False)
    with pytest.raises(SystemExit, match=r"Python 3\.11 to 3\.12 is needed for this, .* python3\.12 or python3\.11 on"):
        script.base_python((3, 12), None)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_installer_is_heard_while_it_works(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str], terminal: bool) -> None:
    monkeypatch.setattr(script, "TICK", 0.2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    code = "import time; print('Downloading torch', flush=True); time.sleep(1.5); print('ERROR: no space'); exit(1)"
    assert script.watch([sys.executable, "-c", code], tmp_path / "log", ()) is False
    said = capsys.readouterr().err
    assert "s, 0 packages; Downloading torch" in said
    assert script.last_lines(tmp_path / "log", 1) == "ERROR: no space"
    assert ("\r" in said) is terminal
    assert script.watch([sys.executable, "-c", ""], tmp_path / "log", ()) is True
    assert capsys.readouterr().err.strip("\r\033[K") == ""


def test_sourcing_sets_two_variables_and_leaks_nothing(checkout: Checkout, tmp_path: Path) -> None:
    checkout.ask(core="packaging>=20", test="madeup>=1")
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/__init__.py").touch()  # another checkout's, in the folder the command is given in
    script = tmp_path / "caller.sh"
    script.write_text("""before="$(set -o; declare -F)"
source "$1/scripts/environment.sh"
[[ "$before" == "$(set -o; declare -F)" ]] && echo "$PYTHON" && echo "$root$extra$venv" \\
    && "$PYTHON" -P -c 'import ldm; print(ldm.__file__)'
""")
    run = checkout.bash(str(script), str(checkout.root), cwd=tmp_path)
    assert (run.stdout.splitlines(), run.stderr) == ([sys.executable, "", f"{checkout.root}/ldm/__init__.py"], "")


def test_the_test_command_keeps_the_exit_status(checkout: Checkout) -> None:
    checkout.ask(core="packaging>=20", test="pytest>=7")
    (checkout.root / "tests/test_one.py").write_text(
        "def test_good():\n    import ldm\ndef test_bad():\n    assert False\n")
    command = (str(checkout.root / "tests/run.sh"), "-p", "no:cacheprovider", "tests/test_one.py")
    assert checkout.bash(*command, "-k", "good").returncode == 0
    failed = checkout.bash(*command)
    assert failed.returncode == 1 and "1 failed, 1 passed" in failed.stdout
    assert checkout.bash(*command, "-k", "neither").returncode == 5


def pins(name: str) -> dict[str, str]:
    """Returns the version that a list pins for each package, under its normalized name."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"'{line}' in {name} is not a pin"
        found[normalized(match[1])] = match[2]
    return found


def normalized(name: str) -> str:
    """Returns a package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_range_of_pyproject_has_one_pin_within_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = list(map(Requirement, project["dependencies"]))
    core, retrieval = pins("requirements.txt"), pins("requirements-retrieval.txt")
    assert {normalized(wanted.name) for wanted in ranges} == set(core)
    for wanted in ranges:
        assert wanted.specifier.contains(core[normalized(wanted.name)]), wanted
        assert wanted.specifier.contains(retrieval.get(normalized(wanted.name), core[normalized(wanted.name)])), wanted
    (own,) = map(Requirement, project["optional-dependencies"]["retrieval"])
    assert own.specifier.contains(retrieval[own.name]) and set(retrieval) <= {own.name, *core}
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


def test_ci_runs_the_test_command() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "bash tests/run.sh"
