"""Settings of the documentation.

In a checkout: pip install -e '.[docs]', then
python -m sphinx -W -b html jaxbn/docs site
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import inspect

import jaxbn
import jaxbn.linen
import jaxbn.nnx

sys.path.insert(0, str(pathlib.Path(__file__).parent / "extensions"))
import option_groups  # noqa: E402

project = "jaxbn"
author = "the authors of jaxbn"
release = jaxbn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "formulas",
    "generated",
    "mathml",
    "option_groups",
]
html_math_renderer = "mathml"
# What tests run are the Python blocks of all *.md: the front page has none.
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
source_suffix[".markdown"] = "markdown"
exclude_patterns = ["examples/*", "extensions/*"]
html_theme = "sphinx_book_theme"
html_title = f"jaxbn {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # one search box is enough
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# Of a console block only the commands are copied.
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
myst_enable_extensions = ["dollarmath"]
# Links from one page to a heading of another.
myst_heading_anchors = 3

# `name` is a link where there is such a thing, else code.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = option_groups.HEADS

# What a docstring says plainly and reStructuredText would take for markup.
_MARKUP = re.compile(r"(\*+|\||(?<=\w)_(?!\w))")
_CODE = re.compile(r"(`[^`]*`)")

_MOVED = {
    "jaxbn/docs/": "",
    "configs/": "../../configs/",
    "train/why.md": "why.markdown",
    "train/why/": "../../train/why/",
    "why/pictures/": "../../train/why/pictures/",
    "CONTRIBUTING.md": "contributing.markdown",
    "CHANGELOG.md": "changes.markdown",
    "../../train/why.md": "why.markdown",
    "../jaxbn/docs/": "",
    "../../README.md": "index.markdown",
}


def escape(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Makes |x|, **options and w_ stand as they are; runs before napoleon."""
    indent = None  # of the line that has announced literal text
    for i, line in enumerate(lines):
        here = len(line) - len(line.lstrip())
        if line and indent is not None and here <= indent:
            indent = None
        if indent is None and not line.lstrip().startswith(">>>"):
            texts = _CODE.split(line)
            texts[::2] = (_MARKUP.sub(r"\\\1", text) for text in texts[::2])
            # `array`s: what follows a name closely has to be told from it.
            texts[2::2] = (re.sub(r"^(?=\w)", r"\\ ", t) for t in texts[2::2])
            lines[i] = "".join(texts)
            if line.endswith("::"):
                indent = here


class Name(str):
    """A string that is shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def constructor(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Writes the arguments of a layer, which its metaclass hides or fills up.

    A default that is a class or function is written as its name, and a private
    constant as what it is.
    """
    if obj not in (jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm):
        shown = (signature or "").replace("_ALL_EXAMPLES", "Scope()")
        return (shown, returns) if signature else None
    found = inspect.signature(obj.__init__, bound_method=True)
    given = [
        p.replace(default=Name(p.default.__name__))
        if callable(p.default) and p.default is not p.empty
        else p
        for p in found.parameters.values()
        if p.name not in ("parent", "name")
    ]
    found = found.replace(parameters=given, return_annotation=found.empty)
    return inspect.stringify_signature(found, unqualified_typehints=True), None


def skip_field(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out fields of NamedTuples: Attributes of the class has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def find_at_the_top(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Finds what a docstring of another module calls by its short name."""
    if node.get("refdomain") != "py" or "." in node["reftarget"]:
        return None
    target = f"jaxbn.{node['reftarget']}"
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, contnode
    )


def relink(app: Sphinx, *event: Any) -> None:
    """Turns links to and from what is included here into those between pages.

    The README is written for the top of the checkout, and is the front page.
    """
    content: list[str] = event[-1]
    for old, new in _MOVED.items():
        content[0] = content[0].replace(f"]({old}", f"]({new}")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", escape, priority=400)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("missing-reference", find_at_the_top)
    app.connect("include-read", relink)
    app.connect("source-read", relink)
