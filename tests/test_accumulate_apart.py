"""Microbatches with statistics of their own, and running statistics after."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import accumulate
from jaxbn.linen import BatchNorm
from tests.helpers.accumulation import (
    DECAY,
    EPSILON,
    assert_close,
    jit,
    problem,
)


def moments_loss(norm, params, batch):
    """Every layer's moments as aux; microbatches know nothing of another."""
    x, cotangent, keep = batch
    found = {}
    for i, (w, scale, bias) in enumerate(params):
        x, found[f"layer{i}"] = jaxbn.batch_norm(
            x @ w, scale, bias, where=keep, axis_name=norm
        )
        x = jnp.sin(x)
    return jnp.where(keep, x * cotangent, 0).sum(), (found, x)


def numpy_moments(params, parts):
    """Moments of all parts, each normalized by its own: float64."""
    layers, outputs = [[] for _ in params], []
    for x, _, keep in parts:
        rows = keep[:, 0]
        for (w, scale, bias), seen in zip(params, layers):
            x = x @ w
            seen.append(x[rows])
            mean, var = x[rows].mean(0), x[rows].var(0)
            x = np.sin((x - mean) / np.sqrt(var + EPSILON) * scale + bias)
        outputs.append(x)
    values = [np.concatenate(seen) for seen in layers]
    return [
        (np.float64(len(x)), x.mean(0), x.var(0) * len(x)) for x in values
    ], outputs


def test_apart():
    params, _, batch = problem()
    parts = [jax.tree.map(lambda a, i=i: a[i::4], batch) for i in range(4)]
    want, outputs = numpy_moments(params, parts)
    step = accumulate.value_and_grad(
        functools.partial(moments_loss, None),
        microbatches=4,
        exact=False,
        has_aux=True,
    )
    one = jax.value_and_grad(
        functools.partial(moments_loss, None), has_aux=True
    )
    with jax.enable_x64(True):
        (value, (found, out)), grads = jit(step)(params, batch)
        assert_close(list(map(tuple, found.values())), want, 1e-12)
        assert_close(list(out), outputs, 1e-12)
        one = jit(one)
        each = [one(params, part) for part in parts]
        values, gradients = zip(*((value, grad) for (value, _), grad in each))
        assert_close(value, np.mean(values), 1e-12)
        mean = jax.tree.map(lambda *a: np.mean(a, 0), *gradients)
        assert_close(grads, mean, 1e-12)


@pytest.mark.parametrize(
    "check_vma", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_apart_in_shard_map(check_vma):
    """Microbatches apart, each over all devices."""
    params, _, batch = problem()
    step = accumulate.value_and_grad(
        functools.partial(moments_loss, "data"),
        microbatches=2,
        exact=False,
        has_aux=True,
    )

    def run(params, batch):
        (value, (found, _)), grads = step(params, batch)
        value = jax.lax.psum(value, "data")
        return value, found, grads if check_vma else jax.lax.psum(grads, "data")

    mapped = jax.shard_map(
        run,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    parts = [
        jax.tree.map(
            lambda a, i=i: np.concatenate([b[i::2] for b in np.split(a, 4)]),
            batch,
        )
        for i in range(2)
    ]
    want, _ = numpy_moments(params, parts)
    one = jax.value_and_grad(
        functools.partial(moments_loss, None), has_aux=True
    )
    with jax.enable_x64(True):
        value, found, grads = jit(mapped)(params, batch)
        assert_close(list(map(tuple, found.values())), want, 1e-12)
        each = [jit(one)(params, part) for part in parts]
        assert_close(value, np.mean([value for (value, _), _ in each]), 1e-12)
        mean = jax.tree.map(
            lambda *a: np.mean(a, 0), *(grads for _, grads in each)
        )
        assert_close(grads, mean, 1e-12)


def test_flax_moments_move_running_statistics_once():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(
                BatchNorm,
                use_running_average=False,
                momentum=DECAY,
                running=jaxbn.Running(debias=True, skip_nonfinite=True),
            )
            return norm(name="last")(nn.Dense(3)(norm(name="first")(x)))

    model = Net()

    def loss(params, batch_stats, x):
        y, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats", "batch_moments"],
        )
        return jnp.square(y).mean(), updates["batch_moments"]

    x = np.random.default_rng(0).normal(3, 2, (12, 5)).astype(np.float32)
    variables = jit(model.init)(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]
    step = accumulate.value_and_grad(
        loss, microbatches=3, exact=False, has_aux=True
    )
    (_, moments), _ = jit(step)(params, stats, x)
    update = jit(
        functools.partial(
            accumulate.update_batch_stats,
            decay=DECAY,
            debias=True,
            skip_nonfinite=True,
        )
    )
    got = update(stats, moments)["first"]
    apply = jit(functools.partial(model.apply, mutable=["batch_stats"]))
    _, whole = apply(variables, x)
    assert_close(got, jax.device_get(whole["batch_stats"]["first"]), 1e-5)
    poisoned = jax.tree.map(lambda a: a * jnp.nan, moments)
    skipped = update(stats, poisoned)["first"]
    assert (int(skipped["skipped"]), float(skipped["mean"][0])) == (1, 0.0)


def test_update_batch_stats():
    moments = jaxbn.Moments(jnp.array(4.0), jnp.ones(2), jnp.full(2, 8.0))
    stats = {
        "a": {"b": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        "c": jaxbn.init_running(2),
        "d": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    new = accumulate.update_batch_stats(
        stats, {"a": {"b": moments}, "c": {"moments": moments}}, decay=0.75
    )
    assert_close(new["a"]["b"], {"mean": [0.25] * 2, "var": [1.25] * 2}, 1e-6)
    assert_close(tuple(new["c"])[:2], ([0.25] * 2, [1.25] * 2), 1e-6)
    assert new["d"] is stats["d"]
    unbiased = accumulate.update_batch_stats(
        stats["c"], moments, decay=0.0, ddof=1
    )
    assert_close(unbiased.var, [8 / 3] * 2, 1e-6)


def test_statistics_that_were_cast_are_stored_as_layers_store_them():
    layer = BatchNorm(use_running_average=False, momentum=0.9)
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    collections = ["batch_stats", "batch_moments"]
    _, new = layer.apply(narrow, x, mutable=collections)
    stats = narrow["batch_stats"]
    got = accumulate.update_batch_stats(stats, new["batch_moments"], decay=0.9)
    for name, before in (("mean", x.mean(0)), ("var", x.var(0))):
        want = 0.9 * (name == "var") + 0.1 * before
        assert got[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[name], want.astype(jnp.bfloat16))
        np.testing.assert_array_equal(got[name], new["batch_stats"][name])
    running = jaxbn.RunningStats(stats["mean"], stats["var"])
    moments = new["batch_moments"]["moments"]
    again = accumulate.update_batch_stats(running, moments, decay=0.9)
    np.testing.assert_array_equal(again.mean, got["mean"])


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(use_running_average=False, momentum=DECAY)
        return norm(nn.Dense(3)(x))


def ensemble(*collections):
    mapped = nn.vmap(
        Member,
        variable_axes=dict.fromkeys(("params", *collections), 0),
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mapped()(x)

    return Ensemble()


def test_ensembles_hand_out_moments():
    model = ensemble("batch_stats", "batch_moments")
    x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)

    def loss(model, params, batch_stats, x):
        y, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats", "batch_moments"],
        )
        return jnp.square(y).mean(), new.get("batch_moments")

    def moments_of(model):
        step = accumulate.value_and_grad(
            functools.partial(loss, model),
            microbatches=2,
            exact=False,
            has_aux=True,
        )
        return step(variables["params"], variables["batch_stats"], x)[0][1]

    got = accumulate.update_batch_stats(
        variables["batch_stats"], moments_of(model), decay=DECAY
    )
    _, want = model.apply(variables, x, mutable=["batch_stats"])
    assert_close(got, jax.device_get(want["batch_stats"]), 1e-6)
    nothing = moments_of(ensemble("batch_stats"))
    message = "variable_axes name: add 'batch_moments' to it"
    with pytest.raises(ValueError, match=message):
        accumulate.update_batch_stats({}, nothing, decay=DECAY)
