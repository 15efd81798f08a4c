"""Features, or a mapped axis, sharded over Explicit mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Running, Scope
from jaxbn.linen import BatchNorm
from jaxbn.testing import float64_reference

pytestmark = pytest.mark.sample(3)

N, C = 16, 6
IDS = np.arange(N) % 2
KEEP = (np.arange(N) % 5 < 3)[:, None, None]
KEEP[:4] = False  # all of the first of four devices
EPSILON = 1e-5


def mesh():
    kinds = (AxisType.Explicit,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)


def draw(seed=0, shape=(N, 4, C)):
    x, cotangent = np.random.default_rng(seed).normal(2, 3, (2, *shape))
    return x.astype(np.float32), cotangent.astype(np.float32)


def put(tree, spec):
    return jax.device_put(tree, NamedSharding(mesh(), spec))


def under_jit(run):
    return run


def over_data_alone(run):
    """Manual over the examples, while the features stay Explicit."""
    return jax.shard_map(
        run,
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P("data"), P()),
        axis_names={"data"},
    )


CONTEXTS = pytest.mark.parametrize("context", (under_jit, over_data_alone))

# Options, and what shares statistics as a label of each example.
SCOPES = {
    "everything": ({}, np.zeros(N, int)),
    "mask": (dict(where=KEEP), np.zeros(N, int)),
    "ids": (dict(ids=IDS, sharing=Scope(num_ids=2)), IDS),
    "ghost": (dict(sharing=Scope(normalize_over=2)), np.arange(N) // 2),
    "groups": (dict(sharing=Scope(group_size=2)), np.arange(N) // 8),
    "two axes": (dict(feature_axis=(1, 2)), np.zeros(N, int)),
}


@CONTEXTS
@pytest.mark.parametrize("name", SCOPES)
def test_value_and_gradient(name, context):
    options, labels = SCOPES[name]
    x, cotangent = draw()
    arrays = {k: options[k] for k in ("where", "ids") if k in options}
    rest = {k: v for k, v in options.items() if k not in arrays}

    def run(data, _, arrays):
        def norm(x):
            return jaxbn.batch_norm(x, axis_name="data", **arrays, **rest)

        y, pull, batch = jax.vjp(norm, data[0], has_aux=True)
        return (y, pull(data[1])[0]), batch

    with jax.set_mesh(mesh()):
        data = put((x, cotangent), P("data", None, "model"))
        mapped = jax.jit(context(run))
        out = mapped(data, (), put(arrays, P("data")))
        (y, dx), batch = jax.device_get(out)
    features = rest.get("feature_axis", -1)
    for label in np.unique(labels):
        own = labels == label
        want = float64_reference(
            x[own],
            where=arrays["where"][own] if "where" in arrays else None,
            cotangent=cotangent[own],
            feature_axis=features,
        )
        np.testing.assert_allclose(y[own], want.y, atol=1e-5)
        np.testing.assert_allclose(dx[own], want.dx, atol=1e-5)
        if name == "ids":
            mean, var = batch.mean[label], batch.var[label]
            np.testing.assert_allclose(mean, want.mean, rtol=1e-5)
            np.testing.assert_allclose(var, want.var, rtol=1e-5)
    if name != "ids":
        whole = float64_reference(
            x, where=arrays.get("where"), feature_axis=features
        )
        np.testing.assert_allclose(batch.mean, whole.mean, rtol=1e-5)
        np.testing.assert_allclose(batch.var, whole.var, rtol=1e-5)


def layer_step(layer, context, state, x, *, timestep=None, **arrays):
    """Calls a layer whose statistics are sharded like its features."""

    def run(x, state, arrays):
        return layer.apply(
            {"batch_stats": state},
            x,
            mutable=["batch_stats"],
            timestep=timestep,
            **arrays,
        )

    with jax.set_mesh(mesh()):
        rows = next(iter(state.values())).ndim - 1
        state = put(state, P(*[None] * rows, "model"))
        y, new = jax.jit(context(run))(
            put(x, P("data", None, "model")), state, put(arrays, P("data"))
        )
        return jax.device_get((y, new.get("batch_stats", {})))


def plain_layer(**options):
    return BatchNorm(
        axis_name="data", use_scale=False, use_bias=False, **options
    )


@CONTEXTS
def test_running_statistics_of_ids(context):
    x, _ = draw()
    layer = plain_layer(
        use_running_average=False, momentum=0.9, sharing=Scope(num_ids=2)
    )
    old = dict(mean=np.full((2, C), 3.0), var=np.full((2, C), 2.0))
    old = jax.tree.map(jnp.float32, old)
    _, new = layer_step(layer, context, old, x, ids=IDS)
    for i in range(2):
        want = float64_reference(x[i == IDS])
        mean = 0.9 * 3 + 0.1 * want.mean
        np.testing.assert_allclose(new["mean"][i], mean, rtol=1e-5)
        var = 0.9 * 2 + 0.1 * want.var
        np.testing.assert_allclose(new["var"][i], var, rtol=1e-5)


@CONTEXTS
def test_running_statistics_of_timesteps(context):
    x, _ = draw()
    layer = plain_layer(
        use_running_average=False,
        momentum=0.9,
        running=Running(num_timesteps=3),
    )
    old = dict(mean=np.full((3, C), 3.0), var=np.full((3, C), 2.0))
    old = jax.tree.map(jnp.float32, old)
    _, new = layer_step(layer, context, old, x, timestep=1)
    want = float64_reference(x)
    for name, value in (("mean", want.mean), ("var", want.var)):
        row = 0.9 * np.asarray(old[name][1]) + 0.1 * value
        np.testing.assert_allclose(new[name][1], row, rtol=1e-5)
        np.testing.assert_array_equal(new[name][::2], old[name][::2])


@CONTEXTS
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("ids", (None, IDS))
def test_examples_with_a_weight(ids, masked, context):
    x, _ = draw()
    layer = plain_layer(
        use_running_average=True,
        inference=jaxbn.ExampleWeight(0.2),
        sharing=Scope(num_ids=None if ids is None else 2),
    )
    rows = (C,) if ids is None else (2, C)
    rng = np.random.default_rng(1)
    mean, var = rng.normal(2, 1, rows), rng.uniform(4, 9, rows)
    state = dict(mean=jnp.float32(mean), var=jnp.float32(var))
    keep = KEEP if masked else np.ones_like(KEEP)
    arrays = dict(mask=keep) if masked else {}
    arrays |= {} if ids is None else dict(ids=ids)
    y, _ = layer_step(layer, context, state, x, **arrays)
    for i in range(N):
        m, v = (a if ids is None else a[ids[i]] for a in (mean, var))
        if keep[i].all():
            own = np.float64(x[i])
            between = 0.2 * 0.8 * (own.mean(0) - m) ** 2
            m, v = (
                0.8 * m + 0.2 * own.mean(0),
                0.8 * v + 0.2 * own.var(0) + between,
            )
        want = (x[i] - m) / np.sqrt(v + EPSILON)
        np.testing.assert_allclose(y[i], want, atol=1e-5)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    "spec", (P(None, "data"), P(None, "data", None, "model"), P("model"))
)
def test_an_ensemble(spec, masked):
    """vmap turns the conditional of the second pass into a select."""
    x, cotangent = draw(shape=(4, N, 4, C))
    x[1] += 100  # takes the second pass
    where = KEEP if masked else None

    def run(x, cotangent):
        def norm(x):
            return jaxbn.batch_norm(x, where=where)

        y, pull, batch = jax.vjp(jax.vmap(norm), x, has_aux=True)
        return y, pull(cotangent)[0], batch

    with jax.set_mesh(mesh()):
        out = jax.jit(run)(*put((x, cotangent), spec))
        y, dx, batch = jax.device_get(out)
    for i in range(len(x)):
        want = float64_reference(x[i], where=where, cotangent=cotangent[i])
        np.testing.assert_allclose(y[i], want.y, atol=5e-5)
        np.testing.assert_allclose(dx[i], want.dx, atol=1e-5)
        var = batch.m2[i] / batch.count[i]
        np.testing.assert_allclose(var, want.var, rtol=1e-5)
