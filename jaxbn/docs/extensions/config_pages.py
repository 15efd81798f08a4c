"""Describes configs/ in Markdown, from the source of its files."""

from __future__ import annotations

import ast
import io
import pathlib
import re
import tokenize
from typing import NamedTuple

from configs.ranges import RANGES

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"


class Field(NamedTuple):
    """A field of a config, as its file defines it."""

    name: str  # with dots
    default: str
    comment: str


class Group(NamedTuple):
    """Fields below a comment that follows an empty line."""

    title: str
    note: str
    fields: list[Field]


def files() -> str:
    """Returns a table of the configs, and a section for each."""
    paths = [
        path
        for path in sorted(CONFIGS.glob("*.py"))
        if "python -m train" in _docstring(path)
        and not path.name.endswith("defaults.py")
    ]
    # The one that needs no data comes first.
    paths.sort(key=lambda path: path.name != "digits.py")
    rows, sections = [], []
    for path in paths:
        title, _, body = _docstring(path).partition("\n")
        anchor = re.sub(r"[^a-z0-9]+", "-", path.name).strip("-")
        rows.append(f"| [`{path.name}`](#{anchor}) | {title} |")
        sections.append(
            f"({anchor})=\n### `{path.name}`\n\n{title}\n\n{_fenced(body)}"
        )
    table = "| config | what it trains |\n|---|---|\n" + "\n".join(rows)
    return "\n\n".join([table, *sections])


def fields() -> str:
    """Returns a table for each group of fields, of every program."""
    return "\n\n".join(
        _table(group, path)
        for path in sorted(CONFIGS.glob("*defaults.py"))
        for group in groups(path.read_text())
    )


def groups(source: str) -> list[Group]:
    """Parses the fields that get_config() of a file assigns."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    found: list[Group] = []
    inherited: dict[str, str] = {}  # what is said of config.muon, say
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        if not name.startswith("config."):
            continue
        name = name.removeprefix("config.")
        first = node.lineno  # of the comments above the field
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = [comments[i] for i in range(first, node.lineno)]
        if above and not lines[first - 2].strip():
            title, _, note = above[0].partition(".")
            # A title by itself is followed by the comment of the field.
            rest = [note.strip(), *above[1:]] if note else []
            above = [] if note else above[1:]
            found.append(Group(title, " ".join(rest), []))
        comment = comments.get(node.end_lineno or 0, " ".join(above))
        value = ast.unparse(node.value)
        if value == "ConfigDict()":
            inherited[name] = comment
            continue
        unset = re.fullmatch(r"placeholder\((\w+)\)", value)
        default = f"unset ({unset[1]})" if unset else f"`{value}`"
        comment = comment or inherited.get(name.rpartition(".")[0], "")
        found[-1].fields.append(Field(name, default, comment))
    return found


def _table(group: Group, path: pathlib.Path) -> str:
    program = re.search(r"python -m train\S*", _docstring(path))
    of = f" (`{program[0]}`)" if program and path.name != "defaults.py" else ""
    rows = [
        f"| `{field.name}` | {field.default} | {RANGES.get(field.name, '')} "
        f"| {_text(field.comment)} |"
        for field in group.fields
    ]
    return "\n".join(
        [
            f"### {group.title}{of}",
            "",
            _text(group.note),
            "",
            "| field | default | range | meaning |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _text(comment: str) -> str:
    """Quotes what Markdown would take for markup, and flags as code."""
    comment = re.sub(r"(\w+(?:\.\w+)*=\S+?)(?=[:;,.]?(\s|$))", r"`\1`", comment)
    return comment.replace("|", r"\|").replace("*", r"\*")


def _docstring(path: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def _fenced(text: str) -> str:
    """Puts paragraphs that are commands into a block of their own."""
    paragraphs = text.strip().split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph.strip().startswith("python -m "):
            lines = (line.strip() for line in paragraph.splitlines())
            # Python has joined the lines that end in a backslash.
            command = re.sub(r" {4,}", " \\\\\n    ", "\n".join(lines))
            paragraphs[i] = f"```sh\n{command}\n```"
    return "\n\n".join(paragraphs)
