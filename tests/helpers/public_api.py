"""Every public name of the package."""

import importlib
import inspect

import jaxbn.linen
import jaxbn.nnx

MODULES = {
    name: importlib.import_module(name)
    for name in (
        "jaxbn",
        "jaxbn.accumulate",
        "jaxbn.convert",
        "jaxbn.diagnostics",
        "jaxbn.doctor",
        "jaxbn.fold",
        "jaxbn.linen",
        "jaxbn.nnx",
        "jaxbn.precise",
        "jaxbn.remat",
        "jaxbn.testing",
    )
}
PUBLIC = {
    f"{name}.{public}": getattr(module, public)
    for name, module in MODULES.items()
    for public in module.__all__
}
CLASSES = {n: v for n, v in PUBLIC.items() if inspect.isclass(v)}
FUNCTIONS = {n: v for n, v in PUBLIC.items() if inspect.isfunction(v)}
CONSTANTS = PUBLIC.keys() - CLASSES.keys() - FUNCTIONS.keys()
CALLED = {
    **FUNCTIONS,
    "jaxbn.linen.BatchNorm()": jaxbn.linen.BatchNorm.__call__,
    "jaxbn.nnx.BatchNorm": jaxbn.nnx.BatchNorm.__init__,
    "jaxbn.nnx.BatchNorm()": jaxbn.nnx.BatchNorm.__call__,
}


def docstring(name):
    """That of a class, too, where a constructor is asked for."""
    return inspect.getdoc(PUBLIC.get(name) or CALLED[name])
