"""Turns the scripts of examples/ into notebooks, and sections of a page."""

from __future__ import annotations

import pathlib
import re

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


def notebook(script: pathlib.Path) -> nbformat.NotebookNode:
    """Returns the notebook of a script with # %% cells, without outputs."""
    book = jupytext.read(script)
    book.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(book.cells):
        cell.metadata = nbformat.NotebookNode()
        cell.id = f"cell-{number}"  # the same in every build
    nbformat.validate(book)
    return book


def section(name: str) -> str:
    """Returns the cells of examples/NAME.py in Markdown, with downloads."""
    links = (
        f"Download: {{download}}`{name}.py <examples/{name}.py>`, "
        f'<a href="notebooks/{name}.ipynb" download>{name}.ipynb</a>'
    )
    parts = []
    for cell in notebook(FOLDER / f"{name}.py").cells:
        if cell.cell_type == "markdown":
            # One level down: the page has a title of its own.
            parts.append(re.sub(r"^(?=#)", "#", cell.source, flags=re.M))
        else:
            parts.append(f"```python\n{cell.source}\n```")
    return "\n\n".join([parts[0], links, *parts[1:]])


def write_notebooks(site: pathlib.Path) -> None:
    """Writes notebooks/NAME.ipynb for every script."""
    folder = site / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted(FOLDER.glob("*.py")):
        nbformat.write(notebook(script), folder / f"{script.stem}.ipynb")
