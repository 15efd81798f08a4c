"""Running statistics, activations, tails; all data measures on flax models."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.stats

import jaxbn
import jaxbn.linen
from jaxbn import Moments, RunningStats, diagnostics, precise
from jaxbn.doctor import Health


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def identity(params, batch_stats, x, *, train):
    return x


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.tanh(nn.Dense(6, name="hidden")(x))
        norm = jaxbn.linen.BatchNorm(use_running_average=not train, name="norm")
        return nn.Dense(3, name="head")(norm(x))


@pytest.fixture(scope="module")
def trained():
    """A linen net, its variables, data, and precise statistics."""
    with jax.enable_x64(True):
        model = Net()
        rng = np.random.default_rng(4)
        x = rng.normal(size=(32, 4))
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), x
        )
        variables = jax.tree.map(lambda a: a.astype(float), variables)
        moments = functools.partial(
            jaxbn.linen.batch_moments, model, train=True
        )
        stats = precise.recompute(moments, variables, [x[:24], x[24:]]).stats
    return model, variables, x, stats


def linen_apply(model):
    def apply(params, batch_stats, x, *, train):
        variables = {"params": params, "batch_stats": batch_stats}
        if not train:
            return model.apply(variables, x, train=False)
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    return apply


def numpy_logits(params, x, mean=None, var=None):
    h = np.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    mean, var = (h.mean(0), h.var(0)) if mean is None else (mean, var)
    h = (h - mean) / np.sqrt(var + 1e-5)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def test_gap_of_a_linen_model(trained):
    model, variables, x, stats = trained
    params, running = variables["params"], variables["batch_stats"]
    kept = jax.tree.map(np.array, running)
    best = precise.with_statistics(running, stats)
    labels = np.random.default_rng(5).integers(0, 3, 32)
    run = jax.jit(
        functools.partial(
            diagnostics.eval_gap, linen_apply(model), batch_size=8
        )
    )
    train, test = (x[:24], labels[:24]), (x[16:] + 1, labels[16:])
    got = run(params, running, train, test, precise_stats=best)
    numbers = jax.tree.map(np.asarray, params)

    def want(data, mean=None, var=None):
        x, labels = data
        z = np.concatenate(
            [
                numpy_logits(numbers, part, mean, var)
                for part in np.split(x, len(x) // 8)
            ]
        )
        loss = scipy.special.logsumexp(z, 1) - z[np.arange(len(z)), labels]
        return loss.mean(), (z.argmax(1) == labels).mean()

    exact = stats["norm"]
    for found, expected in (
        (got.train_batch, want(train)),
        (got.test_batch, want(test)),
        (got.test_running, want(test, 0, 1)),
        (got.test_precise, want(test, exact.mean, exact.var)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    losses = [evaluation.loss for evaluation in got]
    assert np.min(np.abs(np.diff(losses))) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, running, kept)
    short = functools.partial(run, params, running, train, test)
    assert jax.eval_shape(short).test_precise is None


def test_influence_and_noise_of_a_linen_model(trained):
    model, variables, x, _ = trained
    params, running = variables["params"], variables["batch_stats"]
    apply = linen_apply(model)

    @jax.jit
    def measured(params, running, x, key):
        return (
            diagnostics.influence(apply, params, running, x[:6], chunk_size=6),
            diagnostics.companion_noise(
                apply,
                params,
                running,
                x[:3],
                x[3:],
                batch_size=30,
                draws=2,
                key=key,
            ),
        )

    matrix, noise = measured(params, running, x, jax.random.key(0))
    assert (matrix > 1e-4).all() and noise.variance.max() < 1e-20
    numbers = jax.tree.map(np.asarray, params)
    for i in range(3):
        batch = np.concatenate([x[i : i + 1], x[3:]])
        z = numpy_logits(numbers, batch)[0]
        own = numpy_logits(numbers, x[i : i + 1], 0, 1)[0]
        np.testing.assert_allclose(
            noise.squared_bias[i], ((z - own) ** 2).mean(), rtol=1e-10
        )


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_staleness_of_each_layer(epsilon):
    rng = np.random.default_rng(6)
    mean, var = rng.normal(size=4), 1 + rng.random(4)
    running_mean, running_var = rng.normal(size=4), 1 + rng.random(4)
    count = np.array([5.0, 5.0, 5.0, 0.0])
    data = Moments(count, mean, count * var)
    layer = {"mean": running_mean, "var": running_var, "steps": 3}
    running = {
        "block": {"norm": layer},
        "other": RunningStats(mean[:2], var[:2]),
        "left out": layer,
    }
    tree = {
        "block": {"norm": data},
        "other": Moments(np.array(5.0), mean[:2], 5 * var[:2]),
    }
    run = functools.partial(diagnostics.stats_staleness, epsilon=epsilon)
    got = jax.jit(run)(running, tree)
    assert set(got) == {"block", "other"}
    found = got["block"]["norm"]
    assert all(np.isnan(field[3]) for field in found)
    sigma = np.sqrt(var[:3] + epsilon)
    sigma_r = np.sqrt(running_var[:3] + epsilon)
    gap = np.abs(running_mean - mean)[:3]
    np.testing.assert_allclose(found.z[:3], gap / sigma, rtol=1e-12)
    np.testing.assert_allclose(
        found.log_variance[:3], 2 * np.log(sigma_r / sigma), rtol=1e-12
    )
    # The integral itself: KL of two normal distributions.
    t = np.linspace(-30, 30, 200001)[:, None]
    p = scipy.stats.norm(mean[:3], sigma).logpdf(t)
    q = scipy.stats.norm(running_mean[:3], sigma_r).logpdf(t)
    kl = (np.exp(p) * (p - q)).sum(0) * 60 / 200000
    np.testing.assert_allclose(found.kl[:3], kl, rtol=1e-9)
    for field in got["other"]:
        np.testing.assert_allclose(field, 0, atol=1e-15)


def test_staleness_is_what_the_doctor_reports(trained):
    _, variables, _, stats = trained
    running, data = variables["batch_stats"]["norm"], stats["norm"]
    got = diagnostics.stats_staleness(variables["batch_stats"], stats)["norm"]
    health = Health(
        path="norm",
        kind="jaxbn",
        axis_name=None,
        examples=32,
        momentum=0.9,
        running_mean=np.asarray(running["mean"]),
        running_var=np.asarray(running["var"]),
        mean=data.mean,
        var=data.var,
        mean_noise=0,
        var_noise=0,
        gap=0.0,
        noise=0.0,
        scale=None,
        epsilon=1e-5,
    )
    np.testing.assert_allclose(got.z, health.z, rtol=1e-12)
    np.testing.assert_allclose(got.kl, health.kl, rtol=1e-12)


def test_layers_of_a_scan_have_an_axis_more():
    mean = np.arange(6.0).reshape(2, 3)
    data = Moments(np.array([4.0, 8.0]), mean, np.full((2, 3), 8.0))
    running = {"mean": mean + 1, "var": np.ones((2, 3))}
    got = diagnostics.stats_staleness(running, data, epsilon=0.0)
    want = np.repeat([[1 / np.sqrt(2)], [1.0]], 3, 1)
    np.testing.assert_allclose(got.z, want, rtol=1e-12)


def test_activations_of_named_layers():
    rng = np.random.default_rng(7)
    tree = {
        "b": np.maximum(rng.normal(size=(6, 5, 4)), 0),
        "a": {"x": rng.normal([1, -2, 0.5], 3, (9, 3))},
    }
    tree["b"][..., 1] = 0
    tree["a"]["x"][:, 2] = -np.abs(tree["a"]["x"][:, 2])

    def want(a):
        channels = a.reshape(-1, a.shape[-1])
        return (
            np.abs(channels.mean(0)).mean(),
            channels.std(0).mean(),
            (channels.max(0) <= 0).mean(),
            (np.abs(a) > 1.5).mean(),
        )

    run = functools.partial(diagnostics.activation_stats, limit=1.5)
    got = jax.jit(functools.partial(run, order=("b", "a")))(tree)
    np.testing.assert_allclose(
        np.stack(got, 1), [want(tree["b"]), want(tree["a"]["x"])], rtol=1e-12
    )
    assert (got.dead > 0).all() and (got.saturated > 0).all()
    # Without an order as the tree is flattened, by sorted keys.
    every = jax.jit(run)(tree)
    np.testing.assert_allclose(every.std, got.std[::-1], rtol=1e-15)
    turned = [np.moveaxis(tree["b"], -1, 1)]
    first = jax.jit(
        functools.partial(diagnostics.activation_stats, feature_axis=1)
    )(turned)
    assert first.saturated is None
    np.testing.assert_allclose(first.std, got.std[:1], rtol=1e-12)
    np.testing.assert_allclose(first.dead, got.dead[:1], rtol=1e-12)


def test_activations_of_flax_intermediates(trained):
    model, variables, x, _ = trained
    run = functools.partial(
        model.apply,
        train=False,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    _, state = jax.jit(run)(variables, x)
    got = diagnostics.activation_stats(
        state["intermediates"], order=("hidden", "norm", "head")
    )
    params = jax.tree.map(np.asarray, variables["params"])
    hidden = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    logits = numpy_logits(params, x, 0, 1)
    for i, layer in ((0, hidden), (2, logits)):
        np.testing.assert_allclose(got.std[i], layer.std(0).mean(), rtol=1e-10)
        want = np.abs(layer.mean(0)).mean()
        np.testing.assert_allclose(got.mean_abs[i], want, rtol=1e-10)


@pytest.mark.parametrize("size", [1.0, 1e-150])
def test_tail_of_a_tree_is_that_of_one_vector(size):
    rng = np.random.default_rng(8)
    tree = {
        "a": size * rng.standard_t(3, (30, 20)),
        "b": [size * rng.normal(0.5, 1, 50), np.zeros(200)],
    }
    g = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    got = jax.jit(functools.partial(diagnostics.gradient_tail, tail=0.1))(tree)
    np.testing.assert_allclose(got.absmax, np.abs(g).max(), rtol=1e-15)
    np.testing.assert_allclose(got.std, g.std(), rtol=1e-12)
    np.testing.assert_allclose(
        got.excess_kurtosis, scipy.stats.kurtosis(g / size), rtol=1e-10
    )
    x = np.sort(np.abs(g[g != 0]))[::-1]
    k = len(x) // 10
    assert (len(x), k) == (650, 65)
    hill = 1 / np.log(x[:k] / x[k]).mean()
    np.testing.assert_allclose(got.hill, hill, rtol=1e-10)


def test_tails_that_are_known():
    """A power law has its own index, and a normal distribution none."""
    tail = jax.jit(diagnostics.gradient_tail)
    u = (np.arange(200_000) + 0.5) / 200_000
    for alpha in (1.0, 3.0):
        got = tail(u ** (-1 / alpha) * np.where(np.arange(u.size) % 2, 1, -1))
        np.testing.assert_allclose(got.hill, alpha, rtol=1e-3)
    normal = tail(scipy.stats.norm.ppf(u))
    np.testing.assert_allclose(normal.excess_kurtosis, 0, atol=5e-3)
    np.testing.assert_allclose(normal.hill, 6, rtol=0.01)
    assert np.isnan(tail(np.zeros(5)).hill)


def stale(running, data):
    return lambda: diagnostics.stats_staleness(running, data)


def gap(train=(8,), labels=(8,), dtype=int, batch_size=4):
    train = np.ones((*train, 3)), np.ones(labels, dtype)
    test = np.ones((8, 3)), np.ones(8, int)
    return lambda: diagnostics.eval_gap(
        identity, {}, 0.0, train, test, batch_size=batch_size
    )


def active(tree, **options):
    return lambda: diagnostics.activation_stats(tree, **options)


ONE = Moments(np.array(3.0), np.ones(2), np.ones(2))
LAYER = {"mean": np.ones(2), "var": np.ones(2)}


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            stale({"a": LAYER}, {"b": ONE}),
            r"precise has \['b'\] where running has \['a'\]",
        ),
        (
            stale({"a": LAYER}, {"a": 3}),
            r"precise\['a'\] has int where running\['a'\] has "
            r"\['mean', 'var'\]",
        ),
        (
            stale({"a": {"mean": 1}}, {"a": ONE}),
            r"precise\['a'\] has Moments where running\['a'\] has \['mean'\]",
        ),
        (
            stale({"mean": np.ones(3), "var": np.ones(3)}, ONE),
            r"precise has Moments of shape \(2,\) where running has a mean of "
            r"shape \(3,\)",
        ),
        (gap(labels=(7,)), r"train must be .* got float64\[8, 3\] and int64"),
        (gap(dtype=float), r"labels \(N,\) integers"),
        (gap(batch_size=3), "must divide the 8 examples of train.*got 3"),
        (active({}), "activations has no arrays"),
        (active({"a": np.ones((2, 2))}, limit=0.0), "positive; got 0.0"),
        (active({"a": np.ones((2, 2))}, order=("b",)), "no 'b'; it has a"),
        (
            active({"a": [np.ones((2, 2))] * 2}, order=("a",)),
            "'a' matches 2 arrays of activations: a/0, a/1",
        ),
        (active({"a": np.ones((2, 2), int)}), "^a: x must be floating"),
        (active({"a": np.ones(2)}), "^a: .*no axis is left"),
        (lambda: diagnostics.gradient_tail([]), "gradient is empty"),
        (
            lambda: diagnostics.gradient_tail(np.ones(3), tail=1),
            "between 0 and 1; got 1",
        ),
    ],
)
def test_errors(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()
