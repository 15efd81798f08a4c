"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text in one piece: a crash leaves the old file or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes value as JSON, likewise."""
    write_text(path, json.dumps(value, indent=2) + "\n")
