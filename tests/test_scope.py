"""Groups of devices, ghost batches and ids, in every combination."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Moments, Scope
from tests import reference

DEVICES, LOCAL, CHANNELS = 8, 4, 3
N = DEVICES * LOCAL
NUM_IDS = 3

# What shares statistics, as a label of each of the 32 examples in a row.
PARTITIONS = {
    "everything": (Scope(), np.zeros(N, int)),
    "group_size=2": (Scope(group_size=2), np.arange(N) // 8),
    "group_size=8": (Scope(group_size=8), np.zeros(N, int)),
    "axis_index_groups": (
        Scope(axis_index_groups=[[0, 7], [1, 6], [2, 5], [3, 4]]),
        np.minimum(np.arange(N) // 4, 7 - np.arange(N) // 4),
    ),
    "normalize_over=2": (Scope(normalize_over=2), np.arange(N) // 2),
    "normalize_over=4": (Scope(normalize_over=4), np.arange(N) // 4),
    "normalize_over=16": (Scope(normalize_over=16), np.arange(N) // 16),
}


def problem(masked, with_ids):
    rng = np.random.default_rng(0)
    # Where nothing is masked, so far from 0 that every sum is taken again.
    mean = 5 if masked else 100
    x = rng.normal(mean, 2, (N, 2, CHANNELS)).astype(np.float32)
    keep = np.ones((N, 2, 1), bool)
    if masked:
        keep = rng.random((N, 2, 1)) < 0.7
        keep[8:12] = False  # a device that has nothing
        x = np.where(keep | (np.arange(N) % 2 == 0)[:, None, None], x, np.nan)
    scale, bias = rng.normal(1, 0.5, (2, NUM_IDS, CHANNELS)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    ids = rng.integers(0, NUM_IDS, N).astype(np.int32)
    if not with_ids:
        scale, bias, ids = scale[0], bias[0], None
    return x, scale, bias, keep, cotangent, ids


def step(scope, x, scale, bias, keep, cotangent, ids, norm=jaxbn.batch_norm):
    def loss(x, scale, bias):
        y, batch = norm(
            x, scale, bias, ids=ids, where=keep, axis_name="data", scope=scope
        )
        return (y * cotangent).sum(), (y, batch)

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return out, grads


def assert_matches_float64(got, arguments, labels):
    x, scale, bias, keep, cotangent, ids = arguments
    (y, batch), (dx, dscale, dbias) = got
    want_y, want_dx = np.zeros((2, *x.shape))
    rows = np.zeros(N, int) if ids is None else ids
    affine = np.zeros((2, NUM_IDS, CHANNELS))
    for row in range(NUM_IDS):
        for label in np.unique(labels):
            members = (labels == label) & (rows == row)
            want = reference.batch_norm(
                x[members],
                scale if ids is None else scale[row],
                bias if ids is None else bias[row],
                keep[members],
                cotangent[members],
            )
            want_y[members], want_dx[members] = want.y, want.dx
            affine[:, row] += want.dscale, want.dbias
    statistics = [
        reference.batch_norm(
            x[rows == row], 1.0, 0.0, keep[rows == row], x[rows == row]
        )
        for row in range(NUM_IDS)
    ]
    mean = np.array([one.mean for one in statistics])
    var = np.array([one.var for one in statistics])
    count = np.array([one.count[:1] for one in statistics])
    if ids is None:
        mean, var, count, affine = mean[0], var[0], count[0, 0], affine[:, 0]
    np.testing.assert_array_equal(batch.count, count)
    names = ("y", "mean", "var", "dx", "dscale", "dbias")
    pairs = zip(
        [y, batch.mean, batch.var, dx, dscale, dbias],
        [want_y, mean, var, want_dx, *affine],
    )
    for name, (a, b) in zip(names, pairs):
        # The standard deviation of two values can be small: 1e-4, not 1e-5.
        np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=name
        )


def in_shard_map(scope, arguments, *, check_vma=True, step=step):
    with_ids = arguments[-1] is not None
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def run(*arguments):
        out, (dx, *affine) = step(scope, *arguments)
        if not check_vma:
            affine = jax.lax.psum(affine, "data")
        return out, (dx, *affine)

    parts, whole = P("data"), P()
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(
                *(parts, whole, whole, parts, parts),
                parts if with_ids else None,
            ),
            out_specs=((parts, whole), (parts, whole, whole)),
            check_vma=check_vma,
        )
    )(*arguments)


def in_vmap(scope, arguments, *, step=step):
    def split(a):
        return a if a is None else a.reshape(DEVICES, LOCAL, *a.shape[1:])

    x, scale, bias, *rest = arguments
    run = jax.vmap(
        functools.partial(step, scope),
        (0, None, None, 0, 0, None if arguments[-1] is None else 0),
        ((0, None), (0, 0, 0)),
        axis_name="data",
    )
    (y, batch), (dx, dscale, dbias) = jax.jit(run)(
        split(x), scale, bias, *map(split, rest)
    )
    y, dx = y.reshape(x.shape), dx.reshape(x.shape)
    return (y, batch), (dx, dscale.sum(0), dbias.sum(0))


def on_global_arrays(scope, arguments, *, kind=AxisType.Auto, step=step):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        x, scale, bias, *rest = arguments
        x, *rest = jax.device_put((x, *rest), sharding)
        return jax.jit(functools.partial(step, scope))(x, scale, bias, *rest)


class ScopeTest(parameterized.TestCase):
    @parameterized.product(name=list(PARTITIONS), with_ids=(False, True))
    def test_shard_map(self, name, with_ids):
        scope, labels = PARTITIONS[name]
        if with_ids:
            scope = jaxbn.Scope(**{**vars(scope), "num_ids": NUM_IDS})
        arguments = problem(True, with_ids)
        got = in_shard_map(scope, arguments)
        assert_matches_float64(got, arguments, labels)

    @parameterized.product(
        name=("everything", "group_size=2", "normalize_over=2"),
        run=(
            functools.partial(in_shard_map, check_vma=False),
            in_vmap,
            on_global_arrays,
            functools.partial(on_global_arrays, kind=AxisType.Explicit),
        ),
    )
    def test_other_contexts(self, name, run):
        scope, labels = PARTITIONS[name]
        scope = jaxbn.Scope(**{**vars(scope), "num_ids": NUM_IDS})
        arguments = problem(True, True)
        assert_matches_float64(run(scope, arguments), arguments, labels)

    @parameterized.parameters("axis_index_groups", "normalize_over=16")
    def test_groups_under_vmap(self, name):
        scope, labels = PARTITIONS[name]
        arguments = problem(False, False)
        assert_matches_float64(in_vmap(scope, arguments), arguments, labels)

    def test_unknown_id_is_nan_and_enters_nothing(self):
        x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        ids = jnp.array([0, 1, 2, -1])
        y, batch = jaxbn.batch_norm(x, ids=ids, scope=Scope(num_ids=2))
        assert np.isnan(y[2:]).all() and np.isfinite(y[:2]).all()
        chex.assert_trees_all_close(
            batch,
            Moments(np.ones((2, 1)), x[:2], np.zeros((2, 3))),
            rtol=1e-6,
        )
        y = jaxbn.normalize(x, batch.mean, batch.var, ids=ids)
        assert np.isnan(y[2:]).all() and np.isfinite(y[:2]).all()

    def test_nan_of_one_id_stays_there(self):
        x = jnp.ones((6, 2)).at[0].set(jnp.nan)
        ids = jnp.array([0, 0, 1, 1, 1, 1])
        y, batch = jaxbn.batch_norm(x, ids=ids, scope=Scope(num_ids=2))
        assert np.isnan(batch.mean[0]).all() and np.isfinite(y[2:]).all()

    def test_features_before_the_examples(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(3, 8, 5)).astype(np.float32)
        ids = jnp.arange(8) % 2
        scope = Scope(num_ids=2, normalize_over=4)
        got = jaxbn.batch_norm(x, ids=ids, scope=scope, feature_axis=0)
        want = jaxbn.batch_norm(x.transpose(1, 2, 0), ids=ids, scope=scope)
        chex.assert_trees_all_close(got[0].transpose(1, 2, 0), want[0])
        chex.assert_trees_all_close(got[1], want[1])


def run_in_vmap(scope, **changes):
    x = jnp.ones((8, 4, 3))
    options = dict(axis_name="data", scope=scope) | changes
    jax.vmap(
        lambda x: jaxbn.batch_norm(x, **options)[0],
        axis_name="data",
    )(x)


@pytest.mark.parametrize(
    "scope, message",
    [
        (
            dict(normalize_over=3),
            "normalize_over=3 neither divides the 4 examples of a device nor "
            "is a multiple that divides 8 devices; the nearest that works is 2",
        ),
        (dict(normalize_over=64), "the nearest that works is 32"),
        (dict(normalize_over=12), "the nearest that works is 8"),
        (
            dict(group_size=3),
            "group_size=3 does not divide the 8 devices along axis_name='data'",
        ),
        (
            dict(axis_index_groups=[[0, 1], [2, 3, 4, 5, 6, 7]]),
            "must hold each of the 8 indices along axis_name='data' once",
        ),
        (
            dict(group_size=2, normalize_over=8),
            "group_size and normalize_over each say which devices share",
        ),
        (dict(num_ids=0), "num_ids must be at least 1; got 0"),
        (dict(num_ids=2), "ids and scope.num_ids go together"),
    ],
)
def test_scopes_that_cannot_be(scope, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_in_vmap(Scope(**scope))


@pytest.mark.parametrize(
    "ids", [np.zeros(3, int), np.zeros(4), np.zeros((4, 1), int)]
)
def test_ids_that_do_not_fit(ids):
    with pytest.raises(ValueError, match="ids must be integers of shape"):
        jaxbn.batch_norm(jnp.ones((4, 3)), ids=ids, scope=Scope(num_ids=2))


def test_groups_of_devices_need_devices():
    x = jnp.ones((8, 3))
    with pytest.raises(ValueError, match="Use jax.set_mesh, or normalize_over"):
        jaxbn.batch_norm(x, axis_name="data", scope=Scope(group_size=2))
    scope = Scope(axis_index_groups=[[0], [1]])
    with pytest.raises(ValueError, match="On global arrays use group_size"):
        jaxbn.batch_norm(x, axis_name="data", scope=scope)
