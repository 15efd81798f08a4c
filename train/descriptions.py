"""Describes the programs and the configs by their docstrings."""

from __future__ import annotations

import ast
import pathlib
import re
import textwrap

from train import config_files, output

TRAIN = pathlib.Path(__file__).resolve().parent


def programs(*, besides: str) -> str:
    """Lists what else python -m runs, with a line for each.

    Args:
      besides: path of the program that is left out.
    """
    lines = []
    for path in sorted([*TRAIN.glob("*.py"), *TRAIN.glob("*/__main__.py")]):
        if path == pathlib.Path(besides).resolve():
            continue
        summary = _docstring(path).partition("\n")[0]
        found = re.fullmatch(r"(.*): (python -m \S+).*\.", summary)
        if found:
            lines.append(f"{found[2]:<24}  {found[1]}")
    return "\n".join(lines)


def configs() -> str:
    """Lists the configs with expected results.

    Each is described by the first line of its docstring, and by the tables and
    sentences in it that give an accuracy in percent or a time in hours.
    """
    described = []
    for name in config_files.names():
        text = _docstring(config_files.CONFIGS / name)
        first, *paragraphs = text.split("\n\n")
        lines = [f"configs/{name}", f"  {first}"]
        for paragraph, after in zip(paragraphs, [*paragraphs[1:], ""]):
            table = paragraph.startswith("|")
            lines += (
                _rows(paragraph)
                if table
                else _sentences(paragraph, introduces=after.startswith("|"))
            )
        commands = re.findall(r"^ *(python -m train .*)$", text, re.M)
        lines += [f"  {command}" for command in commands]
        described.append(output.wrap("\n".join(lines)))
    return "\n\n".join(described)


def _rows(table: str) -> list[str]:
    """Aligns the columns of a Markdown table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if not re.fullmatch(r"[|-]+", line)
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
    ]


def _sentences(paragraph: str, *, introduces: bool) -> list[str]:
    """Returns the sentences with an accuracy or a time, wrapped.

    Args:
      paragraph: prose.
      introduces: whether its last sentence introduces a table; it is kept.
    """
    words = " ".join(paragraph.split())
    every = re.split(r"(?<=[.]) (?=[^a-z])", words)
    kept = [
        each
        for each in every
        if re.search(r"\d%|\d hours", each) or (introduces and each[-1:] == ":")
    ]
    return textwrap.wrap(
        " ".join(kept),
        output.WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _docstring(path: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""
