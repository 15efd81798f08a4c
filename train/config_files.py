"""Loads config files and reports errors in them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import pathlib
import signal
import traceback
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import RequiredValueError

from configs import defaults
from train import UserError

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def check(given: str) -> None:
    """Raises UserError unless a config file returns a config.

    Args:
      given: FILE, or FILE:ARGUMENT for get_config(ARGUMENT).
    """
    known = ", ".join(names())
    file, colon, argument = given.partition(":")
    if not pathlib.Path(file).exists():
        raise UserError(f"There is no file {file}; configs/ holds {known}.")
    if not pathlib.Path(file).is_file():
        raise UserError(
            f"--config={file} is not a file; configs/ holds {known}."
        )
    try:
        config = _config(file, (argument,) if colon else ())
    except UserError:
        raise
    # A config file may raise anything, SystemExit included.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and _ctrl_c_raises():
            raise
        raise UserError(_describe_error(error, file)) from error
    if not isinstance(config, ConfigDict) or isinstance(
        config, FrozenConfigDict
    ):
        raise UserError(
            f"{file}: get_config() must return a ConfigDict; got "
            f"{type(config).__name__}. See configs/digits.py."
        )
    try:
        config.copy_and_resolve_references()
    except RequiredValueError as error:
        raise UserError(
            f"{file}: a required_placeholder field has no value; set it in the "
            "file."
        ) from error
    missing = sorted({*defaults.get_config()} - {*config})
    if missing:
        raise UserError(
            f"The config has no {missing[0]}; build it on configs/defaults.py, "
            f"as {known} are."
        )


def _ctrl_c_raises() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt; see train.signals."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def names() -> list[str]:
    """Returns the names of the config files."""
    return [
        path.name
        for path in sorted(CONFIGS.glob("*.py"))
        if path.stem != "defaults" and "def get_config" in path.read_text()
    ]


def _config(file: str, arguments: tuple[str, ...]) -> Any:
    loader = importlib.machinery.SourceFileLoader("config_file", file)
    spec = importlib.util.spec_from_loader("config_file", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    get = getattr(module, "get_config", None)
    if not callable(get):
        raise UserError(
            f"{file} defines no function get_config(); see configs/digits.py."
        )
    try:
        inspect.signature(get).bind(*arguments)
    except TypeError as error:
        after = f"after the colon; got {arguments[0]!r}" if arguments else ""
        raise UserError(
            f"{file}: get_config() takes no argument {after}."
            if after
            else f"{file}: get_config() cannot be called: {error}; give "
            f"--config={file}:ARGUMENT."
        ) from error
    return get(*arguments)


def _describe_error(error: BaseException, file: str) -> str:
    """Describes an error in a config file and its location in one line."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # an exception class defined in the file
        said = ""
    if isinstance(error, ValueError) and said.startswith("configs/"):
        return said  # about the argument after the colon
    if isinstance(error, SyntaxError):
        line = f", line {error.lineno}" if error.lineno else ""
        at = f"{error.filename or file}{line}"
        return f"{at}: {type(error).__name__}: {error.msg}."
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    at = f"{file}, line {lines[-1]}" if lines else file
    return f"{at}: {type(error).__name__}: {said}".rstrip(".: ") + "."
