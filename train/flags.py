"""Command line of a program that is configured by a config file."""

from __future__ import annotations

import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import defaults
from configs.ranges import RANGES
from train import UserError, config_checks, config_files, descriptions, output
from train.config_files import CONFIGS
from train.workdir import check_name


def parse(
    argv: Sequence[str],
    *,
    doc: str | None,
    default: str,
    define: Callable[[], None],
) -> ConfigDict:
    """Parses argv with absl and returns the config.

    Args:
      argv: the command line.
      doc: the beginning of --help.
      default: the file of configs/ used without --config.
      define: defines the other flags, among them --workdir.

    Raises:
      UserError: argv or the config is invalid, with what to change.
    """
    output.guard()
    argv = _without_overridden(argv)
    _check_names(argv)
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(CONFIGS / default),
            "File that defines get_config().",
            sys_argv=argv,
        )
        define()
        flags.DEFINE_bool("list", False, "Lists the configs of configs/.")
        if any(re.fullmatch(r"--?h(elp\w*)?", word) for word in argv):
            _help(doc)
        if {"--list", "-list"} & {*argv}:
            print(descriptions.configs())
            sys.exit(0)
        file = _config_file(argv)
        if file is not None:
            config_files.check(file)
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config.lock()
    except BrokenPipeError:  # the reader of --help has closed the pipe
        sys.exit(1)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(_one_line(error)) from error
    if len(rest) > 1:
        raise UserError(
            f"Unexpected argument {rest[1]!r}; flags begin with --."
        )
    config_checks.check_fields(config)
    _check_workdir()
    return config


def _check_names(argv: Sequence[str]) -> None:
    """Raises UserError for fields whose names no config can have."""
    for word in argv:
        name = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if name and not re.fullmatch(r"\w+(\.\w+)*", name[1]):
            raise UserError(f"There is no config.{name[1]}; --help lists all.")


def _check_workdir() -> None:
    """Checks --workdir, and expands ~ in it."""
    given = flags.FLAGS.workdir
    if given is None:
        return
    if not given:
        raise UserError(
            "--workdir= is empty; leave it out for a new directory in runs/."
        )
    flags.FLAGS.workdir = str(check_name(pathlib.Path(given)))


def workdir() -> pathlib.Path:
    """Returns --workdir, or a new path in runs/."""
    if flags.FLAGS.workdir:
        return pathlib.Path(flags.FLAGS.workdir)
    file, _, argument = flags.FLAGS["config"].config_filename.partition(":")
    name = "-".join([pathlib.Path(file).stem, *re.findall(r"[\w-]+", argument)])
    return pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _help(doc: str | None) -> NoReturn:
    """Prints the flags, and the config fields with their comments."""
    own = flags.FLAGS.get_key_flags_for_module(__name__)
    own += flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    print(f"{doc}\nFlags:\n")
    for flag in own:
        text = textwrap.fill(
            f"--{flag.name}: {flag.help}", 78, subsequent_indent="    "
        )
        print(textwrap.indent(text, "  "))
    body = (CONFIGS / "defaults.py").read_text()
    body = body.partition("config = ConfigDict()\n")[2]
    body = body.partition("    return config")[0].strip("\n")
    body = re.sub(r"^.*ConfigDict\(\)\n", "", body, flags=re.M)
    body = re.sub(r"placeholder\(\w+\)", "None", body)
    body = re.sub(
        r"^ *config\.", "--config.", textwrap.dedent(body), flags=re.M
    )
    print("\nConfig fields and their defaults:\n")
    print(textwrap.indent(body, "  "))
    # No line breaks within an interval.
    space = "\N{NO-BREAK SPACE}"
    numbers = ", ".join(
        f"{name} {RANGES[name]}".replace(" ", space)
        for name in _names(defaults.get_config())
        if name in RANGES
    )
    numbers = textwrap.fill(numbers, 76).replace(space, " ")
    print(f"\nRanges:\n\n{textwrap.indent(numbers, '  ')}")
    names = f"In configs/: {', '.join(config_files.names())}; --list says more."
    print(f"\n{output.wrap(names)}")
    print("\nOther programs; --help lists their arguments:\n")
    print(textwrap.indent(descriptions.programs(besides=sys.argv[0]), "  "))
    sys.exit(0)


def _without_overridden(argv: Sequence[str]) -> list[str]:
    """Drops flags that a later flag for the same field overrides.

    ml_collections would concatenate tuples that are given twice.
    """
    kept: dict[str, list[str]] = {}
    name = ""  # the field whose value is the next word
    for number, word in enumerate(argv):
        found = re.match(r"--?(config\.[^=]+)(=?)", word)
        if name and not word.startswith("-"):
            kept[name].append(word)
            name = ""
            continue
        key = found[1] if found else f"{number}"
        name = key if found and not found[2] else ""
        kept.pop(key, None)
        kept[key] = [word]
    return [word for words in kept.values() for word in words]


def _one_line(error: Exception) -> str:
    """Rewords errors of ml_collections and absl."""
    message = str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        for name in _names(defaults.get_config()):
            if error.flagname.replace("-", "_") == name.rpartition(".")[2]:
                _, equals, value = str(error.flagvalue).partition("=")
                return (
                    f"There is no --{error.flagname}; did you mean "
                    f"--config.{name}{equals}{value}?"
                )
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if near:
        return f"There is no config.{near[2]}; did you mean config.{near[1]}?"
    if isinstance(error, AttributeError | KeyError):
        name = message.strip("'\"")
        return f"There is no config.{name}; configs/defaults.py has all fields."
    # A config file that loaded before.
    if re.search("Traceback|earlier failure to load", message):
        message = (
            "A config file must behave the same each time it is loaded; got "
            f"{message.splitlines()[-1]}"
        )
    return " ".join(message.split())


def _names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _config_file(argv: Sequence[str]) -> str | None:
    """Returns the value of --config, or None."""
    given = None
    for word, following in zip(argv, [*argv[1:], None]):
        found = re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL)
        if found:
            given = following if found[1] is None else found[1]
    return given
