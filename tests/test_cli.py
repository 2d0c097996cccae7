"""Tests of how commands end: what the system refuses is a sentence, what is the program's fault keeps its trace."""
from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Call

from ldm import cli
from ldm.util import UserError


def fail_with(error: BaseException) -> Callable[[object], None]:
    def main(_: object) -> None:
        raise error
    return main


@pytest.mark.parametrize(("error", "sentence"), [
    (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "'/a/b': Permission denied; choose another place"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "c"), "'c': File name too long; give a shorter name."),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space, or"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", b"caf\xe9"), "'caf\\udce9': Is a directory; give a file."),
    (OSError(errno.EBADF, "Bad file descriptor", 3), "'3': Bad file descriptor; check it"),
    (OSError(errno.ELOOP, "Too many levels of symbolic links", "d"), "'d': Too many levels of symbolic links; fix"),
    (OSError("words of a library"), "words of a library; check it"), (OSError(), "OSError; check it"),
    (MemoryError(), "memory ran out; close other programs"), (ValueError("embedded null byte"), "a path holds a NUL"),
    (UserError("a name like \x1b[31m\n\u202e is shown"), "a name like \\x1b[31m\\n\\u202e is shown"),
], ids=lambda value: repr(value)[:40])
def test_what_is_no_fault_of_the_program_is_a_sentence(capsys, error, sentence) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(fail_with(error))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith("error: " + sentence)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError(), KeyError("a"), RuntimeError(), RecursionError()],
                         ids=repr)
def test_a_fault_of_the_program_keeps_its_trace(error) -> None:
    with pytest.raises(type(error)) as caught:
        cli.run(fail_with(error))
    assert caught.value is error


@pytest.mark.parametrize("read", [json.loads, yaml.safe_load])
def test_data_nested_too_deeply_is_a_sentence(capsys, read) -> None:
    with pytest.raises(SystemExit):
        cli.run(lambda _: read("[" * 100_000))
    assert "error: a file that was read nests its entries too deeply" in capsys.readouterr().err


def command(code: str, **options: object) -> subprocess.CompletedProcess:
    """Runs a main function of these lines as a script does."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    whole = f"import os, sys\nfrom ldm import cli\ndef main(_):\n{lines}cli.run(main)"
    return subprocess.run([sys.executable, "-c", whole], cwd=ROOT, stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("length", [200_000, 1], ids=["while it writes", "at the end"])
def test_output_that_nobody_reads_ends_a_command_quietly(length) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = command(f"print('x' * {length})", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_output_onto_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "wb") as full:
        done = command("print('text')", stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device; free some space, or choose another disk.\n"


def test_names_that_are_no_text_can_be_said() -> None:
    done = command("print(os.fsdecode(b'caf\\xe9'))\nraise FileNotFoundError(2, 'No such file', b'caf\\xe9')",
                   stdout=subprocess.PIPE)
    assert done.stdout == b"caf\\udce9\n"
    assert done.stderr == b"error: 'caf\\udce9': No such file; check its path.\n"


@pytest.mark.parametrize("arguments", [["evaluate", "--pictures", "~/p"], ["train", "-l", "~someone/logs"],
                                       ["convert", "--out=~/a.safetensors"], ["sample", "base.ckpt=~/a.ckpt"]], ids=str)
def test_a_home_that_no_shell_has_named(call_script: Call, arguments: list[str]) -> None:
    assert f"'{arguments[-1]}' has a ~ that no shell has replaced" in call_script(*arguments).error
