"""The arms of an experiment, and what is measured of each, seed by seed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxbn import batch_norm
from train.why.data import Setting

# One colour has one meaning in every picture. Colour-blind eyes tell all of
# them apart (Okabe and Ito, 2008).
THEORY = "#333333"
THIRD = "#009E73"
FOURTH = "#CC79A7"


class Arm(NamedTuple):
    """One of the alternatives that an experiment compares."""

    label: str | None  # in legends
    color: str
    style: str = "-"  # of its lines
    options: Mapping[str, Any] = {}  # of the function that measures it


WITHOUT = Arm("without", "#D55E00", options={"norm": None})
WITH = Arm("with batch norm", "#0072B2", options={"norm": batch_norm})
ARMS = {"without": WITHOUT, "with": WITH}


def each(
    arms: Mapping[str, Arm], measure: Callable, *args: Any, **options: Any
) -> dict[str, Any]:
    """measure(*args, **options, **arm.options) of each arm, as numpy."""
    return {
        name: jax.device_get(measure(*args, **options, **arm.options))
        for name, arm in arms.items()
    }


def per_seed(measure: Callable) -> Callable:
    """Compiles measure(run, *shared, **static) for all seeds.

    run is a Setting, of which measure sees the key and the indices of one seed,
    or a tree with a leading axis of seeds; results are stacked. Static are the
    arguments that are keyword-only.
    """

    def every(run: Any, *shared: Any, **static: Any) -> Any:
        one = functools.partial(measure, **static)
        own = Setting(0, 0, None, None) if isinstance(run, Setting) else 0
        return jax.vmap(one, (own, *(None for _ in shared)))(run, *shared)

    static = inspect.getfullargspec(measure).kwonlyargs
    return jax.jit(every, static_argnames=static)
