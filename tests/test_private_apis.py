"""One place calls what JAX and flax do not promise: `jaxbn/_compat/`."""

import ast
import pathlib

import pytest

import jaxbn

PACKAGE = pathlib.Path(jaxbn.__file__).parent
COMPAT = PACKAGE / "_compat"
# Public modules whose names may change without notice.
UNSTABLE = ("jax.core", "jax.extend", "jax.interpreters")
# Of named tuples, as Python documents them.
PUBLIC = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name):
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and name not in PUBLIC


def is_unstable(name):
    return any(f"{name}.".startswith(f"{module}.") for module in UNSTABLE)


def own_names(tree):
    """Names of attributes that a file makes itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign):  # a field of a class
            yield ast.unparse(node.target)
        elif isinstance(node, ast.keyword):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            stored = isinstance(node.ctx, ast.Store)
            if stored and ast.unparse(node.value) == "self":
                yield node.attr


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def is_foreign(name, package):
    """Whether an imported name is private to something else."""
    first, *rest = name.split(".")
    if first != "jaxbn":
        return is_unstable(name) or any(map(is_private, rest))
    # jaxbn._checks is for all of jaxbn, jaxbn.fold._trace for jaxbn.fold.
    shared = is_private(rest[0]) or rest[0] == package
    return not shared and any(map(is_private, rest[1:]))


def violations(text, package):
    """Returns what a file takes of others that they do not promise.

    package: the part of jaxbn that the file is of, such as "fold".
    """
    tree = ast.parse(text)
    own = set(own_names(tree))
    for node in ast.walk(tree):
        yield from (n for n in imported(node) if is_foreign(n, package))
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            mine = node.attr in own or ast.unparse(node.value) in (
                "self",
                "cls",
            )
            if whole in UNSTABLE or (is_private(node.attr) and not mine):
                yield whole
        if isinstance(node, ast.Call):
            reads = ast.unparse(node.func) in ("getattr", "hasattr", "setattr")
            name = node.args[1] if reads else None
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield ast.unparse(node)


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if COMPAT not in path.parents and "docs" not in path.parts
]


@pytest.mark.parametrize(
    "path", FILES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_private_names_outside_compat(path):
    package = path.relative_to(PACKAGE).parts[0]
    # The inside of convert, for what exchanges single layers.
    package = {"_convert_to_collect.py": "convert"}.get(package, package)
    assert not list(violations(path.read_text(), package))


@pytest.mark.parametrize(
    "text",
    (
        "from jax._src import core",
        "import jax._src.core",
        "import jax.extend.core as jex",
        "from jax.extend import core",
        "isinstance(x, jax.core.Tracer)",
        "nn.module._context.module_stack",
        "layer._state.children",
        "self.layer._state",
        "getattr(layer, '_state', None)",
        "from jaxbn.accumulate._trace import trace",
        "from jaxbn.convert import _copies",
    ),
)
def test_finds_private_names(text):
    assert list(violations(text, "fold"))


@pytest.mark.parametrize(
    "text",
    (
        "from jaxbn._compat import jaxprs",
        "from jaxbn.fold._trace import Program",
        "self._a = 0\nother._a",
        "stats._replace(mean=0)",
        "jax.typeof(x).shape",
        "type(x).__name__",
    ),
)
def test_passes_public_names(text):
    assert not list(violations(text, "fold"))


@pytest.mark.parametrize(
    "path", sorted(COMPAT.glob("*.py")), ids=lambda p: p.stem
)
def test_compat_says_what_each_function_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert all(map(ast.get_docstring, functions))
