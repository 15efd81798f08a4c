"""What every public name promises: its words, its order and its docstring."""

import ast
import builtins
import dataclasses
import doctest
import inspect
import re
import sys
import textwrap

import flax.linen as nn
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from tests.helpers.public_api import (
    CALLED,
    CLASSES,
    CONSTANTS,
    FUNCTIONS,
    MODULES,
    PUBLIC,
    docstring,
)

# Parameters with defaults that may be given by position, and why.
POSITIONAL = {
    # The arrays of the formula, in the order it has them.
    "jaxbn.batch_norm": ["scale", "bias"],
    "jaxbn.batch_renorm": ["scale", "bias"],
    "jaxbn.normalize": ["scale", "bias"],
    "jaxbn.normalize_weighted": ["scale", "bias"],
    "jaxbn.testing.float64_reference": ["scale", "bias"],
    # The signature of flax.
    "jaxbn.linen.BatchNorm()": ["use_running_average"],
    "jaxbn.nnx.BatchNorm()": ["use_running_average"],
    # The signature of jax.vmap.
    "jaxbn.accumulate.lockstep": ["in_axes", "out_axes"],
    # Three numbers of one formula.
    "jaxbn.diagnostics.equilibrium_angle": ["momentum"],
}

# Other words for where, axis_name, epsilon and decay, and who may use them.
OTHER_WORDS = {"mask", "axis_names", "eps", "momentum"}
ALLOWED = {
    # Fields and arguments of flax.
    "jaxbn.linen.BatchNorm": {"momentum"},
    "jaxbn.linen.BatchNorm()": {"mask"},
    "jaxbn.nnx.BatchNorm()": {"mask"},
    "jaxbn.doctor.Health": {"momentum"},
    # That of an optimizer.
    "jaxbn.diagnostics.equilibrium_angle": {"momentum"},
}


def parameters(function):
    """All parameters but self."""
    known = inspect.signature(function).parameters.values()
    return [p for p in known if p.name != "self"]


def fields(cls):
    """Names of what a class of values holds; none for other classes."""
    if dataclasses.is_dataclass(cls):
        own = [field.name for field in dataclasses.fields(cls)]
        return [name for name in own if name not in ("parent", "name")]
    return list(getattr(cls, "_fields", ()))


def section(item, title):
    """The text of a section of a docstring, dedented; "" without one."""
    found = re.search(rf"^{title}:\n((?: .*\n|\n)+)", item + "\n", re.M)
    return textwrap.dedent(found[1]) if found else ""


def heads(text):
    """The names that a section explains; one line may hold several."""
    lines = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", text, re.M)
    return [name.strip("*") for line in lines for name in line.split(", ")]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_a_module_defines(name):
    module = MODULES[name]

    def is_own(public, value):
        return (
            hasattr(module, "__path__")  # __init__ imports what it offers
            or getattr(value, "__module__", None) == name
            or public.isupper()
        )

    defined = {
        public
        for public, value in vars(module).items()
        # Modules are there where somebody has imported them.
        if not public.startswith("_") and not inspect.ismodule(value)
        if is_own(public, value)
    }
    assert defined == set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    assert inspect.getdoc(module)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - CONSTANTS))
def test_public_names_are_ours_and_carry_their_name(name):
    value = PUBLIC[name]
    assert value.__module__.split(".")[0] == "jaxbn"
    assert value.__name__ == name.rpartition(".")[2]


def test_parameters_with_defaults_are_keyword_only():
    found = {
        name: [
            p.name
            for p in parameters(function)
            if p.default is not p.empty and p.kind != p.KEYWORD_ONLY
        ]
        for name, function in CALLED.items()
    }
    assert {name: names for name, names in found.items() if names} == POSITIONAL


def test_options_of_a_scope_are_keyword_only():
    kinds = {p.kind for p in parameters(jaxbn.Scope)}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_drop_ins_keep_the_order_of_flax():
    theirs, ours = fields(nn.BatchNorm), fields(jaxbn.linen.BatchNorm)
    assert ours[: len(theirs)] == theirs
    for own, other in (
        (jaxbn.linen.BatchNorm, nn.BatchNorm),
        (jaxbn.nnx.BatchNorm, nnx.BatchNorm),
    ):
        want = [(p.name, p.kind) for p in parameters(other.__call__)]
        got = [(p.name, p.kind) for p in parameters(own.__call__)]
        assert got[: len(want)] == want


def test_words_are_those_of_the_core():
    used = {
        **{n: {p.name for p in parameters(f)} for n, f in CALLED.items()},
        **{name: set(fields(cls)) for name, cls in CLASSES.items()},
    }
    found = {name: words & OTHER_WORDS for name, words in used.items()}
    assert {name: words for name, words in found.items() if words} == ALLOWED


@pytest.mark.parametrize("name", [*CALLED, *CLASSES])
def test_docstring_opens_with_a_sentence(name):
    summary, *rest = docstring(name).split("\n")
    assert summary.endswith((".", ":")) and summary[0] not in " \t"
    assert not rest or not rest[0]


@pytest.mark.parametrize("name", CALLED)
def test_args_name_every_parameter_and_nothing_else(name):
    explained = heads(section(docstring(name), "Args"))
    assert sorted(explained) == sorted(p.name for p in parameters(CALLED[name]))


@pytest.mark.parametrize("name", [n for n in CLASSES if fields(CLASSES[n])])
def test_attributes_name_every_field_and_nothing_else(name):
    explained = heads(section(docstring(name), "Attributes"))
    assert explained == fields(CLASSES[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_returns_says_what_comes_back(name):
    returned = inspect.signature(FUNCTIONS[name]).return_annotation
    assert returned is not inspect.Signature.empty
    assert bool(section(docstring(name), "Returns")) == (returned != "None")


@pytest.mark.parametrize("name", CALLED)
def test_raises_names_what_is_raised(name):
    tree = ast.parse(textwrap.dedent(inspect.getsource(CALLED[name])))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    explained = heads(section(docstring(name), "Raises"))
    assert raised <= set(explained)
    for error in explained:
        assert issubclass(getattr(builtins, error), Exception)


def test_examples_in_docstrings_run():
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(),
    )
    for name in CALLED.keys() & PUBLIC.keys():
        value = PUBLIC[name]
        known = dict(vars(sys.modules[value.__module__]))
        for example in finder.find(value, name, globs=known):
            runner.run(example)
    assert runner.summarize().failed == 0
    assert runner.summarize().attempted > 5
