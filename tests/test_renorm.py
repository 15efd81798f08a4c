"""Batch renormalization against float64, under every scope and context."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType
from jax.test_util import check_grads

import jaxbn
from jaxbn import RunningStats, Scope
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
    step,
)

pytestmark = [pytest.mark.optimized, pytest.mark.sample(3)]

R_MAX, D_MAX = 1.5, 0.4
EPSILON = 1e-5


def running(with_ids):
    """Such that some r and d lie inside the limits and some beyond."""
    rng = np.random.default_rng(1)
    mean = rng.normal(5, 1, (NUM_IDS, CHANNELS)).astype(np.float32)
    var = rng.uniform(1, 12, (NUM_IDS, CHANNELS)).astype(np.float32)
    return RunningStats(*((mean, var) if with_ids else (mean[0], var[0])))


def renormed(with_ids):
    norm = functools.partial(
        jaxbn.batch_renorm, running=running(with_ids), r_max=R_MAX, d_max=D_MAX
    )
    return functools.partial(step, norm=norm)


def float64_renorm(arguments, labels):
    """y, dx, dscale, dbias by way of plain batch norm with r and d applied."""
    x, scale, bias, keep, cotangent, ids = arguments
    old = running(ids is not None)
    rows = np.zeros(N, int) if ids is None else ids
    y, dx = np.zeros((2, *x.shape))
    dscale, dbias = np.zeros((2, NUM_IDS, CHANNELS))
    limited = []
    for row in range(NUM_IDS):
        g, b, mean, var = (
            np.asarray(a if ids is None else a[row], np.float64)
            for a in (scale, bias, old.mean, old.var)
        )
        for label in np.unique(labels):
            members = (labels == label) & (rows == row)
            part = x[members], keep[members], cotangent[members]
            batch = reference.batch_norm(part[0], g, b, *part[1:])
            sigma = np.sqrt(var + EPSILON)
            ratio = np.sqrt(batch.var + EPSILON) / sigma
            r = np.clip(ratio, 1 / R_MAX, R_MAX)
            shift = (batch.mean - mean) / sigma
            d = np.clip(shift, -D_MAX, D_MAX)
            limited += [r != ratio, d != shift]
            want = reference.batch_norm(part[0], r * g, d * g + b, *part[1:])
            y[members], dx[members] = want.y, want.dx
            # y = xhat (r g) + (d g + b)
            dscale[row] += r * want.dscale + d * want.dbias
            dbias[row] += want.dbias
    assert 0 < np.mean(limited) < 1  # some inside the limits, some beyond
    if ids is None:
        dscale, dbias = dscale[0], dbias[0]
    return y, dx, dscale, dbias


def assert_matches(got, arguments, labels):
    (y, batch), grads = got
    plain = jaxbn.moments(
        arguments[0].reshape(-1, CHANNELS),
        where=np.broadcast_to(arguments[3], arguments[0].shape).reshape(
            -1, CHANNELS
        ),
    )
    if arguments[-1] is None:
        np.testing.assert_allclose(batch.mean, plain.mean, rtol=1e-5)
        np.testing.assert_allclose(batch.var, plain.var, rtol=1e-5)
    for a, b in zip((y, *grads), float64_renorm(arguments, labels)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


class RenormTest(parameterized.TestCase):
    @parameterized.product(name=list(PARTITIONS), with_ids=(False, True))
    def test_shard_map(self, name, with_ids):
        scope, labels = PARTITIONS[name]
        if with_ids:
            scope = Scope(**{**vars(scope), "num_ids": NUM_IDS})
        arguments = problem(True, with_ids)
        got = in_shard_map(scope, arguments, step=renormed(with_ids))
        assert_matches(got, arguments, labels)

    @parameterized.parameters(
        functools.partial(in_shard_map, check_vma=False),
        in_vmap,
        on_global_arrays,
        functools.partial(on_global_arrays, kind=AxisType.Explicit),
    )
    def test_other_contexts(self, run):
        scope, labels = PARTITIONS["group_size=2"]
        scope = Scope(**{**vars(scope), "num_ids": NUM_IDS})
        arguments = problem(True, True)
        got = run(scope, arguments, step=renormed(True))
        assert_matches(got, arguments, labels)

    def test_without_limits_it_is_batch_norm_to_the_last_bit(self):
        x, scale, bias, keep, cotangent, _ = problem(True, False)

        def run(norm):
            def loss(x, scale, bias):
                y, _ = norm(x, scale, bias, where=keep)
                return (y * cotangent).sum(), y

            grad = jax.grad(loss, (0, 1, 2), has_aux=True)
            return jax.jit(grad)(x, scale, bias)

        limits = dict(running=running(False), r_max=1, d_max=0)
        got = run(functools.partial(jaxbn.batch_renorm, **limits))
        jax.tree.map(np.testing.assert_array_equal, got, run(jaxbn.batch_norm))

    def test_inside_the_limits_it_is_inference(self):
        x, scale, bias, *_ = problem(False, False)
        old = running(False)
        y, _ = jaxbn.batch_renorm(
            x, scale, bias, running=old, r_max=100.0, d_max=100.0
        )
        want = jaxbn.normalize(x, old.mean, old.var, scale, bias)
        np.testing.assert_allclose(y, want, atol=1e-5)

    @parameterized.parameters((False, False), (True, True), (True, False))
    def test_derivatives(self, has_scale, has_bias):
        """r and d are constants, so a finite difference has to hold them."""
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            x, direction = rng.normal(1, 2, (2, 6, 2, 3))
            scale = jnp.asarray(rng.normal(1, 1, 3)) if has_scale else None
            bias = jnp.asarray(rng.normal(1, 1, 3)) if has_bias else None
            old = RunningStats(jnp.full(3, 0.8), jnp.full(3, 3.0))
            _, batch = jaxbn.batch_norm(x)
            sigma = jnp.sqrt(old.var + EPSILON)
            r = jnp.sqrt(batch.var + EPSILON) / sigma
            d = (batch.mean - old.mean) / sigma

            def norm(x, scale, bias):
                y, _ = jaxbn.batch_renorm(
                    x, scale, bias, running=old, r_max=50.0, d_max=50.0
                )
                return jnp.sin(y)

            def by_hand(x, scale, bias):
                gain = 1 if scale is None else scale
                y, _ = jaxbn.batch_norm(
                    x, r * gain, d * gain + (0 if bias is None else bias)
                )
                return jnp.sin(y)

            def second_order(norm):
                def loss(x):
                    return (jnp.cos(norm(x, scale, bias)) * direction).sum()

                return jax.jit(
                    lambda x: jax.jvp(jax.grad(loss), (x,), (direction,))
                )(x)

            np.testing.assert_allclose(
                norm(x, scale, bias), by_hand(x, scale, bias), rtol=1e-12
            )
            got, want = second_order(norm), second_order(by_hand)
            for a, b in zip(got, want):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
            if has_scale and has_bias:
                of_affine = jax.jit(functools.partial(norm, x))
                check_grads(of_affine, (scale, bias), 2, rtol=1e-6)

    def test_complex_correction_is_shortened(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(8, 2)) + 1j * rng.normal(size=(8, 2)) + 3 + 4j
        x = x.astype(np.complex64)
        old = RunningStats(jnp.zeros(2, jnp.complex64), jnp.ones(2))
        y, _ = jaxbn.batch_renorm(x, running=old, r_max=1.0, d_max=0.5)
        np.testing.assert_allclose(np.abs(y.mean(0)), 0.5, rtol=1e-4)
        direction = np.angle(x.mean(0))
        np.testing.assert_allclose(np.angle(y.mean(0)), direction, rtol=1e-4)


@pytest.mark.parametrize(
    "step, want",
    [
        (0, (1, 0)),
        (5_000, (1, 0)),
        (15_000, (1 + 2 * 10 / 35, 2.5)),
        (25_000, (1 + 2 * 20 / 35, 5)),
        (40_000, (3, 5)),
        (10**6, (3, 5)),
    ],
)
def test_limits_are_those_of_the_paper(step, want):
    np.testing.assert_allclose(jaxbn.renorm_limits(step), want, rtol=1e-6)
    traced = jax.jit(jaxbn.renorm_limits)(step)
    np.testing.assert_allclose(traced, want, rtol=1e-6)


def test_limits_may_open_in_one_step():
    got = jaxbn.renorm_limits(6, start=5, r_end=6, d_end=7)
    np.testing.assert_allclose(got, (3, 2.5), rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(r_max=0.5), "r_max must be a number and at least 1; got 0.5"),
        (dict(d_max=-1.0), "d_max must be a number and at least 0; got -1.0"),
        (dict(d_max=np.ones(3)), "d_max must be a number and at least 0"),
        (
            dict(running=RunningStats(np.zeros(4), np.ones(4))),
            "running.mean must have shape (3,)",
        ),
        (
            dict(running=RunningStats(np.zeros(3), np.ones(4))),
            "running.var must have shape (3,)",
        ),
    ],
)
def test_what_does_not_fit(changes, message):
    options = dict(running=running(False)) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxbn.batch_renorm(jnp.ones((4, 3)), **options)
