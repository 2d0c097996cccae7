"""Command-line manners all scripts share: option spelling, one-sentence errors, exit status."""
from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from io import TextIOWrapper
from types import TracebackType
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from ldm.flags import BASE_FLAGS, Flag, words_named
from ldm.signals import heeded
from ldm.util import UserError

INTERRUPTED = "interrupted; what was saved before is intact."
_READERS = {"json", "yaml", "omegaconf"}
_RIGHTS = "choose another place, or have the rights to this one changed"
_ADVICE = {errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS, errno.EROFS: _RIGHTS, errno.ENAMETOOLONG: "give a shorter name",
           errno.ENOSPC: "free some space, or choose another disk", errno.ELOOP: "fix the links on its path",
           errno.EISDIR: "give a file", errno.ENOTDIR: "give a folder", errno.ENOENT: "check its path",
           errno.EMFILE: "allow the process more open files (ulimit -n)"}
_TILDE = re.compile(r"([^=]*=)?~[\w-]*/")     # what a shell would have replaced


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Says defaults that say something, and keeps a description's lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return text if silent else f"{text} (default: %(default)s)"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)      # files' names stay whole


class Parser(argparse.ArgumentParser):
    """An argument parser that takes --from-file for --from_file, gathers overrides and errs in a sentence.

    Args:
        description: of the script, for --help.
        configured: takes configuration files and overrides too.
        prog: the command's name in --help, where it is not the script's.
        schema: what the configuration files fill; an option whose help ends in "(a.key)" sets that key, and --help adds
            the key's own meaning, where the option has no text beside it, and its default.
        shipped: the files that give defaults, by what they are for; "" for those used where none are given.
    """

    def __init__(self, description: str | None, configured: bool = True, prog: str | None = None,
                 schema: type | None = None, shipped: Mapping[str, Sequence[str]] | None = None):
        self._swallows: dict[str, bool] = {}     # options: does it take any number of values, so overrides too?
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Formatter)
        self.configured, self.schema, self.shipped = configured, schema, shipped or {}
        if not configured:
            return
        parts = ["configuration files, merged left to right; key=value overrides may follow"]
        for name, paths in self.shipped.items():
            parts.append(f"{name or 'left out'}: {' '.join(paths)}")
        self.add_argument("-b", "--base", nargs="+", default=None, metavar="YAML", help="; ".join(parts))
        self.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of single settings")

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        swallows = action.nargs == "+" and "=" not in (action.metavar or "")
        self._swallows.update(dict.fromkeys(action.option_strings, swallows))
        return action

    def format_help(self) -> str:
        for action in self._actions:
            action.help = self.explain(action.help or "")
        return super().format_help()

    @cached_property
    def _configurations(self) -> dict[str, DictConfig]:
        """The shipped configurations."""
        from ldm.config_files import merge
        return {name: merge(self.schema, files) for name, files in self.shipped.items()}

    def explain(self, text: str) -> str:
        """Completes an option's help that names a configuration key: what the key means and what it is by default."""
        named = re.fullmatch(r"(.*)\(([\w.]+)\)", text)
        if self.schema is None or named is None:
            return text
        from ldm.config_files import meanings  # torch comes with it, which nothing but a key's help needs here
        words, key = named[1].strip(), named[2]
        parts, usual = [key], None
        for name, config in self._configurations.items():
            value = OmegaConf.select(config, key)
            if name == "":                           # the files that are used where none are given
                usual, name = value, "default"
                silent = value is None or value is False
            else:
                silent = value in (None, usual)
            if not silent:
                parts.append(f"{name}: {value}")
        return f"{words or meanings(self.schema)[key]} ({'; '.join(parts)})".strip().replace("%", "%%")

    def add_flags(self, flags: Iterable[Flag]) -> None:
        """Adds flags that set keys of the configuration."""
        for flag in flags:
            names = [f"--{flag.name}"]
            if flag.short:
                names.insert(0, flag.short)
            text = f"{flag.help} ({flag.key})".strip()
            if flag.kind is None:
                self.add_argument(*names, action="store_const", const=True, help=text)
            else:
                self.add_argument(*names, type=flag.kind, nargs="+" if flag.many else None, help=text)

    def add_base(self) -> None:
        """Adds the flags that choose the base model."""
        self.add_flags(BASE_FLAGS)
        self.add_argument("--allow_target", action="append", default=[], metavar="NAME",
                          help="class or package of your own that a configuration's target may name; may be repeated")

    def add_foreign(self) -> None:
        """Adds what other tools' concept files do not say: their class nouns, and names for their words."""
        self.add_argument("--class_noun", nargs="+", default=[],
                          help="class noun, for concept files that do not say it; of several concepts one each")
        self.add_argument("--modifier_token", type=words_named, default=(),
                          help="concept words joined by +, for such files")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")

    def parse_command(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses a command line; `overrides` also holds --a.b=c forms, and those behind an option of several values."""
        for item in arguments:
            if _TILDE.match(item):
                self.error(f"'{item}' has a ~ that no shell has replaced; write the whole path")
        if not self.configured:
            return self.parse_args([_underscored(item) for item in arguments])
        rest, overrides, swallowed = [], [], False
        for item in arguments:
            name, equals, _ = _underscored(item).partition("=")
            # An option of several values takes what follows, overrides too.
            swallowed = self._swallows.get(name, swallowed)
            is_override = "." in name if name.startswith("--") else swallowed
            if equals and is_override:
                overrides.append(item)
            else:
                rest.append(item)
        options = self.parse_intermixed_args([_underscored(item) for item in rest])
        options.overrides += overrides
        return options


def _underscored(item: str) -> str:
    """Spells a long option with underscores; its value stays as it is."""
    if not item.startswith("--"):
        return item
    name, equals, value = item.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a script's main function on the command line; user errors become one line and exit status 1.

    So do a refusal of the operating system, memory that ran out, and data nested too deeply to be read; any other
    exception is a fault of the program and shows where it came from. A signal ends it with one line too, and status
    130 (Ctrl-C), 143 (SIGTERM) or 138 (SIGUSR1).
    """
    warnings.formatwarning = lambda message, category, *rest, **named: f"warning: {printable(str(message))}\n"
    warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric|torch")
    warnings.filterwarnings("ignore", module="PIL")     # of damaged files, which the loader names itself
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):           # file names are bytes, which need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        with heeded(_leave):
            main(sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt as interrupt:
        print(printable(str(interrupt) or INTERRUPTED), file=sys.stderr)
        sys.exit(getattr(interrupt, "status", 130))
    except Exception as error:
        sentence = _sentence(error)     # None: a fault of the program
        if sentence is None:
            raise
        _let_go_of_output()
        if sentence:
            print(f"error: {printable(sentence)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _leave(number: int) -> NoReturn:
    """Ends the process on the spot, with the one line; a signal may have come in the middle of any printing."""
    os.write(2, f"{INTERRUPTED}\n".encode())     # no buffer, no lock: any of them may be taken
    os._exit(128 + number)


def _sentence(error: Exception) -> str | None:
    """Words an error that is not the program's fault; empty where nobody is left to read it, None for all others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):      # whoever read the output has closed it
        return ""
    if isinstance(error, OSError):
        return _refusal(error)
    if isinstance(error, MemoryError):
        return "memory ran out; close other programs, or ask for less at a time."
    if isinstance(error, RecursionError) and _was_reading(error):
        return "a file that was read nests its entries too deeply; correct it."
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):      # Python's words, of paths
        return "a path holds a NUL character, which no file's name does; correct it."
    return None


def _refusal(error: OSError) -> str:
    """Words what the operating system refused: of which file, why, what to do."""
    place = ""
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        place = f"'{name}': "
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place}{reason}; {_ADVICE.get(error.errno, 'check it, and give the command again')}."


def _was_reading(error: RecursionError) -> bool:
    """Says whether an error came up in a reader of data, whose depth is the data's."""
    rooms = {frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not rooms.isdisjoint(_READERS)


def _let_go_of_output() -> None:
    """Lets nothing be written at the end to an output that takes no more."""
    try:
        print(end="", flush=True)
    except OSError:
        # The interpreter flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Shows what a terminal would obey, or a file could not hold, as its escape."""
    if text.isprintable():
        return text
    letters = []
    for letter in text:
        letters.append(letter if letter.isprintable() else letter.encode("unicode_escape").decode())
    return "".join(letters)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says in a sentence, too, that Ctrl-C came while a script was still importing what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught
