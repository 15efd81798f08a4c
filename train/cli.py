"""Command line of the tools besides `python -m train`: arguments and errors."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from train import UserError, clock, output


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the arguments.")


def folder(name: str) -> pathlib.Path:
    """Parses a path argument, expanding ~."""
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(program: str, main: Callable[[list[str]], None]) -> NoReturn:
    """Runs main and exits: 0, 1 with a one-line error, or 130 after Ctrl-C."""
    clock.end_line()
    output.guard()
    code = 1
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        code = 0
    except UserError as error:
        line = f"{program}: {error}"
    except KeyboardInterrupt:
        line, code = f"{program}: interrupted", 130
    except BrokenPipeError:
        line = f"{program}: the output pipe was closed"
        output.drop()
    except OSError as error:  # standard output or the disk
        line = f"{program}: {error}"
    if code:
        print(line, file=sys.stderr)
    sys.exit(code)
