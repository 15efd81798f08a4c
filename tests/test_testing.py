"""The certificates pass what is right and name what is wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm
from jaxbn.testing import (
    assert_shard_invariant,
    assert_synchronized,
    collectives,
    float64_reference,
)

# float64_reference


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape)


def test_reference_by_hand():
    out = float64_reference(
        [[1.0], [3.0], [np.nan]], where=[[True], [True], [False]], epsilon=0.0
    )
    assert (out.count, out.mean, out.var) == (2, 2, 1)
    np.testing.assert_array_equal(out.y, [[-1], [1], [0]])
    assert out.dx is None


@pytest.mark.parametrize("masked", [False, True])
def test_reference_gradients_are_differences(masked):
    x, cotangent = draw(2, 5, 2, 3)
    scale, bias = draw(2, 3, seed=1)
    where = draw(5, 2, 1, seed=2) > 0 if masked else None

    def loss(x, scale, bias):
        y = float64_reference(x, scale, bias, where=where).y
        return (y * cotangent).sum()

    out = float64_reference(x, scale, bias, where=where, cotangent=cotangent)
    arguments = [x, scale, bias]
    for i, grad in enumerate((out.dx, out.dscale, out.dbias)):
        turn = np.random.default_rng(3).normal(size=arguments[i].shape)

        def along(t, i=i, turn=turn):
            return loss(
                *[a + t * turn * (j == i) for j, a in enumerate(arguments)]
            )

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose((grad * turn).sum(), slope, rtol=1e-7)


def test_reference_takes_features_anywhere():
    x, cotangent = draw(2, 4, 3, 5)
    got = float64_reference(x, cotangent=cotangent, feature_axis=1)
    want = float64_reference(
        x.transpose(0, 2, 1), cotangent=cotangent.transpose(0, 2, 1)
    )
    np.testing.assert_allclose(got.dx, want.dx.transpose(0, 2, 1))


# collectives


PARTS = P("data")


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def mapped(fn, out_specs=PARTS):
    return jax.shard_map(
        fn, mesh=mesh(), in_specs=P("data"), out_specs=out_specs
    )


def test_every_kind_is_counted_with_its_bytes():
    def fn(x):  # (8, 4) float32 on each device
        a = jax.lax.psum(x, "data")
        b = jax.lax.all_gather(x, "data")
        c = jax.lax.psum_scatter(x, "data")
        d = jax.lax.all_to_all(x, "data", 0, 0)
        e = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
        return a + b.sum(0) * c + d * e

    got = collectives(mapped(fn), jnp.ones((64, 4)))
    assert got == {
        "all-reduce": (1, 128),
        "all-gather": (1, 1024),
        "reduce-scatter": (1, 16),
        "all-to-all": (1, 128),
        "collective-permute": (1, 128),
    }


def test_types_tuples_and_loops():
    def fn(x):
        def body(_, y):
            return jax.lax.psum(y, "data").astype(jnp.bfloat16) + y

        return jax.lax.fori_loop(0, 5, body, x)

    x = jax.ShapeDtypeStruct((64,), jnp.bfloat16)
    got = collectives(jax.jit(mapped(fn)), x)["all-reduce"]
    assert got.count == 1 and got.bytes in (16, 32)  # the CPU may widen it

    two = mapped(lambda x: jax.lax.psum((x[:3], x[3:5]), "data"), P())
    assert collectives(two, jnp.ones(64))["all-reduce"].bytes == 5 * 4


def test_no_collectives_and_no_such_kind():
    got = collectives(lambda x, y: x + y, jnp.ones(3), y=jnp.ones(3))
    assert got == {} and got["all-gather"] == (0, 0)
    with pytest.raises(KeyError, match="is no collective"):
        got["all_gather"]


# assert_synchronized


def test_replicas_that_drifted_are_named():
    values = np.arange(3.0, dtype=np.float32)
    copies = [jax.device_put(values, d) for d in jax.devices()]
    spec = NamedSharding(mesh(), P())

    def state(copies):
        array = jax.make_array_from_single_device_arrays((3,), spec, copies)
        return {"bn": {"mean": array}, "note": "text"}

    assert_synchronized(state(copies)["bn"])
    copies[5] = jax.device_put(values + np.float32(1e-3), jax.devices()[5])
    message = "'bn/mean' has drifted: device 5 differ from device 0 by up to"
    with pytest.raises(AssertionError, match=message):
        assert_synchronized({"bn": state(copies)["bn"]})
    assert_synchronized(state(copies)["bn"], rtol=1e-2)


def test_stacked_replicas():
    tree = {"mean": np.ones((8, 3)), "var": np.ones((8, 3))}
    assert_synchronized(tree, stacked=True)
    tree["var"][2, 1] = np.nan
    with pytest.raises(AssertionError, match="'var' has drifted: replica 2"):
        assert_synchronized(tree, stacked=True)
    with pytest.raises(ValueError, match="'var' is a scalar"):
        assert_synchronized({"var": np.float32(1)}, stacked=True)


def test_nothing_to_compare_is_an_error():
    split = jax.device_put(np.ones((8, 3)), NamedSharding(mesh(), P("data")))
    with pytest.raises(ValueError, match="stacked=True"):
        assert_synchronized({"mean": split})


# assert_shard_invariant


class Net(nn.Module):
    """Three convolutions with a shortcut."""

    norms: tuple

    @nn.compact
    def __call__(self, x, mask=None):
        for i, norm in enumerate(self.norms):
            y = nn.Conv(4, (3, 3), use_bias=False)(x)
            y = norm(use_running_average=False, name=f"norm{i}")(y, mask=mask)
            x = nn.softplus(y) + (x if i else 0)
        return nn.Dense(3)(x.mean((1, 2)))


SYNCED = functools.partial(BatchNorm, axis_name="data")
ALONE = functools.partial(BatchNorm, axis_name=None)
FLAX = functools.partial(nn.BatchNorm, axis_name="data")


def certify(norms, *, masked=False, **options):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 4, 4, 2)).astype(np.float32)
    mask = rng.random((16, 1, 1, 1)) < 0.5
    mask[:2] = mask[-1] = True
    model = Net(norms)
    batch = {"image": images}
    if masked:
        batch["mask"] = mask
    variables = Net((ALONE,) * len(norms)).init(jax.random.key(0), images)

    def apply(variables, batch):
        return model.apply(
            variables,
            batch["image"],
            batch.get("mask"),
            mutable=["batch_stats"],
        )

    assert_shard_invariant(apply, variables, batch, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_synchronized_model_passes_every_split(masked):
    certify((SYNCED,) * 3, masked=masked)


def test_passes_without_vma_tracking():
    certify((SYNCED,) * 2, devices=[8], check_vma=False)


def test_one_layer_left_alone_is_named():
    message = (
        "layer 'norm1' differs on 2 devices: relative error .* Its statistics "
        "are not synchronized over 'data': set axis_name='data'."
    )
    with pytest.raises(AssertionError, match=message):
        certify((SYNCED, ALONE, SYNCED))


def test_flax_passes_even_shards_and_not_uneven_ones():
    certify((FLAX,) * 2, devices=[4])
    message = "layer 'norm0' differs on 4 devices.*A mean of the devices' means"
    with pytest.raises(AssertionError, match=message):
        certify((FLAX,) * 2, devices=[4], masked=True)


def test_functions_without_layers_are_named_by_their_arrays():
    def apply(axis_name, variables, x):
        y, batch = jaxbn.batch_norm(x, variables["scale"], axis_name=axis_name)
        return y, {"mean": batch.mean}

    x = draw(8, 3).astype(np.float32)
    variables = {"scale": jnp.ones(3)}
    check = functools.partial(
        assert_shard_invariant, variables=variables, batch=x, devices=[4]
    )
    check(functools.partial(apply, "data"))
    with pytest.raises(
        AssertionError, match="new variable 'mean' differs on 4"
    ):
        check(functools.partial(apply, None))


def test_a_derivative_that_stays_at_home_is_found():
    """Right values and statistics, and a gradient of this device alone."""

    @jax.custom_vjp
    def total(x):
        return jax.lax.psum(x, "data")

    total.defvjp(lambda x: (total(x), None), lambda _, g: (g,))

    def apply(variables, x):
        n = jax.lax.psum(jnp.float32(len(x)), "data")
        y = (x - total(x.sum(0)) / n) ** 3 * variables["scale"]
        return y, {}

    x = draw(8, 3).astype(np.float32)
    with pytest.raises(AssertionError, match="gradient of batch"):
        assert_shard_invariant(
            apply,
            {"scale": jnp.ones(3)},
            x,
            devices=[4],
            check_vma=False,
        )


def test_two_axes():
    norm = functools.partial(BatchNorm, axis_name=("host", "chip"))
    certify((norm,), axis_name=("host", "chip"), devices=[4])


@pytest.mark.parametrize(
    "apply, batch, message",
    [
        (lambda v, b: (b, {}), np.ones((7, 2)), "7 examples cannot be split"),
        (
            lambda v, b: (b[0], {}),
            (np.ones((8, 2)), np.ones((4, 2))),
            "one length on axis 0",
        ),
        (lambda v, b: b, np.ones((8, 2)), r"must return \(outputs, new"),
        (lambda v, b: (b / 0.0, {}), np.ones((8, 2)), "is not finite on one"),
    ],
)
def test_what_cannot_be_certified(apply, batch, message):
    with pytest.raises(ValueError, match=message):
        assert_shard_invariant(apply, {}, batch)
