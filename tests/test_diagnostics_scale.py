"""Scale invariance, angles of updates, the norm of batch norm's gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import batch_norm, diagnostics


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(params, batch_stats, batch, *, epsilon=0.0):
    """Hidden weights that are scale-invariant, and a head that is not."""
    x, target = batch
    hidden = params["hidden"]
    h, _ = batch_norm(x @ hidden["kernel"], hidden["scale"], epsilon=epsilon)
    h, _ = batch_norm(jnp.tanh(h) @ params["last"], epsilon=epsilon)
    return ((jnp.tanh(h) @ params["head"] - target) ** 2).mean(), None


def numpy_network(params, batch, epsilon):
    x, target = batch

    def norm(y):
        y = y - y.mean(0)
        return y / np.sqrt((y * y).mean(0) + epsilon)

    hidden = params["hidden"]
    h = np.tanh(norm(x @ hidden["kernel"]) * hidden["scale"])
    h = np.tanh(norm(h @ params["last"]))
    return ((h @ params["head"] - target) ** 2).mean()


def numpy_gradient(params, name, batch, epsilon):
    """Of one weight; exact, from an imaginary step."""
    slope = np.zeros(params[name].shape)
    for index in np.ndindex(slope.shape):
        moved = params[name].astype(complex)
        moved[index] += 1e-30j
        tree = {**params, name: moved}
        slope[index] = numpy_network(tree, batch, epsilon).imag / 1e-30
    return slope


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {
        "hidden": {
            "kernel": rng.normal(size=(3, 5)),
            "scale": 1 + rng.random(5),
        },
        "last": rng.normal(size=(5, 4)),
        "head": rng.normal(size=(4, 2)),
    }
    return params, (rng.normal(size=(16, 3)), rng.normal(size=(16, 2)))


@functools.cache
def measured(path, epsilon):
    loss = functools.partial(network, epsilon=epsilon)
    run = functools.partial(diagnostics.scale_invariance, loss, path=path)
    return jax.jit(lambda *args, factor: run(*args, factor=factor))


@pytest.mark.parametrize("path", ["hidden/kernel", ("last",)])
@pytest.mark.parametrize("factor", [0.01, 0.1, 10.0, 100.0])
def test_without_epsilon_weights_before_batch_norm_are_invariant(
    problem, path, factor
):
    params, batch = problem
    got = measured(path, 0.0)(params, {}, batch, factor=factor)
    assert got.loss_difference < 1e-13
    assert got.gradient_error < 1e-12
    assert np.abs(got.radial).max() < 1e-12
    weight = params["last"] if path == ("last",) else params["hidden"]["kernel"]
    np.testing.assert_allclose(
        got.inverse_square_norm, 1 / (weight**2).sum(0), rtol=1e-14
    )


@pytest.mark.parametrize("path, epsilon", [("last", 0.1), ("head", 0.0)])
def test_what_is_not_invariant_is_measured(problem, path, epsilon):
    """With epsilon, and for a weight that no batch norm follows."""
    params, batch = problem
    got = measured(path, epsilon)(params, {}, batch, factor=0.5)
    w = params[path]
    g = numpy_gradient(params, path, batch, epsilon)
    scaled = {**params, path: 0.5 * w}
    there = numpy_gradient(scaled, path, batch, epsilon)
    value, other = (
        numpy_network(tree, batch, epsilon) for tree in (params, scaled)
    )
    error = np.linalg.norm(0.5 * there - g) / np.linalg.norm(g)
    radial = (w * g).sum(0) / np.sqrt((w**2).sum(0) * (g**2).sum(0))
    np.testing.assert_allclose(got.loss_difference, abs(value - other), 1e-10)
    np.testing.assert_allclose(got.gradient_error, error, rtol=1e-10)
    np.testing.assert_allclose(got.radial, radial, rtol=1e-9)
    assert error > 1e-2 and np.abs(radial).max() > 1e-2


def test_channels_on_another_axis(problem):
    params, batch = problem
    turned = {**params, "last": params["last"].T}

    def loss(params, batch_stats, batch):
        return network({**params, "last": params["last"].T}, {}, batch)

    @jax.jit
    def both(params, turned, batch):
        options = dict(path="last", factor=3.0)
        return (
            diagnostics.scale_invariance(
                loss, turned, {}, batch, feature_axis=0, **options
            ),
            diagnostics.angular_update(
                turned,
                params | {"last": 2 * turned["last"]},
                path="last",
                feature_axis=0,
            ),
        )

    got, angle = both(params, turned, batch)
    assert got.radial.shape == angle.shape == (4,)
    assert np.abs(got.radial).max() < 1e-12 and np.abs(angle).max() < 1e-15


@pytest.mark.parametrize(
    "dtype, tolerance", [(np.float32, 2e-6), (float, 1e-9)]
)
@pytest.mark.parametrize("angle", [1e-6, 1e-3, 1.0, 2.0, 3.14])
def test_angles_of_any_size(dtype, tolerance, angle):
    """An arccos in float32 finds nothing of the small ones."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=(3, 3, 8, 6)).astype(dtype)
    w = old.astype(float).reshape(-1, 6)
    across = rng.normal(size=w.shape)
    across -= w * (w * across).sum(0) / (w**2).sum(0)
    across *= np.linalg.norm(w, axis=0) / np.linalg.norm(across, axis=0)
    length = rng.uniform(0.5, 2, 6) if angle > 0.1 else 1.0
    new = length * (np.cos(angle) * w + np.sin(angle) * across)
    new = new.astype(dtype)
    # What rounding to dtype left of the angle, by half-angle in float64.
    u, v = (a / np.linalg.norm(a, axis=0) for a in (w, new.astype(float)))
    want = 2 * np.arctan2(
        np.linalg.norm(u - v, axis=0), np.linalg.norm(u + v, axis=0)
    )
    np.testing.assert_allclose(want, angle, rtol=0.1)
    got = diagnostics.angular_update(
        {"conv": old}, {"conv": new.reshape(old.shape)}, path="conv"
    )
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_angle_of_equilibrium(momentum):
    """Random gradients across w, of size 1 / ||w||, under weight decay."""
    rate, decay = 0.05, 0.1
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(2, 64, 40))
    squares = []
    for step in range(3000):
        g = rng.normal(size=w.shape)
        size = (w * w).sum(0)
        g = (g - w * (w * g).sum(0) / size) / np.sqrt(size)
        v = momentum * v + g + decay * w
        new = w - rate * v
        if step > 2000 and step % 10 == 0:
            angle = diagnostics.angular_update(
                {"w": jnp.asarray(w)}, {"w": jnp.asarray(new)}, path="w"
            )
            squares.append(np.square(angle).mean())
        w = new
    want = diagnostics.equilibrium_angle(rate, decay, momentum)
    np.testing.assert_allclose(math.sqrt(np.mean(squares)), want, rtol=0.02)


def test_weight_decay_is_a_growing_learning_rate(problem):
    """SGD with weight decay is SGD with eta (1 - eta decay)^(-2 t - 1)."""
    params, batch = problem
    rate, decay, steps = 0.1, 0.05, 60
    slope = jax.value_and_grad(network, has_aux=True)

    def update(params, gradient, rate, shrink):
        """The weights under batch norm; everything else stays."""
        new = rate_step(params["last"], gradient["last"], rate, shrink)
        kernel = params["hidden"]["kernel"]
        kernel = rate_step(kernel, gradient["hidden"]["kernel"], rate, shrink)
        hidden = {**params["hidden"], "kernel": kernel}
        return {**params, "hidden": hidden, "last": new}

    def rate_step(w, g, rate, shrink):
        return shrink * w - rate * g

    def step(state, t):
        decayed, plain = state
        (loss_a, _), a = slope(decayed, {}, batch)
        (loss_b, _), b = slope(plain, {}, batch)
        shrink = 1 - rate * decay
        grown = rate * shrink ** (-2 * t - 1)
        new = update(decayed, a, rate, shrink), update(plain, b, grown, 1.0)
        angles = [
            diagnostics.angular_update(old, new, path="last")
            for old, new in zip(state, new)
        ]
        return new, (loss_a, loss_b, *angles)

    state = (params, params)
    (decayed, plain), (loss_a, loss_b, turn_a, turn_b) = jax.jit(
        lambda state: jax.lax.scan(step, state, jnp.arange(steps) * 1.0)
    )(state)
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-12)
    np.testing.assert_allclose(turn_a, turn_b, rtol=1e-9)
    assert loss_a[-1] < 0.9 * loss_a[0]
    ratio = np.asarray(plain["last"]) / decayed["last"]
    np.testing.assert_allclose(ratio, (1 - rate * decay) ** -steps, rtol=1e-10)


def sides(y, g, scale, epsilon, *, power=1.0, factor=None):
    """The identity in numpy, with a backward pass written out anew."""
    y, g = y.reshape(-1, y.shape[-1]), g.reshape(-1, g.shape[-1])
    m = len(y)
    s = np.sqrt(y.var(0) + epsilon)
    jacobian = np.eye(m) - 1 / m
    yhat = (y - y.mean(0)) / s
    lhs = np.stack(
        [
            scale[c] / s[c] * (jacobian - np.outer(h, h) / m) @ g[:, c]
            for c, h in enumerate(yhat.T)
        ]
    )
    q = y.var(0) / s**2 if factor is None else 2 - factor
    along = (g * yhat).sum(0) ** 2 / m**power
    rest = (g**2).sum(0) - g.sum(0) ** 2 / m - (2 - q) * along
    return (lhs**2).sum(1), scale**2 / s**2 * rest


@functools.cache
def compiled_identity(epsilon):
    return jax.jit(
        functools.partial(diagnostics.lipschitz_identity, epsilon=epsilon)
    )


@pytest.mark.parametrize("shape", [(16, 8), (3, 4, 2, 8)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
def test_both_sides_of_the_identity(shape, epsilon):
    rng = np.random.default_rng(1)
    y = rng.normal(2, 0.05 if epsilon == 1e-5 else 1.0, shape)
    g, scale = rng.normal(size=shape), rng.normal(size=8)
    g += 2 * y  # along yhat, so that every term counts
    got = compiled_identity(epsilon)(y, g, scale)
    lhs, rhs = sides(y, g, scale, epsilon)
    np.testing.assert_allclose(got.lhs, lhs, rtol=1e-11)
    np.testing.assert_allclose(got.rhs, rhs, rtol=1e-11)
    np.testing.assert_allclose(got.lhs, got.rhs, rtol=1e-12)
    # As printed, 1 / sqrt(m), the bound lhs <= rhs is violated everywhere.
    _, printed = sides(y, g, scale, epsilon, power=0.5)
    assert (np.asarray(got.lhs) > printed).all()
    if epsilon:
        _, without = sides(y, g, scale, epsilon, factor=1)
        error = np.abs(without - got.lhs) / got.lhs
        assert error.max() > 1e-4


def angle(new=None, **options):
    old = {"w": np.ones((2, 3)), "b": {"c": np.ones(3), "d": np.ones(())}}
    new = old if new is None else new
    return lambda: diagnostics.angular_update(old, new, **options)


def invariance(**options):
    params = {"w": np.ones((2, 3)), "v": [np.ones(2)] * 2, "w2": np.ones(2)}

    def loss(params, batch_stats, batch):
        return params["w"].sum(), None

    options = {"path": "w", "factor": 2.0} | options
    return lambda: diagnostics.scale_invariance(loss, params, {}, 0, **options)


def identity(y=(4, 3), g=(4, 3), scale=3, epsilon=0.0, dtype=float):
    return lambda: diagnostics.lipschitz_identity(
        np.ones(y, dtype), np.ones(g), np.ones(scale), epsilon=epsilon
    )


@pytest.mark.parametrize(
    "broken, message",
    [
        (angle(path="x"), "params has no 'x'; it has b/c, b/d, w"),
        (
            angle(path="b"),
            "'b' matches 2 arrays of params: b/c, b/d. Select one",
        ),
        (
            angle(path="w", feature_axis=2),
            r"=2 is not an axis.*float64\[2, 3\]",
        ),
        (angle(path="b/d"), r"=-1 is not an axis.*float64\[\]"),
        (
            angle(new={"w": 1.0}, path="w"),
            "new_params must have the structure of params",
        ),
        (invariance(path=("v", 2)), "params has no 'v/2'; it has v/0, v/1, w"),
        (invariance(factor=0.0), "factor must be positive; got 0.0"),
        (invariance(feature_axis=5), "=5 is not an axis"),
        (identity(dtype=int), "x must be floating or complex; got int64"),
        (identity(y=(3,), g=(3,)), "no axis is left"),
        (
            identity(g=(3, 4)),
            r"cotangent.*float64\[4, 3\]; got float64\[3, 4\]",
        ),
        (identity(scale=2), r"scale must have shape \(3,\)"),
        (identity(epsilon=-1.0), "epsilon must not be negative; got -1.0"),
        (
            lambda: diagnostics.equilibrium_angle(0.1, 0.1, 1.0),
            r"momentum in \[0, 1\); got 0.1, 0.1 and 1.0",
        ),
        (lambda: diagnostics.equilibrium_angle(0.0, 0.1), "must be positive"),
        (lambda: diagnostics.equilibrium_angle(0.1, -1), "not negative"),
    ],
)
def test_errors(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()
