"""Examples to other devices and back: order, bits, traffic, derivatives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._shuffle import shuffle, unshuffle
from jaxbn.testing import collectives
from tests.helpers import reference

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]

DEVICES = 8
there = functools.partial(shuffle, axis_name="data")
home = functools.partial(unshuffle, axis_name="data")


def mesh_of(sizes=(8,), names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def on_devices(fn, *, check_vma=True, axes="data", mesh=None):
    """fn(key, *trees) over devices; trees are split, the key is not."""

    def run(key, *trees):
        return jax.shard_map(
            fn,
            mesh=mesh or mesh_of(),
            in_specs=(P(), *[P(axes)] * len(trees)),
            out_specs=P(axes),
            check_vma=check_vma,
        )(key, *trees)

    return jax.jit(run)


def batch(n):
    """Every kind of leaf, for n examples in all."""
    rng = np.random.default_rng(0)
    half = jnp.asarray(rng.normal(size=(n, 3)), jnp.bfloat16)
    return {
        "image": rng.normal(size=(n, 2, 3)).astype(np.float32),
        "half": half.at[0, 0].set(jnp.nan),
        "mask": rng.random((n, 5)) < 0.5,
        "byte": np.arange(n, dtype=np.int8),
        "nibble": jnp.arange(n).astype(jnp.int4),
        "index": np.arange(n, dtype=np.int32),
        "complex": rng.normal(size=(n, 2, 2)).view(np.complex128)[..., 0],
        "key": jax.random.split(jax.random.key(0), n),
        "nothing": np.zeros((n, 0), np.float32),
        "none": None,
    }


def as_bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    leaf = np.asarray(leaf)
    if leaf.dtype == jnp.int4:
        leaf = leaf.astype(np.int8)
    return np.ascontiguousarray(leaf).reshape(len(leaf), -1).view(np.uint8)


def assert_same_bits(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(as_bits(a), as_bits(b))


@functools.cache
def in_order():
    return on_devices(lambda k, x: there(x, k))


def order_of(n, key):
    """Where the examples at each place of 8 devices come from."""
    return np.asarray(in_order()(key, np.arange(n, dtype=np.int32)))


@pytest.mark.parametrize("local, check_vma", [(16, False), (5, True)])
def test_every_bit_of_every_leaf_there_and_back(local, check_vma):
    tree = jax.tree.map(jnp.asarray, batch(DEVICES * local))
    key = jax.random.key(3)

    def both(key, tree):
        moved = there(tree, key)
        return moved, home(moved, key)

    moved, back = on_devices(both, check_vma=check_vma)(key, tree)
    order = np.asarray(moved["index"])
    np.testing.assert_array_equal(np.sort(order), tree["index"])
    assert (order // local != np.arange(order.size) // local).any()
    assert_same_bits(moved, jax.tree.map(lambda a: a[order], tree))
    assert_same_bits(back, tree)


def split(n):
    return np.arange(n).reshape(DEVICES, -1)


@jax.jit
def in_vmap(tree, key):
    return jax.vmap(there, (0, None), axis_name="data")(tree, key)


def nested(tree, key):
    move = functools.partial(shuffle, axis_name=("a", "b"))
    move = jax.vmap(move, (0, None), axis_name="b")
    return jax.jit(jax.vmap(move, (0, None), axis_name="a"))(tree, key)


CONTEXTS = {
    "check_vma=False": lambda n, key: on_devices(
        lambda k, x: there(x, k), check_vma=False
    )(key, np.arange(n)),
    "two axes": lambda n, key: on_devices(
        lambda k, x: shuffle(x, k, axis_name=("a", "b")),
        axes=("a", "b"),
        mesh=mesh_of((4, 2), ("a", "b")),
    )(key, np.arange(n)),
    "pmap": lambda n, key: jax.pmap(there, "data", in_axes=(0, None))(
        split(n), key
    ),
    "vmap": lambda n, key: in_vmap(split(n), key),
    "vmap, two axes": lambda n, key: nested(split(n).reshape(4, 2, -1), key),
    "vmap in shard_map": lambda n, key: on_devices(
        lambda k, x: jax.vmap(there, (1, None), 1)(x, k)
    )(key, np.stack([np.arange(n)] * 2, 1))[:, 1],
    "old key": lambda n, key: order_of(n, jax.random.key_data(key)),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_key_and_sizes_alone_decide(context, n=24):
    key = jax.random.key(1)
    got = CONTEXTS[context](n, key)
    np.testing.assert_array_equal(np.ravel(got), order_of(n, key))


@pytest.mark.parametrize("local", (16, 12, 5))
def test_every_device_sends_as_many_to_each(local):
    order = order_of(DEVICES * local, jax.random.key(2))
    sent = np.zeros((DEVICES, DEVICES), int)
    np.add.at(sent, (order // local, np.arange(order.size) // local), 1)
    assert sent.min() >= local // DEVICES
    assert sent.max() <= -(-local // DEVICES)
    # And in an order of its own.
    origin = (order // local).reshape(DEVICES, local)
    assert (origin != origin[0]).any(1)[1:].all()


@pytest.mark.parametrize("local", (4, 6, 3))
def test_every_place_is_equally_likely(local, devices=4, draws=4000):
    n = devices * local
    keys = jax.random.split(jax.random.key(0), draws)
    one = jax.vmap(there, (0, None), axis_name="data")
    x = np.arange(n).reshape(devices, local)
    order = jax.jit(jax.vmap(one, (None, 0)))(x, keys).reshape(draws, n)
    counts = np.zeros((n, n))
    np.add.at(counts, (order, np.arange(n)), 1)
    least = scipy.stats.chisquare(counts, axis=1).pvalue.min()
    assert least > 1e-3 / n, least

    place = np.argsort(order, 1) // local
    together = (place[:, :, None] == place[:, None, :]).mean(0)
    home = np.arange(n) // local
    apart = together[home[:, None] != home]
    deviation = np.sqrt((1 / devices) * (1 - 1 / devices) / draws)
    if local % devices == 0:
        assert np.abs(apart - 1 / devices).max() < 4.5 * deviation
        same = home[:, None] == home
        np.fill_diagonal(same, False)
        want = (local / devices - 1) / (local - 1)
        assert np.abs(together[same] - want).max() < 4.5 * deviation


def test_another_key_is_another_order():
    first, second = (order_of(64, jax.random.key(i)) for i in range(2))
    assert (first != second).mean() > 0.9


@pytest.mark.parametrize("local", (16, 5))
def test_one_exchange_of_the_examples_alone(local):
    tree = batch(DEVICES * local)
    words = 6 + 2 + 2 + 1 + 1 + 1 + 2 * 2 + 2  # rounded up, leaf by leaf
    rows = DEVICES * -(-local // DEVICES)
    for move in (there, home):
        run = on_devices(lambda k, x, move=move: move(x, k))
        got = collectives(run, jax.random.key(0), tree)
        assert got == {"all-to-all": (1, rows * words * 4)}


FLOATS = ("image", "half", "complex")


def test_gradients_take_one_exchange_each_way():
    tree = batch(128)
    rest = {k: v for k, v in tree.items() if k not in FLOATS}

    def grad(key, floats, rest, cotangent):
        def move(floats):
            moved = there(floats | rest, key)
            return {name: moved[name] for name in FLOATS}

        return jax.vjp(move, floats)[1](cotangent)

    floats = {name: jnp.asarray(tree[name]) for name in FLOATS}
    arguments = jax.random.key(0), floats, rest, floats
    got = collectives(on_devices(grad), *arguments)
    # The forward pass has no reader here, and is removed.
    assert got == {"all-to-all": (1, 16 * (6 + 3 + 4) * 4)}


@pytest.mark.parametrize("local, check_vma", [(16, False), (5, True)])
def test_derivatives_move_bit_for_bit(local, check_vma):
    tree = batch(DEVICES * local)
    tree["half"] = tree["half"].at[0, 0].set(1)
    floats = {name: jnp.asarray(tree[name]) for name in FLOATS}
    rest = {k: v for k, v in tree.items() if k not in FLOATS}
    twice = jax.tree.map(lambda a: a * 2, floats)

    def derivatives(key, floats, rest, direction):
        def move(floats):
            moved = there(floats | rest, key)
            return {name: moved[name] for name in FLOATS}

        moved, tangent = jax.jvp(move, (floats,), (direction,))
        (cotangent,) = jax.vjp(move, floats)[1](moved)
        (again,) = jax.linear_transpose(
            lambda t: jax.jvp(move, (floats,), (t,))[1], floats
        )(moved)
        return tangent, cotangent, again

    run = on_devices(derivatives, check_vma=check_vma)
    key = jax.random.key(4)
    tangent, cotangent, again = run(key, floats, rest, twice)
    order = order_of(DEVICES * local, key)
    assert_same_bits(tangent, jax.tree.map(lambda a: a[order], twice))
    assert_same_bits(cotangent, floats)
    assert_same_bits(again, floats)


def test_second_derivatives_of_leaves_of_two_dtypes():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, dx, weight = rng.normal(size=(3, 24, 2))
        z = dz = rng.normal(size=(24, 3)).astype(np.float32)
        key = jax.random.key(0)

        def turn(key, x, z, dx, dz, weight):
            def loss(x, z):
                x, z = there((x, z), key)
                return (jnp.sin(x) * weight).sum() + jnp.square(z).sum() / 2

            grad = jax.grad(loss, (0, 1))
            return jax.jvp(grad, (x, z), (dx, dz))

        (gx, gz), (hx, hz) = on_devices(turn)(key, x, z, dx, dz, weight)
        weight = weight[np.argsort(order_of(24, key))]
    np.testing.assert_allclose(gx, np.cos(x) * weight, rtol=1e-12)
    np.testing.assert_allclose(hx, -np.sin(x) * weight * dx, rtol=1e-12)
    np.testing.assert_array_equal(gz, z)
    np.testing.assert_array_equal(hz, dz)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_global_arrays(kind):
    tree = jax.tree.map(jnp.asarray, batch(64))
    mesh, key = mesh_of(kind=kind), jax.random.key(0)
    with jax.set_mesh(mesh):
        tree = jax.device_put(tree, NamedSharding(mesh, P("data")))
        moved = jax.jit(there)(tree, key)
        back = jax.jit(home)(moved, key)
        if kind == AxisType.Explicit:
            assert jax.typeof(moved["image"]) == jax.typeof(tree["image"])
    order = np.asarray(moved["index"])
    assert sorted(order) == list(range(64)) and (order != np.arange(64)).any()
    assert_same_bits(moved["image"], np.asarray(tree["image"])[order])
    assert_same_bits(back, tree)


def test_without_axis_examples_stay_on_their_device():
    run = on_devices(lambda k, x: shuffle(x, k, axis_name=None))
    x = np.arange(64)
    order = np.asarray(run(jax.random.key(0), x))
    np.testing.assert_array_equal(order // 8, x // 8)
    assert (order != x).any()
    assert collectives(run, jax.random.key(0), x) == {}


def test_a_tree_without_examples_is_left_alone():
    assert shuffle({}, jax.random.key(0), axis_name="data") == {}
    empty = np.zeros((8, 0, 3))
    assert in_vmap(empty, jax.random.key(0)).shape == empty.shape


def test_statistics_are_those_of_the_examples_that_met():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (64, 4)).astype(np.float32)
    key = jax.random.key(5)

    def encode(key, x):
        y, _ = jaxbn.batch_norm(there(x, key))
        return home(y, key)

    got = on_devices(encode)(key, x)
    want = np.empty(x.shape)
    for met in order_of(64, key).reshape(DEVICES, -1):
        keep = np.ones((8, 1), bool)
        want[met] = reference.batch_norm(x[met], 1.0, 0.0, keep, x[met]).y
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("call", (shuffle, unshuffle))
@pytest.mark.parametrize(
    "tree, key, message",
    [
        (
            {"x": np.ones(4), "temperature": np.float32(0.1)},
            jax.random.key(0),
            "a leaf is the scalar float32[]",
        ),
        (
            {"x": np.ones((4, 2), np.float32), "y": np.ones(3, bool)},
            jax.random.key(0),
            "the same number of examples along their first axis; got "
            "bool[3], float32[4, 2]",
        ),
        (np.ones(4), 0, "of jax.random.key or jax.random.PRNGKey; got int32[]"),
        (np.ones(4), np.ones(2), "PRNGKey; got float32[2]"),
        (np.ones(4), np.ones(3, np.uint32), "PRNGKey; got uint32[3]"),
        (
            np.ones(4),
            jax.random.split(jax.random.key(0), 3),
            "key must be a single key; got key<fry>[3]",
        ),
    ],
)
def test_what_cannot_be_shuffled(call, tree, key, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tree, key, axis_name="data")


def test_a_key_for_each_device_is_refused():
    def run(key, x):
        return there(x, jax.random.fold_in(key, jax.lax.axis_index("data")))

    message = "key varies over the mesh axes ['data']"
    with pytest.raises(ValueError, match=re.escape(message)):
        on_devices(run)(jax.random.key(0), np.arange(64))


def test_an_axis_that_is_not_bound_is_refused():
    run = on_devices(lambda k, x: shuffle(x, k, axis_name="batch"))
    with pytest.raises(ValueError, match="'batch' is not bound here"):
        run(jax.random.key(0), np.arange(64))


def test_the_same_key_is_no_reuse():
    def both(key, x):
        return home(there(x, key), key)

    def thrice(key, x):
        return there(both(key, x), key)

    x = np.arange(64)
    with jax.debug_key_reuse(True):
        back = on_devices(both)(jax.random.key(0), x)
        np.testing.assert_array_equal(back, x)
        with pytest.raises(jax.errors.KeyReuseError):
            on_devices(thrice)(jax.random.key(0), x)
