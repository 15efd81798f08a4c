"""State dicts and options of PyTorch, with torch where it is installed."""

import functools
import re
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxbn.linen
from jaxbn import convert


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {
        name.replace("__", "."): rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def apply(model, variables, x):
    return np.asarray(model.apply({"params": variables["params"]}, x))


@pytest.mark.parametrize("window", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(window, groups):
    state = arrays(weight=(4, 6 // groups, *window), bias=(4,))
    x = arrays(x=(2, *(n + 2 for n in window), 6))["x"]
    want = np.zeros((2, *[3] * len(window), 4))
    per_in, per_out = 6 // groups, 4 // groups
    for o in range(4):
        first = o // per_out * per_in
        for at in np.ndindex(*[3] * len(window)):
            part = tuple(slice(i, i + n) for i, n in zip(at, window))
            patch = np.moveaxis(x[:, *part, first : first + per_in], -1, 1)
            want[:, *at, o] = (patch * state["weight"][o].astype(float)).sum(
                tuple(range(1, patch.ndim))
            ) + state["bias"][o]
    model = nn.Conv(4, window, padding="VALID", feature_group_count=groups)
    variables = convert.from_torch(state)
    np.testing.assert_allclose(apply(model, variables, x), want, atol=1e-5)
    chex.assert_trees_all_equal(convert.to_torch(variables), state)


@pytest.mark.parametrize("window", [(3,), (3, 2)])
@pytest.mark.parametrize("kind", ["conv_transpose", "conv_transpose_kernel"])
def test_transposed_convolution(window, kind):
    state = arrays(up__weight=(6, 4, *window), up__bias=(4,))
    weight, n = state["up.weight"].astype(float), len(window)
    x = arrays(x=(2, *[4] * n, 6))["x"]
    want = np.zeros((2, *[2 * 3 + k for k in window], 4)) + state["up.bias"]
    for at in np.ndindex(*[4] * n):  # every value, spread over its window
        part = tuple(slice(2 * i, 2 * i + k) for i, k in zip(at, window))
        spread = np.tensordot(x[:, *at].astype(float), weight, 1)
        want[:, *part] += np.moveaxis(spread, 1, -1)
    model = nn.ConvTranspose(
        4,
        window,
        strides=(2,) * n,
        padding="VALID",
        transpose_kernel=kind == "conv_transpose_kernel",
    )
    kinds = {"up": kind}
    variables = convert.from_torch(state, kinds=kinds)
    up = {"params": variables["params"]["up"]}
    np.testing.assert_allclose(apply(model, up, x), want, atol=1e-5)
    back = convert.to_torch(variables, kinds=kinds)
    chex.assert_trees_all_equal(back, state)


def test_every_other_kind():
    state = arrays(
        fc__weight=(2, 3),
        fc__bias=(2,),
        words__weight=(5, 3),
        ln__weight=(3,),
        ln__bias=(3,),
        bn__weight=(3,),
        bn__bias=(3,),
        bn__running_mean=(3,),
        bn__running_var=(3,),
        plain__running_mean=(3,),
        plain__running_var=(3,),
        free__weight=(3,),
        free__bias=(3,),
        token=(1, 3),
    )
    counters = ("bn.num_batches_tracked", "plain.num_batches_tracked")
    counters = dict.fromkeys(counters, np.array(7))
    kinds = {
        "words": "embedding",
        "ln": "norm",
        "free": "batch_norm_untracked",
        "": "same",
    }
    got = convert.from_torch({**state, **counters}, kinds=kinds)
    want = {
        "params": {
            "fc": {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]},
            "words": {"embedding": state["words.weight"]},
            "ln": {"scale": state["ln.weight"], "bias": state["ln.bias"]},
            "bn": {"scale": state["bn.weight"], "bias": state["bn.bias"]},
            "free": {"scale": state["free.weight"], "bias": state["free.bias"]},
            "token": state["token"],
        },
        "batch_stats": {
            "bn": {
                "mean": state["bn.running_mean"],
                "var": state["bn.running_var"],
            },
            "plain": {
                "mean": state["plain.running_mean"],
                "var": state["plain.running_var"],
            },
            "free": {"mean": np.zeros(3), "var": np.ones(3)},
        },
    }
    chex.assert_trees_all_equal(got, want)
    del kinds["words"], kinds["ln"]  # in flax their names tell
    back = convert.to_torch(got, kinds=kinds)
    zeros = dict.fromkeys(counters, np.array(0))
    chex.assert_trees_all_equal(back, {**state, **zeros})
    assert back["bn.num_batches_tracked"].dtype == np.int64
    for a in back.values():
        assert a.flags.writeable and a.flags.c_contiguous


def test_linear_behind_a_flattened_image():
    # The recipe of the page on conversion, and its word on padding.
    arr = arrays(w=(5, 24), x=(2, 4, 2, 3))
    w, x = arr["w"], arr["x"]
    last = w.reshape(5, 4, 2, 3).transpose(0, 2, 3, 1).reshape(5, -1)
    kernel = convert.from_torch({"weight": last})["params"]["kernel"]
    got = np.moveaxis(x, 1, -1).reshape(2, -1) @ kernel
    np.testing.assert_allclose(got, x.reshape(2, -1) @ w.T, rtol=1e-4)
    image = np.zeros((1, 4, 4, 1), np.float32)
    one, same = (
        nn.Conv(1, (3, 3), 2, padding=padding).init_with_output(
            jax.random.key(0), image + np.arange(4)[:, None]
        )[0]
        for padding in (1, "SAME")
    )
    assert one.shape == same.shape and not np.allclose(one, same)


def test_results_are_copies():
    state = arrays(weight=(3,), running_mean=(3,), running_var=(3,))
    variables = convert.from_torch(state)
    before = jax.tree.map(np.copy, variables)
    again = convert.to_torch(variables)
    for a in state.values():
        a[:] = 9
    chex.assert_trees_all_equal(variables, before)
    again["running_mean"][:] = 9
    chex.assert_trees_all_equal(variables, before)


def test_renaming():
    state = arrays(
        module__layer1__0__conv__weight=(2, 3, 1),
        module__layer1__1__conv__weight=(2, 3, 1),
        module__head__weight=(2, 3),
    )
    rename = {"module": "", "module.layer1": "Stage_0", "module.head": "out"}
    got = convert.from_torch(state, rename=rename)["params"]
    flat = flatten_dict(got, sep="/")
    names = ["Stage_0/0/conv/kernel", "Stage_0/1/conv/kernel", "out/kernel"]
    assert list(flat) == names
    back = {"Stage_0": "module.layer1", "out": "module.head"}
    back = convert.to_torch({"params": got}, rename=back)
    chex.assert_trees_all_equal(back, state)
    got = convert.from_torch(state, rename=lambda p: p.replace(".", "_"))
    assert "module_layer1_0_conv" in got["params"]
    with pytest.raises(ValueError, match="kernel comes from several modules"):
        convert.from_torch(state, rename=lambda path: "same")
    with pytest.raises(ValueError, match="rename: no module is 'heads'"):
        convert.from_torch(state, rename={"heads": "out"})


def test_values_per_batch():
    state = arrays(a__running_mean=(3,), a__running_var=(3,))
    state |= arrays(b__c__running_mean=(3,), b__c__running_var=(3,))
    var = state["a.running_var"]

    def stats(values):
        got = convert.from_torch(state, values_per_batch=values)
        back = convert.to_torch(got, values_per_batch=values)
        for name in state:
            np.testing.assert_allclose(back[name], state[name], rtol=1e-6)
        stats = got["batch_stats"]
        return stats["a"]["var"], stats["b"]["c"]["var"]

    for got in stats(None):
        np.testing.assert_array_equal(got, var)
    for got in stats(10):
        np.testing.assert_allclose(got, var * 0.9, rtol=1e-6)
    np.testing.assert_allclose(
        stats({"": 10, "b": 4}), [var * 0.9, var * 0.75], rtol=1e-6
    )
    with pytest.raises(ValueError, match="values_per_batch has nothing for a"):
        stats({"b": 4})
    with pytest.raises(ValueError, match="must be at least 2; got 1 for b.c"):
        stats({"": 2, "b": 1})


def test_all_that_does_not_fit_is_listed():
    state = arrays(
        a__weight=(3,),
        b__weight=(2, 3),
        c__weight=(2, 3, 1),
        d__weight=(3,),
        d__in_proj=(3,),
        e__weight=(3,),
    )
    like = {
        "params": {
            "b": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)},
            "x": {"bias": np.zeros(2)},
        }
    }
    kinds = {"c": "linear", "d": "norm", "e": "batch_norm", "z": "conv"}
    kinds["b"] = "dense"
    with pytest.raises(ValueError) as caught:
        convert.from_torch(state, kinds=kinds, like=like)
    for line in (
        "Nothing was converted:",
        "kinds: there is no module 'z'",
        "kinds: 'dense' is none of batch_norm,",
        "a: {'weight': [3]} may be several kinds; give kinds={'a': ...}",
        "c: 'weight' of a linear has 2 axes; got [2, 3, 1]",
        "d: 'in_proj' is no part of a norm",
        "e: it has no running statistics; take batch_norm_untracked",
        "missing: params/x/bias [2]",
        "unexpected: params/d/scale [3]",
        "Where only names differ, say which is which in rename.",
    ):
        assert line in str(caught.value), line
    del kinds["b"], kinds["z"]
    with pytest.raises(
        ValueError,
        match=re.escape("shape: params/b/kernel is [3, 2], and in like [3, 4]"),
    ):
        convert.from_torch(state, kinds=kinds, like=like)


@pytest.mark.parametrize(
    "variables, like, message",
    [
        ({"kernel": np.zeros(2)}, None, "collection 'kernel' is neither params"),
        (
            {"batch_stats": {"n": {"mean": np.zeros((2, 3)), "var": np.ones(3)}}},
            None,
            r"n: 'mean' of a batch_norm has 1 axes; got \[2, 3\]",
        ),
        (
            {"batch_stats": {"n": dict.fromkeys(("mean", "var", "skipped"), np.zeros(3))}},
            None,
            "n: 'skipped' has no counterpart in a batch_norm",
        ),
        (
            {"params": {"n": {"kernel": np.zeros((3, 2))}}},
            {"n.weight": np.zeros((3, 2)), "n.bias": np.zeros(2)},
            r"(?s)shape: n.weight is \[2, 3\].*missing: n.bias",
        ),
        ({"params": {"n": {"w": np.zeros(3)}}}, None, "may be several kinds"),
        ({"params": {"n": {"scale": nn.Partitioned(np.zeros(3), ())}}}, None, "'params/n/scale' must be an array; got Partitioned"),
    ],
)  # fmt: skip
def test_what_pytorch_cannot_hold(variables, like, message):
    with pytest.raises(ValueError, match=message):
        convert.to_torch(variables, like=like)


def test_a_checkpoint_is_no_state_dict():
    with pytest.raises(ValueError, match="'model' must be an array; got dict"):
        convert.from_torch({"model": {}, "epoch": 3})


def test_the_number_of_batches():
    model = jaxbn.linen.BatchNorm(momentum=None)
    x = np.ones((4, 3), np.float32)
    init = functools.partial(model.init, use_running_average=False)
    like = jax.eval_shape(init, jax.random.key(0), x)
    state = arrays(weight=(3,), bias=(3,), running_mean=(3,), running_var=(3,))
    state["num_batches_tracked"] = np.array(7)
    got = convert.from_torch(state, like=like)
    np.testing.assert_array_equal(got["batch_stats"]["steps"], [7, 7, 7])
    assert got["batch_stats"]["steps"].dtype == np.int32
    chex.assert_trees_all_equal(convert.to_torch(got, like=state), state)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Conv(3, 4, (1, 1), rngs=rngs)])
            self.bn = nnx.BatchNorm(4, rngs=rngs)

    state = arrays(
        layers__0__weight=(4, 3, 1, 1),
        layers__0__bias=(4,),
        bn__weight=(4,),
        bn__bias=(4,),
        bn__running_mean=(4,),
        bn__running_var=(4,),
    )
    model = Net()

    def variables():
        return {
            "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
        }

    got = convert.from_torch(state, like=variables())
    flat = flatten_dict(got["params"]) | flatten_dict(got["batch_stats"])
    into = nnx.state(model)
    nnx.replace_by_pure_dict(into, unflatten_dict(flat))
    nnx.update(model, into)
    np.testing.assert_array_equal(model.bn.mean[...], state["bn.running_mean"])
    state["bn.num_batches_tracked"] = np.array(0)
    chex.assert_trees_all_equal(convert.to_torch(variables()), state)


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
    layer = jaxbn.linen.BatchNorm(ddof=1, axis_name="data", dtype=jnp.bfloat16)
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
            lambda: convert.options_to_torch(dict(num_ids=2)),
            "PyTorch has nothing like num_ids=2.",
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
    unbiased = jaxbn.linen.BatchNorm(**options, ddof=1)
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
