"""Options, masks and ids that the layers and the core take or refuse."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from jaxbn.precise import with_statistics
from jaxbn.testing import float64_reference
from tests.helpers.layers import (
    call_linen,
    call_nnx,
    draw,
    grouped,
    linen_layer,
    nnx_layer,
)

pytestmark = pytest.mark.sample(2)

NAN, INF = float("nan"), float("inf")


LAYERS = pytest.mark.parametrize("make", [linen_layer, nnx_layer])
CALLS = pytest.mark.parametrize("call", [call_linen, call_nnx])


# Options out of range


OUT_OF_RANGE = [
    *(
        (dict(momentum=value), f"momentum must be in [0, 1]; got {value}.")
        for value in (-0.1, 1.5, NAN)
    ),
    *(
        (
            dict(epsilon=value),
            f"epsilon must be finite and at least 0; got {value}.",
        )
        for value in (-1e-5, NAN, INF)
    ),
    *(
        (
            dict(ddof=value),
            f"ddof must be 0, the biased variance, or 1, the "
            f"unbiased one; got {value}.",
        )
        for value in (-1, 2, 0.5)
    ),
    *(
        (
            dict(mode=value),
            f"mode must be one of ('update', 'keep', 'frozen'); got {value!r}.",
        )
        for value in ("freeze", None)
    ),
    (
        dict(num_timesteps=0),
        "num_timesteps must be at least 1; got 0.",
    ),
    (
        dict(num_ids=0),
        "num_ids must be at least 1; got 0.",
    ),
    (dict(renorm=(0.5, 1.0)), "r_max must be a number and at least 1; got 0.5"),
    (dict(renorm=(1.0, -1.0)), "d_max must be a number and at least 0; got -1"),
    (dict(renorm=(NAN, 1.0)), "r_max must be a number and at least 1; got nan"),
    *(
        (dict(renorm=value), "renorm must be (r_max, d_max), or a function")
        for value in ((3.0,), 3.0, True)
    ),
    (
        dict(running=jaxbn.Running(debias=True), momentum=1.0),
        "debias=True needs momentum < 1",
    ),
    (
        dict(per_id="both"),
        "needs sharing.num_ids, the rows of scale and bias; got num_ids=None.",
    ),
    (
        dict(per_id="both", running=jaxbn.Running(num_timesteps=2)),
        "needs sharing.num_ids, the rows of scale and bias; got num_ids=",
    ),
    (
        dict(per_id="affine"),
        "needs sharing.num_ids, the rows of scale and bias; got num_ids=None.",
    ),
    (
        dict(per_id="scale", sharing=jaxbn.Scope(num_ids=2)),
        "per_id must be one of ('statistics', ",
    ),
    (
        dict(
            sharing=jaxbn.Scope(num_ids=2),
            running=jaxbn.Running(num_timesteps=2),
        ),
        "set only one of them",
    ),
    (
        dict(
            axis_index_groups=[[0, 1]],
            sharing=jaxbn.Scope(axis_index_groups=[[0, 1]]),
        ),
        "axis_index_groups is set twice",
    ),
    (dict(sharing=8), "sharing must be jaxbn.Scope; got 8."),
    (dict(running={"ddof": 1}), "running must be jaxbn.Running; got {'ddof"),
    (
        dict(inference=4.0),
        "inference must be jaxbn.Prior or jaxbn.ExampleWeight or None; got 4",
    ),
    (
        dict(group_size=2, normalize_over=4),
        "group_size and normalize_over both choose the devices",
    ),
    (
        dict(group_size=0),
        "group_size must be at least 1; got 0.",
    ),
]


@LAYERS
@pytest.mark.parametrize("options, message", OUT_OF_RANGE, ids=str)
def test_a_layer_refuses_when_it_is_made(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**grouped(options))


@pytest.mark.parametrize(
    "kind, value, message",
    [
        (jaxbn.ExampleWeight, -0.5, "weight must be in [0, 1]; got -0.5."),
        (jaxbn.ExampleWeight, 1.5, "weight must be in [0, 1]; got 1.5."),
        (jaxbn.ExampleWeight, NAN, "weight must be in [0, 1]; got nan."),
        (jaxbn.Prior, -1, "examples must be at least 0; got -1."),
        (jaxbn.Prior, NAN, "examples must be at least 0; got nan."),
    ],
)
def test_ways_of_inference_refuse(kind, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(value)


def test_clones_and_submodules_are_checked():
    with pytest.raises(ValueError, match="ddof must be 0"):
        linen_layer().clone(running=jaxbn.Running(ddof=2))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen_layer(momentum=2.0)(x)

    with pytest.raises(ValueError, match=re.escape("momentum must be in [0")):
        Net().init(jax.random.key(0), draw(4, 3))


@LAYERS
@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=0.0),
        dict(momentum=1.0),
        dict(momentum=None),
        dict(epsilon=0),
        dict(epsilon=np.float32(1e-3)),
        dict(running=jaxbn.Running(ddof=np.int64(1))),
        dict(inference=jaxbn.Prior(0.0)),
        dict(inference=jaxbn.Prior(INF)),
        dict(inference=jaxbn.ExampleWeight(1)),
        dict(renorm=(1, 0)),
        dict(renorm=(np.float32(3), INF)),
        dict(renorm=jaxbn.renorm_limits),
        dict(sharing=jaxbn.Scope(num_ids=1), per_id="both"),
        dict(
            sharing=jaxbn.Scope(num_ids=2),
            per_id="affine",
            running=jaxbn.Running(num_timesteps=2),
        ),
        dict(running=jaxbn.Running(num_timesteps=1)),
    ],
    ids=lambda options: " ".join(options),
)
def test_the_ends_of_a_range_are_in_it(make, options):
    make(**options)


@pytest.mark.parametrize("wide", (False, True))
def test_integers_in_place_of_floats(wide):
    """They are float32 too, not float64 as numpy promotes int32."""
    x = draw(8, 3)
    running = jaxbn.init_running(3)

    def norm(kind):
        y, _ = jaxbn.batch_renorm(
            x,
            np.array([1, 2, 3], kind),
            np.array([4, 5, 6], kind),
            running=running,
            r_max=kind(3),
            d_max=kind(5),
        )
        mean, var = np.ones(3, kind), np.array([1, 4, 9], kind)
        return y, jaxbn.normalize(x, mean, var)

    with jax.enable_x64(wide), warnings.catch_warnings():
        warnings.simplefilter("error")
        got, want = norm(np.int32), norm(np.float32)
        for a, b in zip(got, want):
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b)
        of_integers = jaxbn.init_running(3, dtype=np.int32)
        assert {a.dtype.name for a in of_integers[:2]} == {"float32"}


@pytest.mark.parametrize("names", ("data", ("data",), ["data"]))
def test_names_of_axes(names):
    x = draw(8, 3)

    def norm(x):
        return nnx_layer(axis_name=names)(x)

    y = jax.vmap(norm, axis_name="data")(x.reshape(4, 2, 3))
    np.testing.assert_allclose(
        y.reshape(8, 3), float64_reference(x).y, atol=1e-5
    )


def test_traced_options_pass():
    x = draw(4, 3)

    @jax.jit
    def mean(momentum):
        layer = linen_layer(momentum=momentum)
        variables = layer.init(jax.random.key(0), x)
        _, state = layer.apply(variables, x, mutable=["batch_stats"])
        return state["batch_stats"]["mean"]

    np.testing.assert_allclose(mean(0.5), x.mean(0) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        *(
            (dict(decay=value), f"decay must be in [0, 1]; got {value}.")
            for value in (-0.1, 1.5, NAN)
        ),
        (dict(decay=np.float32(2)), "decay must be in [0, 1]; got 2.0."),
        (
            dict(decay=0.9, ddof=2),
            "ddof must be 0, the biased variance, or 1",
        ),
    ],
    ids=str,
)
def test_update_running_refuses(options, message):
    batch = jaxbn.moments(draw(4, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxbn.update_running(jaxbn.init_running(3), batch, **options)


def test_update_running_takes_traced_and_per_feature_decay():
    batch, old = jaxbn.moments(draw(4, 3)), jaxbn.init_running(3)
    decay = jnp.array([0.0, 0.5, 1.0])
    want = (1 - decay) * batch.mean
    for update in (jaxbn.update_running, jax.jit(jaxbn.update_running)):
        got = update(old, batch, decay=decay)
        np.testing.assert_allclose(got.mean, want, rtol=1e-6)


# Masks and ids


@CALLS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_a_mask_is_bool(call, dtype):
    x = draw(4, 3)
    mask = np.array([[1], [0], [1], [1]])
    message = f"mask must be bool; got {np.dtype(dtype)}[4, 1]. Compare first"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(x, {}, mask=jnp.asarray(mask, dtype))
    assert "mask > 0" in str(error.value)
    where = f"where must be bool; got {np.dtype(dtype)}[4, 1]. Compare first"
    with pytest.raises(ValueError, match=re.escape(where)):
        jaxbn.batch_norm(x, where=jnp.asarray(mask, dtype))
    want, _ = jaxbn.batch_norm(x, where=mask > 0)
    np.testing.assert_allclose(call(x, {}, mask=mask > 0), want, rtol=1e-5)
    np.testing.assert_allclose(
        call(x, {}, mask=(mask > 0).tolist()), want, rtol=1e-5
    )


@CALLS
@pytest.mark.parametrize(
    "options, arguments, message",
    [
        (
            {},
            dict(mask=np.ones(4, bool)),
            "mask is bool[4] and x is float32[4, 2, 3]: write a mask over the "
            "first axis as mask[:, None, None], and one over the last axis as "
            "mask[None, :].",
        ),
        (
            {},
            dict(mask=np.ones((5, 1, 1), bool)),
            "mask must broadcast to x; got mask bool[5, 1, 1]",
        ),
        (
            {},
            dict(ids=np.zeros(4, int)),
            "num_ids of the layer and ids of the call must be given together; "
            "got num_ids=None and ids=int",
        ),
        (
            {"sharing": jaxbn.Scope(num_ids=2)},
            {},
            "got num_ids=2 and ids=None.",
        ),
        (
            {"sharing": jaxbn.Scope(num_ids=2)},
            dict(ids=np.zeros(5, int)),
            "ids must be integers of shape (4,)",
        ),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_errors_have_the_words_of_the_layer(
    call, options, arguments, message, inference
):
    mode = "frozen" if inference else "update"
    options = {**options, "running": jaxbn.Running(mode=mode)}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(draw(4, 2, 3), options, **arguments)
    assert not re.search("where|scope", str(error.value).split("---")[0])


# One value a feature


class TestOneValue:
    """Its variance is 0, so that y is bias and x receives no gradient."""

    X = draw(1, 3)
    MESSAGE = re.escape(
        "x is float32[1, 3], so each statistic is over a single value"
    )

    def test_in_training_it_is_an_error(self):
        with pytest.raises(ValueError, match=self.MESSAGE):
            nnx_layer()(self.X)
        layer = linen_layer()
        variables = layer.init(jax.random.key(0), self.X)
        with pytest.raises(ValueError, match=self.MESSAGE):
            layer.apply(variables, self.X, mutable=["batch_stats"])

    @pytest.mark.parametrize("shape", ((1, 3), (1, 1, 1, 3)))
    def test_in_the_core(self, shape):
        with pytest.raises(
            ValueError, match="each statistic is over a single value"
        ):
            jaxbn.batch_norm(self.X.reshape(shape))
        jaxbn.batch_norm(jnp.zeros((1, 2, 3)))
        assert jaxbn.moments(self.X).count == 1

    def test_in_ghost_batches_of_one(self):
        with pytest.raises(
            ValueError, match="each statistic is over a single value"
        ):
            jaxbn.batch_norm(draw(4, 3), sharing=jaxbn.Scope(normalize_over=1))

    def test_where_it_is_defined(self):
        frozen = linen_layer(running=jaxbn.Running(mode="frozen"))
        variables = frozen.init(jax.random.key(0), self.X)
        names = ["batch_stats", "batch_moments"]
        frozen.apply(variables, self.X, mutable=names)
        infer = jaxbn.linen.BatchNorm(True, inference=jaxbn.Prior(4.0))
        assert infer.apply(variables, self.X).any()
        renorm = linen_layer(renorm=(1.5, 0.5))
        assert renorm.apply(variables, self.X, mutable=names)[0].any()
        y, _ = jaxbn.batch_norm(self.X[0])  # one example on purpose
        assert y.shape == (3,)

    def test_synchronized_it_is_one_of_many(self):
        x = draw(8, 1, 3)
        y = jax.vmap(
            lambda x: jaxbn.batch_norm(x, axis_name="data")[0],
            axis_name="data",
        )(x)
        want, _ = jaxbn.batch_norm(x)
        np.testing.assert_allclose(y, want, atol=1e-6)


@pytest.mark.parametrize("axis", (2, -3, (0, 5)))
def test_an_axis_that_x_lacks(axis):
    message = re.escape(f"axis={axis} is not an axis of x, which is float32[4")
    with pytest.raises(ValueError, match="^" + message):
        linen_layer(axis=axis).init(jax.random.key(0), draw(4, 3))
    if isinstance(axis, int):
        with pytest.raises(ValueError, match="^" + message):
            nnx_layer(axis=axis)(draw(4, 3))


def test_statistics_that_are_put_are_biased_or_unbiased():
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    with pytest.raises(ValueError, match="ddof must be 0"):
        with_statistics(stats, jaxbn.moments(draw(4, 3)), ddof=2)
