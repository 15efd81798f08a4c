"""The command line of a program that a config file and flags describe."""

from __future__ import annotations

import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from train import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def parse(
    argv: Sequence[str],
    *,
    doc: str | None,
    fields: ModuleType,
    default: str,
    define: Callable[[], None],
) -> ConfigDict:
    """Returns the config that the flags ask for; other flags stay flags.

    ml_collections reads the config file and its overrides already where the
    flag is defined, and keeps what went wrong until the value is asked for:
    every step of it can raise.

    Args:
      argv: as the program was started.
      doc: what --help says first.
      fields: the module of configs/ with every field that there is.
      default: the file of configs/ that is taken without --config.
      define: defines the other flags.

    Raises:
      UserError: anything about argv is wrong, with what to change.
    """
    try:
        config_flags.DEFINE_config_file(
            "config", str(CONFIGS / default), "File that defines get_config()."
        )
        define()
        if {"--help", "-h", "-help"} & {*argv}:
            _help(doc, fields)
        rest = flags.FLAGS(argv)
        config = flags.FLAGS.config.lock()
    except BrokenPipeError:  # of --help: who reads it has seen enough
        sys.exit(1)
    except (flags.Error, AttributeError, OSError, TypeError) as error:
        raise UserError(_one_line(error, fields)) from error
    if len(rest) > 1:
        raise UserError(
            f"Unexpected argument {rest[1]!r}; flags begin with --."
        )
    missing = sorted({*fields.get_config()} - {*config})
    if missing:
        raise UserError(
            f"The config has no {missing[0]}: it is for another program. Take "
            f"one of {_configs(fields)} in configs/."
        )
    return config


def workdir() -> pathlib.Path:
    """Returns what --workdir says, else a new name in runs/."""
    if flags.FLAGS.workdir:
        return pathlib.Path(flags.FLAGS.workdir)
    file, _, argument = flags.FLAGS["config"].config_filename.partition(":")
    name = "-".join([pathlib.Path(file).stem, *re.findall(r"[\w-]+", argument)])
    return pathlib.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _help(doc: str | None, fields: ModuleType) -> NoReturn:
    """Prints what there is to say, and the file of all fields as it stands."""
    own = flags.FLAGS.get_key_flags_for_module(__name__)
    own += flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    print(f"{doc}\nFlags:\n")
    for flag in own:
        text = textwrap.fill(
            f"--{flag.name}: {flag.help}", 78, subsequent_indent="    "
        )
        print(textwrap.indent(text, "  "))
    body = pathlib.Path(fields.__file__ or "").read_text()
    body = body.partition("config = ConfigDict()\n")[2]
    body = body.partition("    return config")[0].strip("\n")
    kept = (line for line in body.splitlines() if "ConfigDict()" not in line)
    print("\nFields, with the values that a config begins with:\n")
    print(
        re.sub(r"^(\s*)config\.", r"\1--config.", "\n".join(kept), flags=re.M)
    )
    print(f"\nIn configs/: {_configs(fields)}. Each opens with its command.")
    sys.exit(0)


def _configs(fields: ModuleType) -> str:
    """Names of the files that set these fields."""
    name = fields.__name__.rpartition(".")[2]
    paths = sorted(CONFIGS.glob("*.py"))
    return ", ".join(p.name for p in paths if _builds_on(p, name))


def _builds_on(path: pathlib.Path, name: str) -> bool:
    found = re.search(r"^from configs import (.*)", path.read_text(), re.M)
    used = found[1].split(", ") if found else ()
    return any(
        each == name or _builds_on(CONFIGS / f"{each}.py", name)
        for each in used
    )


def _one_line(error: Exception, fields: ModuleType) -> str:
    """Words what ml_collections and absl report."""
    message = str(error)
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if near:
        return f"There is no config.{near[2]}; did you mean config.{near[1]}?"
    if isinstance(error, AttributeError):
        name = message.strip("'\"")
        file = pathlib.Path(fields.__file__ or "").name
        return f"There is no config.{name}; configs/{file} has all fields."
    if isinstance(error, OSError):
        name = _config_file()
        if pathlib.Path(name).exists():
            raise error  # a mistake inside the file: show where
        return f"There is no file {name}; configs/ holds {_configs(fields)}."
    said = re.search(r"\nValueError: (configs/.*)", message)
    if said:  # get_config(), of what stands behind the colon
        return said[1]
    return " ".join(message.split())


def _config_file() -> str:
    """The file that --config names, without what stands behind the colon."""
    given = [a for a in sys.argv[1:] if re.match("--?config(=|$)", a)]
    at = sys.argv.index(given[-1])
    name = given[-1].partition("=")[2] or sys.argv[at + 1]
    return name.partition(":")[0]
