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

import jaxbn
from jaxbn import Moments, Scope
from tests.helpers import reference
from tests.helpers.contexts import (
    CHANNELS,
    NUM_IDS,
    PARTITIONS,
    N,
    in_shard_map,
    in_vmap,
    on_global_arrays,
    problem,
)

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]


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
        y, batch = jaxbn.batch_norm(x, ids=ids, sharing=Scope(num_ids=2))
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
        y, batch = jaxbn.batch_norm(x, ids=ids, sharing=Scope(num_ids=2))
        assert np.isnan(batch.mean[0]).all() and np.isfinite(y[2:]).all()

    def test_features_before_the_examples(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(3, 8, 5)).astype(np.float32)
        ids = jnp.arange(8) % 2
        scope = Scope(num_ids=2, normalize_over=4)
        got = jaxbn.batch_norm(x, ids=ids, sharing=scope, feature_axis=0)
        want = jaxbn.batch_norm(x.transpose(1, 2, 0), ids=ids, sharing=scope)
        chex.assert_trees_all_close(got[0].transpose(1, 2, 0), want[0])
        chex.assert_trees_all_close(got[1], want[1])


def run_in_vmap(scope, **changes):
    x = jnp.ones((8, 4, 3))
    options = dict(axis_name="data", sharing=scope) | changes
    jax.vmap(
        lambda x: jaxbn.batch_norm(x, **options)[0],
        axis_name="data",
    )(x)


@pytest.mark.parametrize(
    "scope, message",
    [
        (
            dict(normalize_over=3),
            "normalize_over=3 neither divides the 4 examples per device nor "
            "is a multiple that divides 8 devices; the nearest valid value is "
            "2",
        ),
        (dict(normalize_over=64), "the nearest valid value is 32"),
        (dict(normalize_over=12), "the nearest valid value is 8"),
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
            "group_size and normalize_over both choose the devices",
        ),
        (dict(num_ids=0), "num_ids must be at least 1; got 0"),
        (dict(num_ids=2), "ids and sharing.num_ids must be given together"),
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
        jaxbn.batch_norm(jnp.ones((4, 3)), ids=ids, sharing=Scope(num_ids=2))


def test_groups_of_devices_need_devices():
    x = jnp.ones((8, 3))
    with pytest.raises(ValueError, match="Use jax.set_mesh, or normalize_over"):
        jaxbn.batch_norm(x, axis_name="data", sharing=Scope(group_size=2))
    scope = Scope(axis_index_groups=[[0], [1]])
    with pytest.raises(ValueError, match="On global arrays use group_size"):
        jaxbn.batch_norm(x, axis_name="data", sharing=scope)
