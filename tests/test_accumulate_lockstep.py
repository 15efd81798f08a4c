"""Code over microbatches that advance together, and what it may not do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import accumulate
from tests.helpers.accumulation import (
    assert_close,
    jit,
)

pytestmark = pytest.mark.sample(2)


def rows_and_shared(axis_name, x, y, key):
    """Every collective, with and without derivative."""
    index = jax.lax.axis_index(axis_name)
    noise = jax.random.normal(jax.random.fold_in(key, index), x.shape)
    x = x + noise

    def inner(x):
        every = jax.lax.all_gather(x, axis_name)
        tiled = jax.lax.all_gather(x * y, axis_name, axis=1, tiled=True)
        piece = jax.lax.psum_scatter(
            jnp.sin(every), axis_name, scatter_dimension=0
        )
        mean = jax.lax.pmean(jnp.square(x), axis_name)
        return (tiled.mean() * piece * jnp.cos(mean)).sum(), (every, mean)

    (value, (every, mean)), grad = jax.value_and_grad(inner, has_aux=True)(x)
    most = jax.lax.pmax(x.max(), axis_name)
    least = jax.lax.pmin(x.min(0), axis_name)
    return {
        "row": (value, grad, index, key),
        "shared": (every, mean, most, least, y * 2, jnp.arange(3)),
    }


def test_lockstep_is_vmap():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    arguments = x, np.arange(4.0, dtype=np.float32), jax.random.key(1)
    axes = (1, None, None), {"row": (0, 1, 0, 0), "shared": None}
    fn = functools.partial(rows_and_shared, "micro")
    want = jit(jax.vmap(fn, *axes, axis_name="micro"))(*arguments)
    got = jit(accumulate.lockstep(fn, *axes, axis_name="micro"))(*arguments)
    *got_row, got_key = got["row"]
    *want_row, want_key = want["row"]
    assert_close((got_row, got["shared"]), (want_row, want["shared"]), 1e-5)
    assert (jax.random.key_data(got_key) == jax.random.key_data(want_key)).all()


def test_broadcast_and_negative_axes():
    fn = accumulate.lockstep(
        lambda tree, x: (tree["a"].sum(), x + jax.lax.psum(tree["b"], "i")),
        [{"a": -1, "b": 0}, None],
        axis_name="i",
    )
    a, b, x = jnp.ones((2, 3)), jnp.arange(3), jnp.zeros(4)
    sums, shared = fn({"a": a, "b": b}, x)
    np.testing.assert_array_equal(sums, [2, 2, 2])
    np.testing.assert_array_equal(shared, np.full((3, 4), 3))


def test_effects_happen_once_a_microbatch(capsys):
    def loss(w, x):
        jax.debug.print("microbatch {i}", i=jax.lax.axis_index("micro"))
        return jax.lax.pmean((w * x).sum(), "micro")

    step = accumulate.value_and_grad(loss, microbatches=3)
    jax.block_until_ready(jit(step)(1.0, jnp.ones(6)))
    jax.effects_barrier()
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == ["microbatch 0", "microbatch 1", "microbatch 2"]


def psum_loss(w, x):
    return jax.lax.psum((w * x).sum(), "micro")


def in_a_loop(w, x):
    def body(state):
        i, total = state
        with jax.named_scope("norm"):
            return i + 1, jax.lax.psum(total, "micro")

    with jax.named_scope("Net"):
        return w * jax.lax.while_loop(lambda s: s[0] < 2, body, (0, x.sum()))[1]


def permuted(w, x):
    return jax.lax.ppermute((w * x).sum(), "micro", [(0, 1), (1, 0)])


def step(loss=psum_loss, **options):
    return accumulate.value_and_grad(loss, **dict(microbatches=2) | options)


MISTAKES = {
    "not a divisor": (
        lambda: step(microbatches=5)(1.0, jnp.ones(12)),
        "microbatches=5 does not divide the 12 examples of the batch; 4 and 6 "
        "would.",
    ),
    "too many": (
        lambda: step(microbatches=16)(1.0, jnp.ones(12)),
        "microbatches=16 does not divide the 12 examples of the batch; 12 "
        "would.",
    ),
    "a fraction": (
        lambda: step(microbatches=2.0)(1.0, jnp.ones(12)),
        "microbatches must be an integer; got 2.0.",
    ),
    "aux without has_aux": (
        lambda: step(lambda w, x: (psum_loss(w, x), x))(1.0, jnp.ones(4)),
        "loss returned a tuple of 2 in place of one value. With has_aux=True",
    ),
    "none": (
        lambda: step(microbatches=0)(1.0, jnp.ones(12)),
        "microbatches=0 does not divide the 12 examples of the batch; 1 would.",
    ),
    "no axis": (
        lambda: step()(1.0, (jnp.ones(4), jnp.ones(()))),
        "with the examples on axis 0; got float32[4], float32[].",
    ),
    "lists": (
        lambda: step()(1.0, {"x": [0.5, True]}),
        "must be an array with the examples on axis 0; got float, bool.",
    ),
    "uneven leaves": (
        lambda: step()(1.0, (jnp.ones(4), jnp.ones(6))),
        "The leaves of the batch differ in length on axis 0; got float32[4], "
        "float32[6].",
    ),
    "gradient of the batch": (
        lambda: step(argnums=1)(1.0, jnp.ones(4)),
        "argnums=1 must count from 0 and name arguments before the last of 2",
    ),
    "nothing synchronizes": (
        lambda: step(lambda w, x: (w * x).mean())(1.0, jnp.ones(4)),
        "loss does nothing over axis_name='micro', so no layer normalizes with "
        "the statistics of all microbatches. Give the layers axis_name='micro'",
    ),
    "bound": (
        lambda: jax.vmap(step(), (None, 0), axis_name="micro")(
            1.0, jnp.ones((3, 4))
        ),
        "axis_name='micro' is bound here already, to an axis of length 3.",
    ),
    "permutation": (
        lambda: step(permuted)(1.0, jnp.ones(4)),
        "ppermute over 'micro' does not run in lockstep; psum, pmean, pmax, "
        "pmin, all_gather, psum_scatter and axis_index do.",
    ),
    "in a loop": (
        lambda: step(in_a_loop)(1.0, jnp.ones(4)),
        "psum over 'micro', of layer 'Net/norm', stands inside while, which "
        "cannot be cut there.",
    ),
    "in_axes": (
        lambda: accumulate.lockstep(jnp.add, (0,), axis_name="i")(1, 2),
        "in_axes=(0,) does not fit",
    ),
    "lengths": (
        lambda: accumulate.lockstep(jnp.add, axis_name="i")(
            jnp.ones(2), jnp.ones(3)
        ),
        "in_axes=0 must name axes of one length; got [2, 3] of float32[2], "
        "float32[3].",
    ),
    "out_axes": (
        lambda: accumulate.lockstep(jnp.sin, 0, None, axis_name="i")(
            jnp.ones((2, 3))
        ),
        "out_axes is None for a result that rows do not share, float32[3] of "
        "each.",
    ),
    "moments of a stranger": (
        lambda: accumulate.update_batch_stats(
            {"a": {}}, {"b": jaxbn.Moments(1, 0, 0)}, decay=0.9
        ),
        "moments has ['b'] where batch_stats has ['a'].",
    ),
    "moments of another shape": (
        lambda: accumulate.update_batch_stats(
            {"a": jaxbn.init_running(2)},
            {"a": {"moments": jaxbn.moments(jnp.ones((4, 3)))}},
            decay=0.9,
        ),
        "moments['a'] has Moments of shape (3,) where batch_stats['a'] has a "
        "mean of shape (2,).",
    ),
    "moments of a container": (
        lambda: accumulate.update_batch_stats(
            {"a": {"b": {}}}, {"a": jaxbn.Moments(1, 0, 0)}, decay=0.9
        ),
        "moments['a'] has Moments where batch_stats['a'] has ['b'].",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    run, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        run()


def test_closed_over_under_check_vma():
    def run(w, x):
        scale = 2 * w
        loss = lambda w, x: psum_loss(w * scale, x)  # noqa: E731
        return step(loss)(w, x)[1]

    mapped = jax.shard_map(
        run,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    try:
        got = jit(mapped)(1.0, jnp.ones(8))
    except ValueError as error:
        assert "pass them as arguments" in str(error)
    else:  # jax 0.12 can
        assert got == 16
