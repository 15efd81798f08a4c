"""What a layer leaves behind: moments by name, and state in its own dtype."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.helpers.layers import draw, linen_layer, nnx_layer

pytestmark = pytest.mark.sample(3)

NAMED = ["batch_stats", "batch_moments"]


# Moments are handed out where somebody asks for them by name


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return linen_layer()(x), None


def scanned(block):
    axes = dict.fromkeys(["params", *NAMED], 0)
    return nn.scan(
        block, variable_axes=axes, split_rngs={"params": True}, length=2
    )


def mapped(block):
    return nn.vmap(
        block,
        variable_axes=dict.fromkeys(["params", *NAMED], 0),
        split_rngs={"params": True},
        in_axes=(None, None),
        axis_size=2,
    )


class Net(nn.Module):
    block: type

    @nn.compact
    def __call__(self, x):
        return self.block()(x, None)[0]


@pytest.mark.parametrize(
    "block",
    [
        Block,
        nn.remat(Block),
        nn.jit(Block),
        scanned(Block),
        scanned(nn.remat(Block)),
        mapped(Block),
    ],
)
def test_moments_are_handed_out_by_name(block):
    x = draw(4, 3)
    model = Net(block)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    for mutable in (True, DenyList("params"), DenyList(()), ["batch_stats"]):
        _, updates = model.apply(variables, x, mutable=mutable)
        assert "batch_moments" not in updates
    for mutable in (NAMED, tuple(NAMED), set(NAMED)):
        _, updates = model.apply(variables, x, mutable=mutable)
        (moments,) = jax.tree.leaves(
            updates["batch_moments"],
            is_leaf=lambda node: isinstance(node, jaxbn.Moments),
        )
        mean = moments.mean.reshape(-1, 3)[0]  # of the first of the stack
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)


def test_scan_around_jit_hands_out_by_name_whatever_was_traced_before():
    x = draw(4, 3)
    model = Net(scanned(nn.jit(Block)))
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x, mutable=DenyList("params"))
    _, updates = model.apply(variables, x, mutable=NAMED)
    assert "batch_moments" in updates


def test_moments_inside_another_apply():
    x = draw(4, 3)
    inner = linen_layer()
    variables = inner.init(jax.random.key(0), x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, mutable):
            return inner.apply(variables, x, mutable=mutable)[1]

    for outer in (False, True, NAMED):
        for mutable, handed in ((DenyList("params"), False), (NAMED, True)):
            updates = Outer().apply({}, x, mutable, mutable=outer)
            updates = updates if outer is False else updates[0]
            assert ("batch_moments" in updates) == handed


def test_a_loop_over_a_deny_list_keeps_its_structure():
    batches = draw(5, 4, 3)
    layer = linen_layer(momentum=0.0)
    variables = layer.init(jax.random.key(0), batches[0])
    params = variables.pop("params")

    def step(state, x):
        _, state = layer.apply(
            {"params": params, **state}, x, mutable=DenyList("params")
        )
        return state, None

    state, _ = jax.lax.scan(step, variables, batches)
    np.testing.assert_allclose(
        state["batch_stats"]["mean"], batches[-1].mean(0), rtol=1e-5
    )


# Dtypes


FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def cast(state, dtypes):
    """The state of a module in dtypes of its own for params and statistics."""

    def leaf(path, value):
        kind = "stats" if path[0].key in ("mean", "var") else "params"
        return value.astype(dtypes[kind])

    return jax.tree_util.tree_map_with_path(leaf, state)


def result_dtype(cls, x, dtypes, *, inference, **options):
    graph, state = nnx.split(cls(3, rngs=nnx.Rngs(0), **options))

    def call(state, x):
        return nnx.merge(graph, state)(x, use_running_average=inference)

    return jax.eval_shape(call, cast(state, dtypes), x).dtype


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("affine", [True, False])
def test_nnx_results_have_the_dtype_of_flax(inference, affine):
    table = itertools.product(
        (*FLOATS, jnp.int32), FLOATS, FLOATS, (None, *FLOATS)
    )
    for x, params, stats, dtype in table:
        given = jax.ShapeDtypeStruct((4, 3), x)
        got, want = (
            result_dtype(
                cls,
                given,
                {"params": params, "stats": stats},
                inference=inference,
                dtype=dtype,
                use_scale=affine,
                use_bias=affine,
            )
            for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
        )
        assert got == want, (x, params, stats, dtype)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("params", FLOATS)
def test_linen_results_of_integers_have_the_dtype_of_flax(params, dtype):
    x = jnp.arange(12).reshape(4, 3)
    got, want = (
        cls(param_dtype=params, dtype=dtype, use_running_average=False)
        .init_with_output(jax.random.key(0), x)[0]
        .dtype
        for cls in (jaxbn.linen.BatchNorm, nn.BatchNorm)
    )
    assert got == want


def test_a_model_that_was_cast_stays_narrow_and_is_rounded_once():
    module = nnx_layer(momentum=0.0)
    module(draw(64, 3))
    narrow = jax.tree.map(lambda a: a.astype("bfloat16"), nnx.state(module))
    nnx.update(module, narrow)
    module.eval()
    x = draw(8, 3, dtype=jnp.bfloat16)
    y = module(x)
    assert y.dtype == jnp.bfloat16
    x, mean, var = (
        np.asarray(a, np.float64)
        for a in (x, module.mean[...], module.var[...])
    )
    want = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)


def scan_linen(options, dtype, batches, **arguments):
    layer = linen_layer(**options)
    variables = layer.init(jax.random.key(0), batches[0], **arguments)
    variables = narrowed(variables, dtype)

    def step(stats, x):
        y, state = layer.apply(
            {**variables, "batch_stats": stats},
            x,
            mutable=["batch_stats"],
            **arguments,
        )
        return state["batch_stats"], y

    return jax.lax.scan(step, variables["batch_stats"], batches)[0]


def scan_nnx(options, dtype, batches, **arguments):
    graph, state = nnx.split(nnx_layer(**options))

    def step(state, x):
        module = nnx.merge(graph, state)
        y = module(x, **arguments)
        return nnx.state(module), y

    state, _ = jax.lax.scan(step, narrowed(state, dtype), batches)
    return nnx.to_pure_dict(state)


def narrowed(state, dtype):
    return jax.tree.map(
        lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, state
    )


@pytest.mark.parametrize("scan", [scan_linen, scan_nnx])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renorm": (3.0, 5.0)},
        {"running": jaxbn.Running(debias=True, skip_nonfinite=True)},
        {"momentum": None},
    ],
    ids=str,
)
def test_a_carry_keeps_the_dtype_that_it_was_cast_to(scan, dtype, options):
    batches = draw(6, 16, 3)
    got = scan(options, dtype, batches)
    mean, var = np.zeros(3), np.ones(3)
    for step, x in enumerate(np.asarray(batches, np.float64)):
        decay = options.get("momentum", 0.99)
        if decay is None:
            decay = step / (step + 1)
        elif "running" in options:
            decay *= (1 - decay**step) / (1 - decay ** (step + 1))
        mean = (decay * mean + (1 - decay) * x.mean(0)).astype(dtype)
        var = (decay * var + (1 - decay) * x.var(0)).astype(dtype)
        mean, var = mean.astype(np.float64), var.astype(np.float64)
    assert got["mean"].dtype == got["var"].dtype == dtype
    # A sum in float32 may fall on the other side of where it is rounded.
    rtol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(got["mean"], np.float64), mean, rtol=rtol, atol=rtol
    )
    np.testing.assert_allclose(
        np.asarray(got["var"], np.float64), var, rtol=rtol
    )


@pytest.mark.parametrize("scan", [scan_linen, scan_nnx])
def test_a_carry_of_timesteps_keeps_its_dtype(scan):
    batches = draw(6, 16, 3)
    options = {"running": jaxbn.Running(num_timesteps=2), "momentum": 0.0}
    got = scan(options, jnp.bfloat16, batches, timestep=1)
    want = np.stack([np.zeros(3), batches[-1].mean(0)]).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(got["mean"], want)


@pytest.mark.parametrize("x64", [True, False])
def test_narrow_statistics_and_wide_inputs(x64):
    with jax.enable_x64(x64):
        kind = np.float64 if x64 else np.complex64
        x = jnp.asarray(draw(16, 3), kind) * (1 if x64 else 1 + 2j)
        module = nnx_layer(momentum=0.0)
        nnx.update(module, narrowed(nnx.state(module), jnp.bfloat16))
        module(x)
        # A complex mean fits no real dtype.
        want = x.mean(0).astype(jnp.bfloat16 if x64 else kind)
        assert module.mean.dtype == want.dtype
        np.testing.assert_allclose(module.mean[...], want, rtol=1e-6)
        assert module.var.dtype == jnp.bfloat16


def test_moments_are_wide_though_the_statistics_are_narrow():
    x = draw(16, 3)
    layer = linen_layer()
    variables = narrowed(layer.init(jax.random.key(0), x), jnp.bfloat16)
    module = nnx_layer()
    nnx.update(module, narrowed(nnx.state(module), jnp.bfloat16))
    for moments in (
        jaxbn.linen.batch_moments(layer, variables, x),
        jaxbn.nnx.batch_moments(module, x)[""],
    ):
        chex.assert_trees_all_close(moments.mean, x.mean(0), rtol=1e-5)
        assert {a.dtype for a in moments} == {jnp.dtype("float32")}
