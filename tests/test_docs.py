"""The documentation: builds without a warning, and agrees with the code."""

import html
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import zlib

import pytest
from ml_collections import ConfigDict

import jaxbn
from configs.ranges import RANGES
from tests.helpers.public_api import CONSTANTS, MODULES, PUBLIC, docstring

DOCS = pathlib.Path(jaxbn.__file__).parent / "docs"
ROOT = DOCS.parents[1]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs").glob("*.py"))
    if "def get_config(" in path.read_text()
]
FIELDS = [path for path in CONFIGS if path.stem.endswith("defaults")]
RECIPES = [path for path in CONFIGS if path not in FIELDS]
PROGRAMS = [
    *("train", "train.evaluate", "train.compare", "train.doctor"),
    *("train.export", "train.pretrained", "train.why"),
    *("tests.bench", "tests.bench.compiled", "tests.bench.gpu"),
]


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


def text_of(page):
    """What a reader sees of a page."""
    article = page.read_text().partition('<article class="bd-article">')[2]
    article = article.partition("</article>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "", article))


def words(text):
    return " ".join(text.split())


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def leaves(config, prefix=""):
    """Yields (dotted name, value) of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


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
    for page in (*DOCS.glob("*.md"), *DOCS.glob("*.markdown")):
        assert (site / f"{page.stem}.html").exists()
    assert "When do I need it?" in (site / "index.html").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_config_stands_on_the_page(site, path):
    shown = letters(text_of(site / "commands.html"))
    for line in module(path).__doc__.splitlines():
        assert letters(line) in shown


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path.name)
def test_fields_are_in_a_table(site, path):
    page = (site / "commands.html").read_text()
    rows = [
        [
            html.unescape(re.sub(r"<[^>]+>", "", cell)).strip()
            for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    ]
    shown = {tuple(row[:3]) for row in rows if len(row) == 4}
    for name, value in leaves(module(path).get_config()):
        found = [row for row in shown if row[0] == name]
        ranges = RANGES.get(name, "")
        assert {row[2] for row in found} == {ranges}, name
        defaults = [row[1] for row in found]
        if value is None:
            assert any(text.startswith("unset (") for text in defaults), name
        else:
            assert value in [
                eval(text) for text in defaults if "unset" not in text
            ], name


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path.name)
def test_comments_of_fields_are_on_the_page(site, path):
    shown = letters(text_of(site / "commands.html"))
    comments = re.findall(r"# (.*)", path.read_text())
    assert len(comments) > 50
    assert not [line for line in comments if letters(line) not in shown]


@pytest.mark.parametrize("program", PROGRAMS)
def test_command_stands_on_the_page_with_its_flags(site, program):
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    flags, _, fields = done.stdout.partition("Config fields")
    assert bool(fields) == (program == "train")
    assert words(flags) in words(text_of(site / "commands.html"))


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_options_of_a_layer_are_grouped(site, name):
    page = text_of(site / "reference" / f"{name}.html")
    heads = (
        "Options shared with flax:",
        "Which examples share statistics:",
        "Running statistics:",
        "Inference:",
    )
    places = [page.index(head) for head in heads]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "page, names",
    [
        (
            "jaxbn",
            "batch_norm batch_renorm moments merge sync update_running adapt "
            "pool normalize_weighted",
        ),
        ("linen", "linen.BatchNorm"),
        ("nnx", "nnx.BatchNorm"),
    ],
)
def test_formulas_are_typeset(site, page, names):
    text = (site / "reference" / f"{page}.html").read_text()
    assert "mathjax" not in text.lower()  # it would need a network
    entries = dict(
        re.findall(
            r'<dt class="sig[^>]*id="jaxbn\.([\w.]+)">(.*?)</dd></dl>',
            text,
            re.DOTALL,
        )
    )
    for name in names.split():
        assert "<math" in entries[name], name
