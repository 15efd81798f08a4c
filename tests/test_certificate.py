"""What the certificate blames, and what it does not: rounding and kinks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.linen import BatchNorm
from jaxbn.testing import assert_shard_invariant
from jaxbn.testing._float64 import in_float64, narrowest
from tests.helpers.folding import Dictated, initialized, normal

SYNCED = functools.partial(
    BatchNorm, use_running_average=False, axis_name="data"
)
ALONE = functools.partial(BatchNorm, use_running_average=False)


def certify(call, x, devices=(2,), **options):
    model = Dictated(call)
    variables = initialized(model, x)
    assert_shard_invariant(
        functools.partial(model.apply, mutable=["batch_stats"]),
        variables,
        x,
        devices=devices,
        **options,
    )


class Block(nn.Module):
    norms: tuple

    @nn.compact
    def __call__(self, x, _=None):
        for i, norm in enumerate(self.norms):
            x = nn.tanh(norm(name=f"norm{i}")(nn.Dense(4)(x)))
        return nn.LayerNorm()(x)


def behind_remat(x):
    x = nn.remat(Block)((SYNCED, ALONE), name="b0")(x)
    return nn.Dense(3)(SYNCED()(x))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block((SYNCED, ALONE), name="inner")(x), None


def in_scan(x):
    steps = nn.scan(
        Step,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=2,
    )
    return nn.Dense(3)(steps(name="steps")(nn.Dense(4)(x), None)[0])


@pytest.mark.parametrize(
    "call, layer",
    [(behind_remat, "b0/norm1"), (in_scan, "steps/inner/norm1")],
    ids=["remat", "scan"],
)
def test_blames_the_layer_inside_a_transformation(call, layer):
    message = (
        f"layer '{layer}' differs on 2 devices: .* Its statistics are not "
        "synchronized over 'data': set axis_name='data'."
    )
    with pytest.raises(AssertionError, match=message):
        certify(call, normal(8, 4))


class Net(nnx.Module):
    """Its layers are called in the reverse order of their names."""

    def __init__(self, axis_names, remat=False):
        rngs = nnx.Rngs(0)
        self.dense = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in "cba"])
        for name, axis_name in zip("cba", axis_names):
            norm = jaxbn.nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
            setattr(self, name, norm)
        self.remat = remat

    def body(self, x):
        for dense, name in zip(self.dense, "cba"):
            x = nnx.tanh(getattr(self, name)(dense(x)))
        return x

    def __call__(self, x):
        return nnx.remat(Net.body)(self, x) if self.remat else self.body(x)


def certify_nnx(net, x, **options):
    graph, state = nnx.split(net)

    def apply(state, x):
        net = nnx.merge(graph, state)
        y = net(x)
        return y, nnx.state(net)

    assert_shard_invariant(apply, state, x, devices=[2], **options)


@pytest.mark.parametrize(
    "axis_names, remat, layer",
    [((None,) * 3, False, "c"), (("data", None, None), True, "b")],
)
def test_blames_the_layer_of_nnx_that_is_called_first(axis_names, remat, layer):
    message = (
        f"layer '{layer}' differs on 2 devices: .* Its statistics are not "
        "synchronized over 'data': set axis_name='data'."
    )
    with pytest.raises(AssertionError, match=message):
        certify_nnx(Net(axis_names, remat), normal(8, 4))


def test_norm_over_features_is_not_asked_for_an_axis():
    def call(x):
        x = nn.LayerNorm()(x - x.mean(0))
        return nn.Dense(3)(SYNCED()(x))

    with pytest.raises(AssertionError, match="depends on how the batch is spl"):
        certify(call, normal(8, 4))


def bfloat16_bias(x):
    x = nn.Conv(4, (1, 1), dtype=jnp.bfloat16, name="conv")(x)
    x = nn.relu(SYNCED(dtype=jnp.bfloat16)(x)).mean((1, 2))
    return nn.Dense(3, dtype=jnp.bfloat16)(x)


def test_bfloat16_gradient_that_is_zero_but_for_rounding():
    message = (
        "On 4 devices gradient of variable 'params/conv/bias' differs by .*, "
        "and not in float64: rounding, of what is zero otherwise."
    )
    with pytest.warns(UserWarning, match=message):
        certify(bfloat16_bias, normal(16, 8, 8, 3), [4])


def normalized_relu(x):
    return nn.relu(SYNCED(use_bias=False)(x))


def test_relu_at_zero_is_a_kink():
    x = normal(16, 32)
    x[3] = 0
    x[3] = x.sum(0) / 15  # the mean of the batch
    message = "On 4 devices the gradient .* not in float64: a kink. At a zero"
    with pytest.warns(UserWarning, match=message):
        certify(normalized_relu, x, [4])


def alone_at_a_kink(x):
    return nn.relu(ALONE(use_bias=False)(x))


def test_real_fault_next_to_a_kink_is_raised():
    x = normal(16, 32)
    x[3] = 0
    x[3] = x.sum(0) / 15
    with pytest.raises(AssertionError, match="set axis_name='data'"):
        certify(alone_at_a_kink, x, [4])


def test_tolerance_is_that_of_the_type_with_the_fewest_digits():
    def loop(x):
        def step(carry, _):
            small = carry.astype(jnp.float16) * 2
            return small.astype(carry.dtype), None

        return jax.lax.scan(step, x, length=2)[0]

    def named_after_a_type(x):
        return x + 1

    named_after_a_type.__name__ = "f:bf16[2]"
    x = jnp.ones(3)
    for function, dtype in (
        (loop, jnp.float16),
        (jax.jit(named_after_a_type), jnp.float32),
        (lambda x: x.astype(jnp.bfloat16), jnp.bfloat16),
        (lambda x: x > 0, jnp.float32),
    ):
        assert narrowest(jax.make_jaxpr(function)(x)) == dtype


def test_every_kind_of_operation_runs_in_float64():
    """Loops, branches, bits, own derivatives, types that are asked for."""

    @jax.custom_vjp
    def own(x):
        return jnp.sin(x)

    own.defvjp(lambda x: (own(x), x), lambda x, g: (2 * g * jnp.cos(x),))

    def loss(x):
        y = jax.lax.scan(lambda c, a: (c + own(a), c * a), x[0], x)[1]
        y = jax.lax.cond(y.sum() > 0, jnp.tanh, jnp.cos, y)
        y = jax.lax.fori_loop(0, 3, lambda _, a: a * 0.5 + 1, y)
        y = jax.checkpoint(jnp.exp)(y.astype(jnp.bfloat16))
        y = y * jax.lax.iota(jnp.bfloat16, y.shape[-1])
        y = jax.lax.reduce_precision(y, 8, 7)
        noise = jax.random.uniform(jax.random.key(0), y.shape)
        product = jax.lax.dot(
            y, y.T, preferred_element_type=jnp.float32
        ) + jnp.sum(noise)
        return product.sum() + jax.lax.top_k(y, 2)[0].sum()

    x = normal(4, 3)
    closed = jax.make_jaxpr(jax.value_and_grad(loss))(x)
    value, grad = in_float64(closed)([x])
    assert value.dtype == grad.dtype == np.float64
    want, slope = jax.value_and_grad(loss)(x)
    np.testing.assert_allclose(value, want, rtol=2e-2)
    np.testing.assert_allclose(grad, slope, rtol=0.1, atol=0.1)
    shifted = x.astype(np.float64)
    shifted[1, 2] += 1e-6  # which is nothing in bfloat16
    difference = (in_float64(closed)([shifted])[0] - value) / 1e-6
    assert 0.1 < abs(difference / grad[1, 2]) < 10


def test_rounding_that_ruins_values_is_raised_as_such():
    def apply(variables, x):
        n, total, squares = jax.lax.psum(
            (jnp.float32(len(x)), x.sum(0), (x * x).sum(0)), "data"
        )
        mean = total / n
        var = squares / n - mean**2  # which is nothing but rounding here
        y = (x - mean) * jax.lax.rsqrt(jnp.abs(var) + 1e-5)
        return y * variables["scale"], {"bn": {"mean": mean, "var": var}}

    message = (
        "layer 'bn' differs on 4 devices: .* In float64 it does not: it is"
    )
    with pytest.raises(AssertionError, match=message):
        assert_shard_invariant(
            apply, {"scale": jnp.ones(3)}, normal(64, 3) + 1e4, devices=[4]
        )


def test_parameters_that_each_device_trained_alone():
    def apply(variables, x):
        slope = jax.grad(lambda w: jnp.tanh(x @ w).mean())(variables["w"])
        return x @ variables["w"], {"w": variables["w"] - slope}

    message = "new variable 'w' differs .* may need a mean over that axis"
    with pytest.raises(AssertionError, match=message):
        assert_shard_invariant(
            apply,
            {"w": normal(4, 3)},
            normal(8, 4),
            devices=[2],
            check_vma=False,
        )


def test_random_keys_among_the_variables():
    """Their words, millions and more, hide no difference of a statistic."""

    def apply(variables, x, axis_name="data"):
        mean = x.mean(0)
        if axis_name:
            mean = jax.lax.pmean(mean, axis_name)
        key = jax.random.split(variables["key"])[0]
        return jnp.tanh(x), {"key": key, "bn": {"mean": mean, "var": mean**2}}

    check = functools.partial(
        assert_shard_invariant,
        variables={"key": jax.random.key(0)},
        batch=normal(8, 4),
        devices=[2],
    )
    check(apply)
    with pytest.raises(AssertionError, match="layer 'bn' differs on 2 devices"):
        check(functools.partial(apply, axis_name=None))
