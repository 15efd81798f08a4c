"""Finds copies of flax.nnx.BatchNorm by running them; see `_copies`."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn.convert._trial import (
    difference,
    run_apart,
    weights,
)

_ALONE = {"axis_name": None, "axis_index_groups": None}


def looks_like_flax(layer: Any) -> bool:
    names = ("num_features", "momentum", "epsilon", "mean", "var")
    return all(hasattr(layer, name) for name in names)


def differs(layer: Any, options: dict[str, Any]) -> str | None:
    """Returns why a layer is not a copy of flax's, or None if it is one.

    Args:
      layer: for which `looks_like_flax` is true.
      options: of a flax.nnx.BatchNorm, as read off the layer.
    """
    names = list(inspect.signature(type(layer).__call__).parameters)[1:]
    if names[1:2] != ["use_running_average"] or names[2:] not in ([], ["mask"]):
        return f"which is called with {', '.join(names)}"
    graphdef, state = nnx.split(layer)
    # If nnx.vmap has stacked layers, the first one is tried.
    stacked = layer.mean.ndim - 1
    trial = functools.partial(_trial, graphdef, state, options, stacked)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(state))
    return run_apart(trial, key=(graphdef, shapes))


def _trial(
    graphdef: Any, state: Any, options: dict[str, Any], stacked: int
) -> str | None:
    # A copy with other values, since those of the model may be tracers.
    other = functools.partial(_other_value, np.random.default_rng(1), stacked)
    theirs = nnx.merge(graphdef, jax.tree.map(other, state))
    flaxs = nnx.BatchNorm(
        theirs.num_features, **{**options, **_ALONE}, rngs=nnx.Rngs(0)
    )
    for name in _ALONE:
        if hasattr(theirs, name):
            setattr(theirs, name, None)
    own, like = _variables(theirs), _variables(flaxs)
    names = [", ".join(sorted(variables)) for variables in (own, like)]
    if names[0] != names[1]:
        return f"whose variables are {names[0]}, where flax's are {names[1]}"
    for name, variable in like.items():
        if own[name].shape != variable.shape:
            return f"whose {name} has the shape {own[name].shape}"
        variable.set_value(own[name][...])
    axis = options["axis"]
    ndim = max(2, axis + 1 if axis >= 0 else -axis)
    shape = [5] + [3] * (ndim - 1)
    shape[axis] = theirs.num_features

    def results(x: Any, *, layer: Any) -> dict[str, Any]:
        graph, params, *rest = nnx.split(layer, nnx.Param, ...)

        def loss(params: Any, x: Any) -> Any:
            copy = nnx.merge(graph, params, *rest, copy=True)
            y = copy(x, use_running_average=False)
            new = [copy.mean[...], copy.var[...]]
            return (y * weights(tuple(shape))).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        copy = nnx.merge(graph, params, *rest, copy=True)
        return {
            "outputs": y,
            "running statistics": new,
            "gradients": [
                *jax.tree.leaves(nnx.to_pure_dict(grads[0])),
                grads[1],
            ],
            "outputs in inference": copy(x, use_running_average=True),
        }

    found = difference(
        functools.partial(results, layer=theirs),
        functools.partial(results, layer=flaxs),
        tuple(shape),
        float(options["epsilon"]),
    )
    if found is None:
        return None
    return (
        "which has the attributes of flax's layer and computes something "
        f"else: {found} differ"
    )


def _other_value(rng: np.random.Generator, stacked: int, a: Any) -> Any:
    shape = a.shape[stacked:]
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.zeros(shape, a.dtype)
    return jnp.asarray(rng.uniform(0.5, 2, shape), a.dtype)


def _variables(layer: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, nnx.Variable)
    }
