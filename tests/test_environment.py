"""Which Python the commands choose, when they install, and that the lists of packages agree with each other."""
from __future__ import annotations

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

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cut", "dirname", "flock", "grep", "rm", "sh", "tail")
# Poses as a Python that the pins have builds for, whichever runs the tests; all else is done by the real one.
PYTHON_STUB = f"""#!/bin/sh
if [ "$1" = -c ]; then echo "${{STUB_VERSION:-3.12}}"; exit; fi
exec '{sys.executable}' "$@"
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

    def ask(self, core: str = "", test: str = "", pins: str = "") -> None:
        """Writes the requirements of pyproject.toml (one each) and the text of requirements.txt."""
        (self.root / "pyproject.toml").write_text(
            f"[project]\nname = 'small'\ndependencies = {[core] if core else []}\n"
            f"[project.optional-dependencies]\ntest = {[test] if test else []}\n")
        (self.root / "requirements.txt").write_text(pins)

    def environment(self, **changes: str) -> dict[str, str]:
        """Returns the variables a command runs under: nothing of pip's or Python's comes from outside."""
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("PIP_", "PYTHON")) and name not in ("VIRTUAL_ENV", "BASH_ENV")}
        return kept | {"PATH": str(self.tools), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels),
                       "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1", **changes}

    def bash(self, *command: str, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs bash with the arguments `command`."""
        return subprocess.run(["bash", *command], cwd=cwd or self.root.parent, env=self.environment(**changes),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def choose(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs scripts/environment.sh; its output is the chosen Python."""
        return self.bash(str(self.root / "scripts/environment.sh"), *words, **changes)


def write_wheel(folder: Path, version: str) -> None:
    """Writes the package `madeup`, a module with its version, as a wheel."""
    info = f"madeup-{version}.dist-info"
    with zipfile.ZipFile(folder / f"madeup-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("madeup.py", f"VERSION = '{version}'\n")
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
        for name in ("scripts/environment.sh", "scripts/check_environment.py", "tests/run.sh"):
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
    assert not (checkout.venv / ".installed-partly").exists()


@pytest.mark.parametrize("words", [(), ("test",)])
def test_an_active_environment_that_has_everything_is_used_in_silence(checkout: Checkout, words: tuple) -> None:
    checkout.ask(core="packaging>=20", test="pytest>=7", pins="madeup==1.0\n")
    run = checkout.choose(*words)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{sys.executable}\n", "")
    assert not checkout.venv.exists()


def test_the_first_run_says_one_line_and_installs_the_pins(
        first_run: tuple[Checkout, subprocess.CompletedProcess[str]]) -> None:
    checkout, run = first_run
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{checkout.venv}/bin/python\n"
    assert run.stderr.count("\n") == 1
    for word in ("requirements.txt", str(checkout.venv), "python3 lacks madeup", "6 GB", "a few minutes"):
        assert word in run.stderr
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
    said = subprocess.run([sys.executable, checkout.root / "scripts/check_environment.py"], text=True,
                          capture_output=True, env=checkout.environment())
    assert (said.returncode, said.stdout) == (1, f"has pytest {pytest.__version__}, not >=1000\n")


def cut_short(checkout: Checkout) -> None:
    """Leaves what a kill in the middle of a package leaves: metadata, but neither its last files nor RECORD."""
    (site_packages(checkout) / "madeup.py").unlink()
    (site_packages(checkout) / "madeup-1.0.dist-info/RECORD").unlink()
    for path in checkout.venv.glob(".installed-*"):
        path.unlink()
    (checkout.venv / ".installed-partly").touch()


def lose_package(checkout: Checkout) -> None:
    """Leaves the stamp, but not the package."""
    (site_packages(checkout) / "madeup.py").unlink()
    shutil.rmtree(site_packages(checkout) / "madeup-1.0.dist-info")


@pytest.mark.parametrize("damage", [cut_short, lose_package])
def test_an_incomplete_venv_is_mended(installed: Checkout, damage: Callable[[Checkout], None]) -> None:
    damage(installed)
    (site_packages(installed) / "untouched.py").touch()
    run = installed.choose()
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("\n") == 1
    assert_ready(installed)
    assert (site_packages(installed) / "untouched.py").exists()


def lose_python(checkout: Checkout) -> None:
    """Leaves links to a Python that is gone."""
    for path in (checkout.venv / "bin").glob("python*"):
        path.unlink()
        path.symlink_to("/nowhere/python")


def lose_half_of_pip(checkout: Checkout) -> None:
    """Leaves what a kill while .venv was made leaves: no package, and a pip without its last file."""
    lose_package(checkout)
    next(site_packages(checkout).glob("pip-*.dist-info/RECORD")).unlink()
    for path in checkout.venv.glob(".installed-*"):
        path.unlink()


@pytest.mark.parametrize("damage", [lose_python, lose_half_of_pip])
def test_a_broken_venv_is_made_afresh(first_run: tuple, installed: Checkout,
                                      damage: Callable[[Checkout], None]) -> None:
    damage(installed)
    # Making a .venv takes seconds; the stand-in for `python3 -I -m venv --clear DIR` copies one, less its package.
    bare = installed.root.parent / "bare"
    left_out = shutil.ignore_patterns("madeup*", ".installed-*")
    shutil.copytree(first_run[0].venv, bare, symlinks=True, ignore=left_out)
    stub(installed, "python3", f"""#!/bin/sh
if [ "$1 $2 $3 $4" = "-I -m venv --clear" ]; then
    '{shutil.which("rm")}' -r "$5" && exec '{shutil.which("cp")}' -R '{bare}' "$5"
fi
""" + PYTHON_STUB.removeprefix("#!/bin/sh\n"))
    run = installed.choose()
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("\n") == 1
    assert_ready(installed)


def test_a_complete_venv_made_by_hand_is_used_as_it_is(installed: Checkout) -> None:
    for path in installed.venv.glob(".installed-*"):
        path.unlink()
    before = sorted(installed.venv.rglob("*"))
    assert_ready(installed)
    assert sorted(installed.venv.rglob("*")) == before


def test_changed_pins_are_installed_over_the_old(installed: Checkout) -> None:
    installed.ask(core="madeup>=1", pins="madeup==2.0\n")
    assert "Installing" in installed.choose().stderr
    assert_ready(installed, "2.0")


def test_a_failure_is_short_and_the_next_run_takes_it_up(installed: Checkout) -> None:
    installed.ask(core="madeup>=1", pins="madeup==3.0\n")
    run = installed.choose()
    assert (run.returncode, run.stdout) == (1, "")
    assert "No matching distribution found for madeup==3.0" in run.stderr
    assert str(installed.venv / "install.log") in run.stderr.splitlines()[-1]
    assert len(run.stderr.splitlines()) <= 5
    installed.ask(core="madeup>=1", pins="madeup==1.0\n")
    assert "Installing" in installed.choose().stderr
    assert_ready(installed)


def test_pins_below_the_range_are_named(installed: Checkout) -> None:
    installed.ask(core="madeup>=2", pins="madeup==1.0\n")
    run = installed.choose()
    assert run.returncode == 1
    assert "has madeup 1.0, not >=2" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("flock") is None, reason="this system has no flock")
def test_of_two_runs_at_once_one_installs(installed: Checkout) -> None:
    cut_short(installed)
    command = ["bash", installed.root / "scripts/environment.sh"]
    runs = [subprocess.Popen(command, env=installed.environment(), stdin=subprocess.DEVNULL, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert [path for path, _ in said] == [f"{installed.venv}/bin/python\n"] * 2
    assert sum("Installing" in line for _, line in said) == 1
    assert_ready(installed)


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.13"])
def test_a_python_without_builds_of_the_pins_is_refused_in_a_sentence(checkout: Checkout, version: str) -> None:
    checkout.ask(core="madeup>=1", pins="madeup==1.0\n")
    run = checkout.choose(STUB_VERSION=version)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1].startswith("Python 3.11 or 3.12 is needed, ")
    assert f"but python3 is Python {version};" in run.stderr
    assert "environment.yaml" in run.stderr
    (checkout.tools / "python3").unlink()
    assert "there is no python3 on the PATH" in checkout.choose().stderr


def test_a_chosen_python_that_cannot_serve_is_named(installed: Checkout) -> None:
    run = installed.choose(PYTHON="/nowhere/python")
    assert run.stdout == f"{installed.venv}/bin/python\n"
    assert run.stderr == f"Using {installed.venv}, because /nowhere/python cannot be run.\n"


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


def test_the_check_imports_no_package_it_asks_about() -> None:
    code = ("import runpy, sys\ndel sys.argv[0]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit:\n"
            "    pass\nprint(*{'torch', 'numpy', 'transformers', 'ldm'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code, ROOT / "scripts/check_environment.py"], text=True,
                         capture_output=True, check=True)
    assert len(run.stdout.splitlines()) == 2 and run.stdout.splitlines()[1] == ""


def pins() -> dict[str, str]:
    """Returns the version that requirements.txt pins for each package, under its normalized name."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"'{line}' in requirements.txt is not a pin"
        found[normalized(match[1])] = match[2]
    return found


def normalized(name: str) -> str:
    """Returns a package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_range_of_pyproject_has_one_pin_within_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = list(map(Requirement, project["dependencies"] + project["optional-dependencies"]["retrieval"]))
    assert {normalized(wanted.name) for wanted in ranges} == set(pins())
    for wanted in ranges:
        assert wanted.specifier.contains(pins()[normalized(wanted.name)]), wanted
    for wanted in map(Requirement, project["optional-dependencies"]["test"]):
        assert [bound.operator for bound in wanted.specifier] == ["=="], wanted
    assert project["requires-python"] == ">=3.11"  # scripts/check_environment.py says the same
    assert "sys.version_info < (3, 11)" in (ROOT / "scripts/check_environment.py").read_text()


@pytest.mark.parametrize("name, good, bad", [("numpy", ["1.26.0", "2.4.1"], ["1.25.2", "3.0.0"]),
                                             ("transformers", ["4.40.0", "5.9.0"], ["4.39.3", "6.0.0"]),
                                             ("torch", ["2.6.0", "2.11.0+cu130"], ["2.5.1"])])
def test_ranges_hold_the_promised_versions(name: str, good: list[str], bad: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = next(wanted.specifier for wanted in map(Requirement, project["dependencies"]) if wanted.name == name)
    assert all(map(allowed.contains, good)) and not any(map(allowed.contains, bad))


def test_the_conda_environment_takes_its_pins_from_requirements() -> None:
    described = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert described["name"] == "ldm"
    *conda, pip = described["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": ["-r requirements.txt", "-e .[evaluation,test]"]}


def test_ci_runs_the_test_command() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "bash tests/run.sh"
