"""State dicts of PyTorch as variables of flax, and back."""

import functools

import chex
import flax.linen as nn
import jax
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
