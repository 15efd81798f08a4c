"""What the programs beside `python -m train` share: arguments, errors, codes."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from train import UserError, output


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the arguments.")


def folder(name: str) -> pathlib.Path:
    """Returns the path that an argument names, with ~ expanded."""
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(program: str, main: Callable[[list[str]], None]) -> NoReturn:
    """Ends the process as main does: 0, 1 with a line, 130 after Ctrl-C."""
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
        line = f"{program}: nobody reads the output"
        output.drop()
    except OSError as error:  # of standard output, or of the disk
        line = f"{program}: {error}"
    if code:
        print(line, file=sys.stderr)
    sys.exit(code)
