"""Under the strictest settings for what JAX promotes on its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.precise
from jaxbn import Scope
from tests.helpers.layers import draw, linen_layer, nnx_layer

pytestmark = pytest.mark.sample(4)

N, C = 8, 3
IDS = np.arange(N) % 2


@pytest.fixture(autouse=True)
def strict():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


OPTIONS = {
    "plain": {},
    "ids": dict(sharing=jaxbn.Scope(num_ids=2)),
    "affine per id": dict(sharing=jaxbn.Scope(num_ids=2), per_id="affine"),
    "both per id": dict(sharing=jaxbn.Scope(num_ids=2), per_id="both"),
    "ghost": dict(sharing=jaxbn.Scope(normalize_over=4)),
    "ghost and ids": dict(sharing=jaxbn.Scope(normalize_over=4, num_ids=2)),
    "group": dict(sharing=jaxbn.Scope(group_size=2), axis_name="data"),
    "debias": dict(running=jaxbn.Running(debias=True)),
    "cumulative": dict(momentum=None),
    "unbiased": dict(running=jaxbn.Running(ddof=1)),
    "skip": dict(running=jaxbn.Running(skip_nonfinite=True)),
    "renorm": dict(renorm=(1.5, 0.5)),
    "schedule": dict(renorm=jaxbn.renorm_limits),
    "timesteps": dict(running=jaxbn.Running(num_timesteps=2)),
    "frozen": dict(running=jaxbn.Running(mode="frozen")),
    "weighted": dict(inference=jaxbn.ExampleWeight(0.1)),
    "prior": dict(inference=jaxbn.Prior(2.0)),
    "axes": dict(axis=(1, 2)),
}


def arguments(options, masked):
    given = {}
    if options.get("sharing", Scope()).num_ids is not None:
        given["ids"] = IDS
    if options.get("running", jaxbn.Running()).num_timesteps is not None:
        given["timestep"] = 1
    if masked:
        given["mask"] = np.arange(N)[:, None, None] > 2
    return given


def in_context(run, x):
    """Over two devices of vmap, so that names and groups are bound."""
    return jax.vmap(run, axis_name="data")(jnp.stack([x, x + 1]))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.complex64))
def test_linen(name, masked, dtype):
    options = OPTIONS[name]
    if dtype == jnp.complex64:
        # Of flax's own promotion, complex and float32 have no strict one.
        options = dict(use_scale=False, use_bias=False, **options)
    x = draw(N, 2, C).astype(dtype)
    layer = linen_layer(**options)
    given = arguments(options, masked)

    def run(x):
        variables = layer.init(jax.random.key(0), x, **given)

        def loss(x, variables):
            y, new = layer.apply(variables, x, mutable=["batch_stats"], **given)
            return jnp.square(y).real.sum(), (y, new)

        grads, (y, new) = jax.grad(loss, has_aux=True)(x, variables)
        infer = layer.clone(use_running_average=True)
        return y, grads, infer.apply({**variables, **new}, x, **given)

    chex.assert_tree_all_finite(in_context(run, x))


@pytest.mark.parametrize("name", OPTIONS)
def test_nnx(name):
    options = {**OPTIONS[name]}
    x = draw(N, 2, C)
    if "axis" in options:
        options["axis"] = -1  # of nnx, one
    given = arguments(options, masked=True)

    def run(x):
        layer = nnx_layer(**options)

        def loss(layer, x):
            return jnp.square(layer(x, **given)).sum()

        grads = nnx.grad(loss)(layer, x)
        layer.eval()
        return layer(x, **given), jax.tree.leaves(grads)

    chex.assert_tree_all_finite(in_context(run, x))


def test_core():
    x = draw(N, C)
    by_id = jaxbn.batch_norm(
        x, ids=IDS, where=x > 0, sharing=Scope(num_ids=2, normalize_over=4)
    )
    parts = [jaxbn.moments(x[:4]), jaxbn.moments(x[4:], where=x[4:] > 0)]
    merged = jaxbn.merge(*parts)
    running = jaxbn.init_running(C, count_steps=True)
    running = jaxbn.update_running(running, merged, decay=0.9, debias=True)
    adapted = jaxbn.adapt(running, merged, prior=3)
    stacked = jax.tree.map(
        lambda a: jnp.stack([a, a]), {"mean": running.mean, "var": running.var}
    )
    pooled = jaxbn.pool(stacked, counts=jnp.array([1, 3]))
    y = jaxbn.normalize(x, adapted.mean, adapted.var, ids=None)
    chex.assert_tree_all_finite((by_id[1], merged, adapted, pooled, y))


def test_shuffle():
    x, key = draw(N, C), jax.random.key(0)

    def run(x):
        shuffled = jaxbn.shuffle(x, key, axis_name="data")
        return jaxbn.unshuffle(shuffled, key, axis_name="data")

    chex.assert_trees_all_close(in_context(run, x)[0], x)


def test_no_tracer_is_kept():
    """jax.checking_leaks, which searches what refers to each tracer."""
    x = draw(N, C)

    @jax.jit
    def loss(x, ids):
        y, batch = jaxbn.batch_norm(x, ids=ids, sharing=Scope(num_ids=2))
        return jnp.sin(y).sum() + batch.mean.sum()

    with jax.checking_leaks():
        jax.grad(loss)(x, IDS)
        jax.jit(jaxbn.merge)(jaxbn.moments(x), jaxbn.moments(x))
