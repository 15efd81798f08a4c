"""Fills pages with what is read from the code when they are built.

A line {{ name }} or {{ name argument }} of a page becomes the Markdown that the
function returns: a page cannot say something else than the code does.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import command_pages
import config_pages
import scripts
from sphinx.application import Sphinx

_GENERATORS = {
    "commands": command_pages.commands,
    "configs": config_pages.files,
    "example": scripts.section,
    "fields": config_pages.fields,
}


def _fill(app: Sphinx, page: str, content: list[str]) -> None:
    def made(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return _GENERATORS[name](*arguments)

    content[0] = re.sub(r"^\{\{ (.*) \}\}$", made, content[0], flags=re.M)


def _outdated(
    app: Sphinx, env: Any, added: Any, changed: Any, removed: Any
) -> list[str]:
    """Reads these pages again in every build: their sources are elsewhere."""
    return ["commands", "examples"]


def _notebooks(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        scripts.write_notebooks(pathlib.Path(app.outdir))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _fill, priority=400)
    app.connect("env-get-outdated", _outdated)
    app.connect("build-finished", _notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
