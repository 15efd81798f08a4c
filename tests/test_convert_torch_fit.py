"""What of a PyTorch model does not fit, and is left out or refused."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import convert


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {
        name.replace("__", "."): rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


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
        (
            {"kernel": np.zeros(2)},
            None,
            "collection 'kernel' is neither params",
        ),
        (
            {
                "batch_stats": {
                    "n": {"mean": np.zeros((2, 3)), "var": np.ones(3)}
                }
            },
            None,
            r"n: 'mean' of a batch_norm has 1 axes; got \[2, 3\]",
        ),
        (
            {
                "batch_stats": {
                    "n": dict.fromkeys(("mean", "var", "skipped"), np.zeros(3))
                }
            },
            None,
            "n: 'skipped' has no counterpart in a batch_norm",
        ),
        (
            {"params": {"n": {"kernel": np.zeros((3, 2))}}},
            {"n.weight": np.zeros((3, 2)), "n.bias": np.zeros(2)},
            r"(?s)shape: n.weight is \[2, 3\].*missing: n.bias",
        ),
        ({"params": {"n": {"w": np.zeros(3)}}}, None, "may be several kinds"),
        (
            {"params": {"n": {"scale": nn.Partitioned(np.zeros(3), ())}}},
            None,
            "'params/n/scale' must be an array; got Partitioned",
        ),
    ],
)
def test_what_pytorch_cannot_hold(variables, like, message):
    with pytest.raises(ValueError, match=message):
        convert.to_torch(variables, like=like)


def test_a_checkpoint_is_no_state_dict():
    with pytest.raises(ValueError, match="'model' must be an array; got dict"):
        convert.from_torch({"model": {}, "epoch": 3})


def small():
    """A state dict in float16, and the variables of a model with a new head."""
    state = arrays(a__weight=(2, 3), a__bias=(2,), fc__weight=(5, 2))
    state = {name: a.astype(np.float16) for name, a in state.items()}
    like = {
        "params": {
            "a": {
                "kernel": np.zeros((3, 2), np.float32),
                "bias": np.zeros(2, np.float32),
            },
            "head": {"kernel": np.full((2, 7), 0.5, np.float32)},
        }
    }
    return state, like


def test_dtypes_are_those_of_like():
    state, like = small()
    del state["fc.weight"], like["params"]["head"]
    want = state["a.weight"].T
    free = convert.from_torch(state)["params"]["a"]["kernel"]
    assert free.dtype == np.float16
    for of in (like, jax.tree.map(jax.typeof, jax.tree.map(jnp.asarray, like))):
        got = convert.from_torch(state, like=of)["params"]["a"]["kernel"]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
    back = convert.to_torch(like, like=state)
    assert {a.dtype for a in back.values()} == {np.dtype(np.float16)}
    like["params"]["a"]["bias"] = np.zeros(2, np.int32)
    message = "dtype: params/a/bias is float16, and in like int32"
    with pytest.raises(ValueError, match=message):
        convert.from_torch(state, like=like)


@pytest.mark.parametrize(
    "given",
    [
        dict(skip=["fc", "head"]),
        dict(skip="fc", rename={"fc": "head"}),
        dict(skip=["fc.weight", "head/kernel"]),
    ],
)
def test_another_head(given):
    state, like = small()
    got = convert.from_torch(state, like=like, **given)["params"]
    np.testing.assert_array_equal(got["a"]["bias"], state["a.bias"])
    np.testing.assert_array_equal(
        got["head"]["kernel"], like["params"]["head"]["kernel"]
    )
    assert got.keys() == {"a", "head"}
    got["head"]["kernel"][:] = 9  # a copy
    assert (like["params"]["head"]["kernel"] == 0.5).all()


def test_a_report_of_what_was_left_out():
    state, like = small()
    got, left_out = convert.from_torch(state, like=like, strict=False)
    assert left_out == [
        "missing: params/head/kernel [2, 7]",
        "unexpected: params/fc/kernel [2, 5]",
    ]
    assert got["params"].keys() == {"a", "head"}
    rename = {"fc": "head"}
    got, left_out = convert.from_torch(
        state, like=like, rename=rename, strict=False
    )
    assert left_out == [
        "shape: params/head/kernel is [2, 5], and in like [2, 7]"
    ]
    assert (got["params"]["head"]["kernel"] == 0.5).all()
    state["odd.weight"] = np.zeros(3)
    got, left_out = convert.from_torch(state, strict=False)
    assert "odd" in left_out[0] and got["params"].keys() == {"a", "fc"}
    back = {"head": "fc"}
    got, left_out = convert.to_torch(
        like, rename=back, like=state, strict=False
    )
    assert left_out == [
        "shape: fc.weight is [7, 2], and in like [5, 2]",
        "missing: odd.weight [3]",
    ]
    np.testing.assert_array_equal(got["fc.weight"], state["fc.weight"])
    got = convert.to_torch(like, skip=["head", "fc", "odd"], like=state)
    assert (got["a.weight"] == 0).all() and got["fc.weight"].any()


def test_what_skip_and_strict_cannot_do():
    state, like = small()
    shapes = jax.tree.map(jnp.asarray, like)
    shapes = jax.eval_shape(lambda: shapes)
    message = "params/head/kernel is left out, and like has nothing but its"
    with pytest.raises(ValueError, match=message):
        convert.from_torch(state, like=shapes, strict=False)
    with pytest.raises(ValueError, match="skip: nothing is 'heads' or below"):
        convert.from_torch(state, skip=["heads"], like=like)
    with pytest.raises(ValueError, match="rename: no module is 'heads'"):
        convert.from_torch(state, rename={"heads": "b"}, strict=False)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["n_averaged"],
            r"AveragedModel; give skip=\['n_averaged'\], and "
            r"rename={'module': ''}",
        ),
        (
            ["c.parametrizations.weight.original0", "c.bias"],
            "c: parametrized; .*remove_parametrizations writes the weight",
        ),
        (["c.weight_orig", "c.weight_mask"], "c: pruned; .*prune.remove"),
        (["c.weight_orig", "c.weight_u"], "c: under spectral norm; .*remove_s"),
        (["c.weight_g", "c.weight_v"], "c: under weight norm; .*remove_weight"),
    ],
)
def test_what_computes_a_weight_in_pytorch(names, message):
    state = dict.fromkeys(names, np.ones((2, 3)))
    state["module.fc.weight"] = np.ones((2, 3))
    with pytest.raises(ValueError, match=message) as caught:
        convert.from_torch(state)
    assert "may be several kinds" not in str(caught.value)


def test_an_averaged_model():
    state = {"n_averaged": np.array(3), "module.fc.weight": np.ones((2, 3))}
    got = convert.from_torch(state, skip=["n_averaged"], rename={"module": ""})
    assert got["params"]["fc"]["kernel"].shape == (3, 2)


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_without_running_statistics(affine):
    layer = nn.BatchNorm(False, use_bias=affine, use_scale=affine)
    like = {"bn": layer.init(jax.random.key(0), np.ones((2, 4)))}
    like = {collection: {"bn": tree} for collection, tree in like["bn"].items()}
    kinds = {"bn": "batch_norm_untracked"}
    state = arrays(bn__weight=(4,), bn__bias=(4,)) if affine else {}
    got = convert.from_torch(state, kinds=kinds, like=like)
    stats = got["batch_stats"]["bn"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(4))
    np.testing.assert_array_equal(stats["var"], np.ones(4))
    assert affine == ("bn" in got["params"])
    back = convert.to_torch(got, kinds=kinds, like=state)
    chex.assert_trees_all_equal(back, state)
    for change in (
        lambda: convert.to_torch(like, like=state),
        lambda: convert.from_torch(state | {"bn.x": np.ones(4)}, like=like),
    ):
        with pytest.raises(ValueError, match="{'bn': 'batch_norm_untracked'}"):
            change()
    if not affine:
        with pytest.raises(ValueError, match="how many channels it has"):
            convert.from_torch({}, kinds=kinds)


def test_without_a_counter():
    state = arrays(bn__running_mean=(3,), bn__running_var=(3,))
    variables = convert.from_torch(state)
    chex.assert_trees_all_equal(convert.to_torch(variables, like=state), state)
    assert "bn.num_batches_tracked" in convert.to_torch(variables)
