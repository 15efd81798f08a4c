"""The loss along its gradient, its curvature, and covariate shift."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import batch_norm, diagnostics

STEPS = np.array([0.02, 0.1, 0.5, 2.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def mlp(params, batch_stats, batch):
    """Two layers under batch norm and a head; epsilon is 0."""
    h, target = batch
    for name in ("first", "second"):
        layer = params[name]
        h, _ = batch_norm(h @ layer["kernel"], layer["scale"], epsilon=0.0)
        h = jnp.tanh(h)
    return ((h @ params["head"]["kernel"] - target) ** 2).mean(), None


def numpy_mlp(params, batch):
    """The same without a word of jaxbn, for complex numbers too."""
    h, target = batch
    for name in ("first", "second"):
        h = h @ params[name]["kernel"]
        h = h - h.mean(0)
        h = np.tanh(h / np.sqrt((h * h).mean(0)) * params[name]["scale"])
    return ((h @ params["head"]["kernel"] - target) ** 2).mean()


def numpy_gradient(params, batch):
    """Exact to rounding: the imaginary part of a step of 1e-30 i."""
    flat, treedef = jax.tree.flatten(params)
    found = []
    for i, leaf in enumerate(flat):
        slope = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            moved = leaf.astype(complex)
            moved[index] += 1e-30j
            tree = treedef.unflatten(flat[:i] + [moved] + flat[i + 1 :])
            slope[index] = numpy_mlp(tree, batch).imag / 1e-30
        found.append(slope)
    return treedef.unflatten(found)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def added(params, step, direction):
    return jax.tree.map(lambda p, d: p + step * d, params, direction)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)

    def layer(n, m):
        return {"kernel": rng.normal(size=(n, m)), "scale": 1 + rng.random(m)}

    params = {
        "first": layer(3, 4),
        "head": {"kernel": rng.normal(size=(3, 2))},
        "second": layer(4, 3),
    }
    batch = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    return params, batch


def quadratic(params, batch_stats, batch):
    """p^T A p / 2 for a diagonal A."""
    terms = jax.tree.map(lambda a, p: (a * p * p).sum() / 2, batch, params)
    return sum(jax.tree.leaves(terms)), batch_stats


DIAGONAL = {"a": np.array([1.0, -7.0, 3.0]), "b": np.array([[0.5, 2.0]])}
POINT = {"a": np.array([0.3, 0.1, -2.0]), "b": np.array([[4.0, 1.0]])}


@pytest.mark.parametrize("unroll", [False, True])
def test_gradient_line_of_a_quadratic(unroll):
    line = jax.jit(
        functools.partial(diagnostics.gradient_line, quadratic, unroll=unroll)
    )
    got = line(POINT, {}, DIAGONAL, steps=STEPS)
    a, p = vector(DIAGONAL), vector(POINT)
    g = a * p
    there = p - STEPS[:, None] * g
    g_there = a * there
    size = np.linalg.norm(g)
    want = diagnostics.GradientLine(
        loss0=(a * p * p).sum() / 2,
        gradient_norm=size,
        loss=(a * there**2).sum(1) / 2,
        predictiveness=STEPS * np.linalg.norm(a * g),
        beta=np.full(4, np.linalg.norm(a * g) / size),
        cosine=g_there @ g / size / np.linalg.norm(g_there, axis=1),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), got, want
    )
    np.testing.assert_allclose(got.loss_range, np.ptp(want.loss), rtol=1e-12)
    np.testing.assert_allclose(got.effective_beta, want.beta[0], rtol=1e-12)


def test_gradient_line_of_a_network(problem):
    params, batch = problem
    line = jax.jit(functools.partial(diagnostics.gradient_line, mlp))
    got = line(params, {}, batch, steps=STEPS)
    tree = numpy_gradient(params, batch)
    g = vector(tree)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-10)
    assert_close(got.loss0, numpy_mlp(params, batch))
    assert_close(got.gradient_norm, np.linalg.norm(g))
    for k, step in enumerate(STEPS):
        moved = added(params, -step, tree)
        there = vector(numpy_gradient(moved, batch))
        change = np.linalg.norm(there - g)
        assert_close(got.loss[k], numpy_mlp(moved, batch))
        assert_close(got.predictiveness[k], change)
        assert_close(got.beta[k], change / step / np.linalg.norm(g))
        cosine = there @ g / np.linalg.norm(there) / np.linalg.norm(g)
        assert_close(got.cosine[k], cosine, atol=1e-12)


def test_running_statistics_are_neither_written_nor_carried_along():
    """A probe that saw another's statistics would have another loss."""

    def loss(params, batch_stats, batch):
        value, _ = quadratic(params, {}, batch)
        return value + batch_stats, batch_stats + 1

    def line(loss, batch_stats, unroll):
        return diagnostics.gradient_line(
            loss, POINT, batch_stats, DIAGONAL, steps=STEPS, unroll=unroll
        ).loss

    @jax.jit
    def losses(five):
        plain = line(quadratic, {}, False)
        return plain, line(loss, five, False), line(loss, five, True)

    plain, *others = losses(5.0)
    for got in others:
        np.testing.assert_allclose(got, plain + 5, rtol=1e-14)


def test_a_zero_gradient_has_no_direction():
    zero = jax.tree.map(np.zeros_like, POINT)
    run = jax.jit(functools.partial(diagnostics.gradient_line, quadratic))
    got = run(zero, {}, DIAGONAL, steps=STEPS)
    assert got.gradient_norm == 0 and np.isnan(got.cosine).all()
    assert np.isnan(got.beta).all() and not got.predictiveness.any()


def test_max_step_of_a_quadratic():
    """L(p - t a p) = (1 - t a)^2 L(p), so the bound is known."""
    a, p = {"p": np.array([4.0])}, {"p": np.array([3.0])}
    run = jax.jit(
        functools.partial(diagnostics.max_step, quadratic),
        static_argnames=("threshold", "unroll"),
    )
    bound = (1 + np.sqrt(1000)) / 4
    steps = np.array([1.01 * bound, 1.0, 0.99 * bound, 1e-3, 1e200])
    np.testing.assert_array_equal(run(p, {}, a, steps=steps), steps[2])
    # 1e200 overflows to inf; alone it leaves none.
    assert run(p, {}, a, steps=steps[-1:]) == 0
    strict = functools.partial(run, threshold=1e-2, unroll=True)
    assert strict(p, {}, a, steps=steps) == 0

    def undefined(params, batch_stats, batch):
        return jnp.sqrt(params["p"].sum()), None

    # sqrt(p - t / (2 sqrt(p))) is NaN beyond t = 2 p^1.5.
    got = diagnostics.max_step(undefined, p, {}, {}, steps=[5.0, 10.0, 11.0])
    assert got == 10


def test_sharpness_of_a_quadratic():
    run = functools.partial(
        diagnostics.sharpness, quadratic, iterations=200, key=jax.random.key(0)
    )
    got, early = jax.jit(lambda *args: (run(*args), run(*args, iterations=2)))(
        POINT, {}, DIAGONAL
    )
    a, g = vector(DIAGONAL), vector(DIAGONAL) * vector(POINT)
    np.testing.assert_allclose(
        got.along_gradient, (g * a * g).sum() / (g * g).sum(), rtol=1e-12
    )
    np.testing.assert_allclose(got.top, -7, rtol=1e-12)
    assert got.residual < 1e-12 and early.residual > 1e-2


def test_sharpness_of_a_network(problem):
    params, batch = problem
    run = functools.partial(
        diagnostics.sharpness, mlp, iterations=400, key=jax.random.key(1)
    )
    got = jax.jit(run)(params, {}, batch)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    flat, treedef = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in flat])[:-1]

    def gradient(v):
        parts = np.split(v, ends)
        leaves = [p.reshape(leaf.shape) for p, leaf in zip(parts, flat)]
        return vector(numpy_gradient(treedef.unflatten(leaves), batch))

    at, g, h = vector(params), vector(numpy_gradient(params, batch)), 1e-5
    hessian = np.stack(
        [
            (gradient(at + h * e) - gradient(at - h * e)) / (2 * h)
            for e in np.eye(size)
        ]
    )
    np.testing.assert_allclose(
        got.along_gradient, g @ hessian @ g / (g @ g), rtol=1e-7
    )
    values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    top = values[np.abs(values).argmax()]
    np.testing.assert_allclose(got.top, top, rtol=1e-7)
    assert got.residual < 1e-3
    alone = functools.partial(diagnostics.sharpness, mlp)
    assert jax.eval_shape(alone, params, {}, batch).top is None


@pytest.mark.parametrize(
    "order, members",
    [
        (("first", "second", "head"), ("first", "second", "head")),
        # Another order, and a layer that stays as it was.
        (("head", ["first", "kernel"]), ("head", "first/kernel")),
    ],
)
def test_covariate_shift_of_a_network(problem, order, members):
    params, batch = problem
    new = added(params, -0.3, numpy_gradient(params, batch))
    run = functools.partial(
        diagnostics.internal_covariate_shift, mlp, order=order
    )
    got = jax.jit(run)(params, new, {}, batch)

    def part(tree, path):
        return functools.reduce(lambda t, key: t[key], path.split("/"), tree)

    def put(tree, path, value):
        key, _, rest = path.partition("/")
        return {**tree, key: put(tree[key], rest, value) if rest else value}

    mixed = params
    before = numpy_gradient(params, batch)
    for i, path in enumerate(members):
        g = vector(part(before, path))
        there = vector(part(numpy_gradient(mixed, batch), path))
        change, size = np.linalg.norm(there - g), np.linalg.norm(g)
        cosine = there @ g / np.linalg.norm(there) / size
        want = diagnostics.CovariateShift(change, cosine, change / size)
        for name, value in want._asdict().items():
            np.testing.assert_allclose(
                getattr(got, name)[i], value, rtol=1e-9, atol=1e-12
            )
        mixed = put(mixed, path, part(new, path))
    assert got.l2[0] < 1e-15 and (got.l2[1:] > 1e-2).all()
    unrolled = jax.jit(functools.partial(run, unroll=True))
    np.testing.assert_allclose(
        unrolled(params, new, {}, batch), got, rtol=1e-12, atol=1e-14
    )


def call(name, *args, loss=quadratic, **options):
    fn = getattr(diagnostics, name)
    return lambda: fn(loss, POINT, *args, {}, DIAGONAL, **options)


line = functools.partial(call, "gradient_line")
shift = functools.partial(call, "internal_covariate_shift", POINT)


@pytest.mark.parametrize(
    "broken, message",
    [
        (line(steps=0.1), r"\(K,\); got float\d+\[\]"),
        (line(steps=[]), r"\(K,\); got float\d+\[0\]"),
        (line(steps=[0.1, -1.0]), r"positive.*got \[ 0.1 -1. \]"),
        (line(steps=[np.nan]), "positive"),
        (call("max_step", steps=[0]), "positive"),
        (call("sharpness", iterations=3), "iterations=3.*key="),
        (call("sharpness", iterations=-1), "not be negative; got -1"),
        (shift(order=("a", "c")), "params has no 'c'; it has a, b"),
        (shift(order=()), r"order must list the layers.*got \(\)"),
        (shift(order="a"), "order must list the layers.*got 'a'"),
        (shift(order=("a", "b", "a")), "'a' and 'a' of order are the same"),
        (
            call(
                "internal_covariate_shift",
                {"a": POINT["a"]},
                order=("a", "b"),
            ),
            "new_params must have the structure of params, with a, b; got a",
        ),
        (
            call(
                "internal_covariate_shift",
                {**POINT, "a": np.ones(2)},
                order=("a",),
            ),
            r"'a' is float64\[2\] in new_params and float64\[3\] in params",
        ),
        (
            line(steps=[1.0], loss=lambda *_: jnp.ones(())),
            r"must return \(scalar, new_batch_stats\); got float64\[\]",
        ),
        (
            line(steps=[1.0], loss=lambda *_: (jnp.ones(2), None)),
            r"got \(float64\[2\], NoneType\)",
        ),
    ],
)
def test_errors(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()
