"""The documentation: builds without a warning, and holds every public name."""

import html
import os
import pathlib
import re
import subprocess
import sys
import zlib

import pytest

import jaxbn
from tests.helpers.public_api import CONSTANTS, MODULES, PUBLIC, docstring

DOCS = pathlib.Path(jaxbn.__file__).parent / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages; Sphinx also checks every link between them."""
    folder = tmp_path_factory.mktemp("docs")
    built = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html"),
            *("-d", folder / "doctrees", DOCS, folder / "site"),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert not built.returncode, built.stdout + built.stderr
    return folder / "site"


def inventory(site):
    """Returns name -> (kind, page) of all that can be linked to."""
    data = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    found = {}
    for line in zlib.decompress(data).decode().splitlines():
        name, kind, _, page, _ = line.split(" ", 4)
        found.setdefault(name, (kind, page.partition("#")[0]))
    return found


def letters(text):
    """Only them: quotes and dashes change on the way to a page."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def test_every_public_name_is_in_the_inventory(site):
    found = inventory(site)
    missing = [name for name in [*MODULES, *PUBLIC] if name not in found]
    assert not missing
    kinds = {found[name][0] for name in PUBLIC}
    assert kinds == {"py:class", "py:data", "py:function"}


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - CONSTANTS))
def test_docstring_stands_on_its_page(site, name):
    page = (site / inventory(site)[name][1]).read_text()
    shown = letters(html.unescape(re.sub(r"<[^>]+>", "", page)))
    summary = docstring(name).partition("\n")[0]
    assert letters(summary) in shown


def test_every_page_and_the_readme_are_built(site):
    for page in (*DOCS.glob("*.md"), *DOCS.glob("*.myst")):
        assert (site / f"{page.stem}.html").exists()
    assert "When you need it" in (site / "index.html").read_text()
