"""Options of PyTorch, and programs beside torch where it is installed."""

import functools
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn import convert


def batch_norm_of_torch(kind="BatchNorm2d", **changes):
    given = dict(momentum=0.1, eps=1e-3, affine=True, track_running_stats=True)
    return type(kind, (), {**given, **changes})()


def test_options():
    options = dict(momentum=0.9, epsilon=1e-3, use_scale=True, use_bias=True)
    plain = batch_norm_of_torch()
    assert convert.options_from_torch(plain) == options
    want = dict(momentum=0.1, eps=1e-3, affine=True, track_running_stats=True)
    assert convert.options_to_torch(options) == want
    average = batch_norm_of_torch(momentum=None, affine=False)
    got = convert.options_from_torch(average)
    assert got == dict(
        momentum=None, epsilon=1e-3, use_scale=False, use_bias=False
    )
    assert convert.options_to_torch(got)["momentum"] is None
    untracked = batch_norm_of_torch(track_running_stats=False, bias=None)
    got = convert.options_from_torch(untracked)
    assert got["use_running_average"] is False and not got["use_bias"]
    back = convert.options_to_torch(got)
    assert back["bias"] is False and not back["track_running_stats"]
    layer = jaxbn.linen.BatchNorm(
        running=jaxbn.Running(ddof=1), axis_name="data", dtype=jnp.bfloat16
    )
    fields = {name: getattr(layer, name) for name in layer.__dataclass_fields__}
    assert convert.options_to_torch(fields) == dict(
        momentum=0.01, eps=1e-5, affine=True, track_running_stats=True
    )


def test_options_of_a_synchronized_layer():
    sync = batch_norm_of_torch("SyncBatchNorm")
    with pytest.raises(ValueError, match='such as axis_name="data"'):
        convert.options_from_torch(sync)
    got = convert.options_from_torch(sync, axis_name="data")
    assert got["axis_name"] == "data"
    sync.process_group = object()
    with pytest.raises(ValueError, match="process group of its own"):
        convert.options_from_torch(sync, axis_name="data")


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: convert.options_from_torch(types.SimpleNamespace(eps=1)),
            "SimpleNamespace is no batch norm of PyTorch: it has no momentum,",
        ),
        (
            lambda: convert.options_to_torch(dict(eps=1)),
            "BatchNorm has no field eps.",
        ),
        (
            lambda: convert.options_to_torch(
                dict(sharing=jaxbn.Scope(num_ids=2))
            ),
            r"PyTorch has nothing like sharing=Scope\(num_ids=2\)",
        ),
        (
            lambda: convert.options_to_torch(dict(use_scale=False)),
            "PyTorch has no batch norm with bias but no weight.",
        ),
    ],
)
def test_options_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["InstanceNorm2d", "LazyInstanceNorm1d"])
def test_options_of_another_norm(kind):
    with pytest.raises(ValueError, match=f"{kind} takes the statistics of ev"):
        convert.options_from_torch(batch_norm_of_torch(kind))


def test_options_without_affine_and_statistics():
    module = batch_norm_of_torch(affine=False, track_running_stats=False)
    got = convert.options_from_torch(module)
    assert not got["use_scale"] and got["use_running_average"] is False
    back = convert.options_to_torch(got)
    assert not back["affine"] and not back["track_running_stats"]


def load(module, state):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(a) for name, a in state.items()}
    module.load_state_dict(state, strict=True)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "SyncBatchNorm"])
def test_training_goes_as_in_torch(momentum, kind):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    batches = rng.normal(3, 2, (4, 5, 2, 3, 3)).astype(np.float32)
    cotangents = rng.normal(size=batches.shape).astype(np.float32)
    n, steps = 5 * 3 * 3, len(batches)
    module = torch.nn.BatchNorm2d(2, eps=1e-3, momentum=momentum)
    torch.nn.init.normal_(module.weight)
    if kind == "SyncBatchNorm":  # on one process it is the same formula
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    options = convert.options_from_torch(module, axis_name="data")
    unbiased = jaxbn.linen.BatchNorm(**options, running=jaxbn.Running(ddof=1))
    biased = jaxbn.linen.BatchNorm(**options)
    like = jax.eval_shape(
        functools.partial(unbiased.init, use_running_average=False),
        jax.random.key(0),
        jnp.zeros((5, 3, 3, 2)),
    )
    start = convert.from_torch(module.state_dict(), like=like)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    @functools.partial(jax.jit, static_argnums=0)
    def step(layer, variables, x, cotangent):
        def loss(params):
            y, new = layer.apply(
                {**variables, "params": params},
                x,
                use_running_average=False,
                mutable=["batch_stats"],
            )
            return (y * cotangent).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(
            lambda p, g: p - 0.01 * g, variables["params"], grads
        )
        return y, {"params": params, **new}

    ours, other = start, start
    for x, cotangent in zip(batches, cotangents):
        y = module(torch.from_numpy(x))
        optimizer.zero_grad()
        (y * torch.from_numpy(cotangent)).sum().backward()
        optimizer.step()
        x, cotangent = (np.moveaxis(a, 1, -1) for a in (x, cotangent))
        got, ours = step(unbiased, ours, x, cotangent)
        _, other = step(biased, other, x, cotangent)
        want = np.moveaxis(y.detach().numpy(), 1, -1)
        np.testing.assert_allclose(got, want, atol=2e-5)
    state = module.state_dict()
    want = convert.from_torch(state, like=like)
    chex.assert_trees_all_close(ours, want, rtol=2e-5, atol=2e-5)
    back = convert.to_torch(ours, like=state)
    for name, value in state.items():
        if momentum is None or name != "num_batches_tracked":
            np.testing.assert_allclose(back[name], value, rtol=2e-5, atol=2e-5)
    # Biased statistics: the factor, but for what is left of the first 1.
    left = 0 if momentum is None else (1 - momentum) ** steps
    var = np.asarray(other["batch_stats"]["var"], np.float64)
    want = (state["running_var"].numpy() - left) * (n - 1) / n + left
    np.testing.assert_allclose(var, want, rtol=1e-5)
    if momentum is None:
        got = convert.from_torch(state, values_per_batch=n)
        np.testing.assert_allclose(got["batch_stats"]["var"], var, rtol=1e-5)
    load(torch.nn.BatchNorm2d(2), back)


def test_a_net_of_torch_in_flax():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(4, 6, 3, stride=2),
        torch.nn.SyncBatchNorm(6, affine=False),
        torch.nn.GroupNorm(2, 6),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 5),
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(True)(x))
            x = nn.ConvTranspose(6, (3, 3), (2, 2), padding="VALID")(x)
            options = convert.options_from_torch(theirs[4], axis_name="data")
            x = jaxbn.linen.BatchNorm(True, **options)(x)
            x = nn.GroupNorm(2, epsilon=1e-5)(x)
            return nn.Dense(5)(x.mean((1, 2)))

    names = {
        "0": "Conv_0",
        "1": "BatchNorm_0",
        "3": "ConvTranspose_0",
        "4": "BatchNorm_1",
        "5": "GroupNorm_0",
        "8": "Dense_0",
    }
    x = torch.randn(4, 3, 6, 6)
    for _ in range(3):
        theirs(x)
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        want = theirs(x).numpy()
    state, image = theirs.state_dict(), np.moveaxis(x.numpy(), 1, -1)
    like = jax.eval_shape(Net().init, jax.random.key(0), image)
    kinds = {"3": "conv_transpose", "5": "norm"}
    variables = convert.from_torch(state, kinds=kinds, rename=names, like=like)
    y = Net().apply(variables, image)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    back = convert.to_torch(
        variables,
        kinds={names[key]: kind for key, kind in kinds.items()},
        rename={flax: torch for torch, flax in names.items()},
        like=state,
    )
    for name, value in state.items():
        if "num_batches" not in name:
            np.testing.assert_array_equal(back[name], value)
    load(theirs, back)


def test_dtypes_of_torch():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    variables = convert.from_torch(module.state_dict())
    assert variables["params"]["kernel"].dtype == jnp.bfloat16
    back = convert.to_torch(variables)
    assert back["weight"].dtype == np.float32
    want = module.weight.detach().float().numpy()
    np.testing.assert_array_equal(back["weight"], want)
    load(module, back)
    np.testing.assert_array_equal(module.weight.detach().float(), want)


def test_every_batch_norm_of_torch_is_understood():
    torch = pytest.importorskip("torch")
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        module = getattr(torch.nn, name)(3, momentum=0.25, affine=False)
        options = convert.options_from_torch(module)
        assert options["momentum"] == 0.75 and not options["use_scale"]
        again = convert.options_to_torch(options)
        again = getattr(torch.nn, name)(3, **again)
        assert repr(again) == repr(module)
    with pytest.raises(ValueError, match="takes its statistics over all"):
        convert.options_from_torch(torch.nn.SyncBatchNorm(3))
