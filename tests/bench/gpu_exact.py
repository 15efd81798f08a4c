"""Whether the layer is right on the device itself, held to float64 on the host.

Each case is one program on random data: values, running statistics, gradients
for a random cotangent, and for the last ones a product with the Hessian.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.testing import float64_reference
from tests.bench import gpu_run

DEVICES = 8  # rows of vmap that stand for devices
IDS = 3
EPSILON = 1e-5
# Standard deviations from the running mean, which is 0: with the last two the
# sums about it cancel and are taken again.
OFFSETS = (0.0, 30.0, 1000.0)


class Case(NamedTuple):
    """A program and what its results have to be.

    Attributes:
      name: what is computed, and how.
      dtype: of x and y.
      run: (x, where, scale, bias, cotangent) -> mean, var, y, dx, dscale,
        dbias; see `wanted`.
      masked: whether where is given.
      ids: whether rows 0, 3, 6, ... have statistics of their own, and so on.
    """

    name: str
    dtype: str
    run: Callable[..., dict[str, jax.Array]]
    masked: bool
    ids: bool = False


def _results(layer: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Returns `Case.run` of (x, where, scale, bias) -> y, (mean, var)."""

    def run(x, where, scale, bias, cotangent):
        y, pull, (mean, var) = jax.vjp(
            lambda x, scale, bias: layer(x, where, scale, bias),
            *(x, scale, bias),
            has_aux=True,
        )
        dx, dscale, dbias = pull(cotangent)
        found = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
        return {"mean": mean, "var": var, **found}

    return run


def _linen(x, where, scale, bias):
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, momentum=0.0, dtype=x.dtype
    )
    zero = jnp.zeros_like(scale)
    y, new = layer.apply(
        {
            "params": {"scale": scale, "bias": bias},
            "batch_stats": {"mean": zero, "var": zero + 1},
        },
        x,
        mask=where,
        mutable=["batch_stats"],
    )
    return y, (new["batch_stats"]["mean"], new["batch_stats"]["var"])


def _nnx(x, where, scale, bias):
    layer = jaxbn.nnx.BatchNorm(
        x.shape[-1],
        use_running_average=False,
        momentum=0.0,
        dtype=x.dtype,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    state["scale"].set_value(scale)
    state["bias"].set_value(bias)
    layer = nnx.merge(graph, state)
    y = layer(x, mask=where)
    return y, (layer.mean[...], layer.var[...])


def _function(x, where, scale, bias):
    y, batch = jaxbn.batch_norm(x, scale, bias, where=where)
    return y, (batch.mean, batch.var)


def _devices(x, where, scale, bias):
    def part(x, where):
        y, batch = jaxbn.batch_norm(
            x, scale, bias, where=where, axis_name="data"
        )
        return y, (batch.mean, batch.var)

    y, statistics = jax.vmap(part, axis_name="data")(
        *(a.reshape(DEVICES, -1, *a.shape[1:]) for a in (x, where))
    )
    return y.reshape(x.shape), jax.tree.map(lambda a: a[0], statistics)


def _ids(x, where, scale, bias):
    y, batch = jaxbn.batch_norm(
        x,
        scale,
        bias,
        where=where,
        ids=jnp.arange(len(x)) % IDS,
        sharing=jaxbn.Scope(num_ids=IDS),
    )
    return y, (batch.mean, batch.var)


def cases(quick: bool) -> list[Case]:
    """Returns all cases; quick leaves the narrow types out."""
    found = []
    for dtype in ("float32",) if quick else ("float32", "bfloat16", "float16"):
        for masked in (False, True):
            for name, layer in (("linen", _linen), ("nnx", _nnx)):
                found.append(Case(name, dtype, _results(layer), masked))
        found.append(Case("batch_norm", dtype, _results(_function), False))
        name = f"batch_norm, vmap over {DEVICES}"
        found.append(Case(name, dtype, _results(_devices), True))
        name = f"batch_norm, {IDS} ids"
        found.append(Case(name, dtype, _results(_ids), True, ids=True))
    return found


def data(
    dtype: str, offset: float, shape: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """Returns x, where, scale, bias, cotangent; what is masked is NaN."""
    rng = np.random.default_rng(0)
    x = rng.normal(offset, 1.0, shape) * rng.uniform(0.1, 10, shape[-1])
    x = np.asarray(jnp.asarray(x, dtype))
    where = rng.random((*shape[:-1], 1)) < 0.6
    # The first of the parts that stand for devices keeps nothing.
    where[: shape[0] // DEVICES] = False
    scale, bias = rng.normal(1, 0.5, (2, shape[-1])).astype(np.float32)
    cotangent = np.asarray(jnp.asarray(rng.normal(size=shape), dtype))
    return x, where, scale, bias, cotangent


def wanted(
    case: Case, x, where, scale, bias, cotangent
) -> dict[str, np.ndarray]:
    """Returns what `Case.run` has to return, in float64."""
    if case.ids:
        rows = [slice(i, None, IDS) for i in range(IDS)]
        parts = [
            wanted(
                case._replace(ids=False),
                *(a[row] for a in (x, where)),
                *(scale, bias, cotangent[row]),
            )
            for row in rows
        ]
        joined = {n: np.stack([p[n] for p in parts]) for n in ("mean", "var")}
        for name in ("y", "dx"):
            joined[name] = np.empty(x.shape)
            for row, part in zip(rows, parts):
                joined[name][row] = part[name]
        for name in ("dscale", "dbias"):
            joined[name] = sum(part[name] for part in parts)
        return joined
    found = float64_reference(
        x,
        scale,
        bias,
        where=where if case.masked else None,
        cotangent=cotangent,
        epsilon=EPSILON,
    )
    names = ("mean", "var", "y", "dx", "dscale", "dbias")
    return {name: getattr(found, name) for name in names}


def errors(
    got: dict[str, Any], want: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns the largest error of each result.

    Of var relative, feature by feature; of mean in standard deviations; of the
    others as a share of the largest value. NaN where a result is NaN.
    """
    found = {}
    for name, right in want.items():
        error = np.abs(np.asarray(got[name], np.float64) - right)
        if name == "mean":
            unit = np.sqrt(want["var"])
        else:
            unit = right if name == "var" else np.abs(right).max()
        found[name] = float(np.max(error / unit))
    return found


def bounds(dtype: str, offset: float) -> dict[str, float]:
    """Returns how large each error may be.

    A float32 mean is known to eps times itself, which is |offset| eps standard
    deviations; y and the gradients are rounded to dtype.
    """
    eps = float(jnp.finfo(jnp.float32).eps)
    rounding = float(jnp.finfo(dtype).eps)
    sums = 2e-6
    return {
        "mean": sums + offset * eps,
        "var": 1e-5,
        **dict.fromkeys(("y", "dx"), rounding + 5 * sums),
        **dict.fromkeys(("dscale", "dbias"), 5 * sums),
    }


def hessian(run: gpu_run.Run) -> Iterator[dict]:
    """Product of the Hessian with a vector, held to float64 on the host."""
    shape = (16, 4, 4, 8)
    for offset in OFFSETS[:1] if run.quick else OFFSETS[:2]:
        rng = np.random.default_rng(1)
        x = (offset + rng.normal(size=shape)).astype(np.float32)
        direction, weight = rng.normal(size=(2, *shape)).astype(np.float32)

        def loss(norm, x, weight):
            return jnp.sum(jnp.tanh(norm(x)) * weight)

        def product(norm, x, direction, weight):
            gradient = jax.grad(functools.partial(loss, norm))
            return jax.jvp(lambda x: gradient(x, weight), (x,), (direction,))[1]

        def textbook(x):
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            return (x - mean) / jnp.sqrt(var + EPSILON)

        ours = jax.jit(
            functools.partial(product, lambda x: jaxbn.batch_norm(x)[0])
        )
        got = np.asarray(ours(x, direction, weight), np.float64)
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            exact = (jnp.asarray(a, np.float64) for a in (x, direction, weight))
            want = np.asarray(
                jax.jit(functools.partial(product, textbook))(*exact)
            )
        error = float(np.abs(got - want).max() / np.abs(want).max())
        bound = 2e-5
        yield {
            "case": f"Hessian, offset {offset:g}",
            "dtype": "float32",
            "largest error": error,
            "bound": bound,
            "right": error <= bound,
        }


def section(run: gpu_run.Run) -> Iterator[dict]:
    """Largest errors against float64: statistics, values, gradients."""
    shape = (16, 4, 4, 8) if run.quick else (64, 16, 16, 32)
    every = cases(run.quick)
    programs = gpu_run.together(
        [functools.partial(_compiled, case, shape) for case in every]
    )
    wrong = 0
    for case, program in zip(every, programs):
        if isinstance(program, Exception):
            wrong += 1
            yield {
                "note": f"{case.name}, {case.dtype}: {gpu_run.short(program)}"
            }
            continue
        for offset in OFFSETS:
            if case.dtype != "float32" and offset > 100:
                continue  # x itself is too coarse
            arrays = data(case.dtype, offset, shape)
            x, where, *rest = arrays
            given = np.where(where, x, np.nan).astype(x.dtype)
            result = program(given if case.masked else x, where, *rest)
            want = wanted(case, given if case.masked else x, where, *rest)
            found, allowed = errors(result, want), bounds(case.dtype, offset)
            right = all(found[n] <= allowed[n] for n in found)
            wrong += not right
            name = f"{case.name}{', mask' * case.masked}"
            yield {
                "case": f"{name}, offset {offset:g}",
                "dtype": case.dtype,
                **found,
                "right": right,
            }
    for row in hessian(run):
        wrong += not row["right"]
        yield row
    yield {"note": f"{wrong} of all cases are wrong" if wrong else "all right"}


def _compiled(case: Case, shape: tuple[int, ...]) -> Any:
    x, where, *rest = data(case.dtype, 0.0, shape)
    run = case.run if case.masked else functools.partial(_unmasked, case.run)
    return jax.jit(run).lower(x, where, *rest).compile()


def _unmasked(run, x, where, *rest):
    return run(x, None, *rest)
