"""Microbatches on several devices, and groups of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import Scope, accumulate
from jaxbn.testing._collectives import split_conditional
from tests.helpers.accumulation import (
    BOTH,
    LAYERS,
    assert_close,
    exact_step,
    expected,
    in_rows,
    jaxbn_norm,
    jit,
    loss_of,
    over,
    problem,
)


@pytest.mark.parametrize(
    "sizes, names, check_vma",
    [
        ((4,), ("data",), True),
        ((4,), ("data",), False),
        ((2, 2), ("data", "model"), True),
    ],
)
def test_shard_map(sizes, names, check_vma):
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    axes = (*names, "micro")
    step = exact_step(axis_name=axes, microbatches=2)

    def run(params, stats, batch):
        (value, (stats, _)), grads = step(params, stats, batch)
        # As with jax.grad, types that know what varies sum the gradient.
        return value, stats, grads if check_vma else jax.lax.pmean(grads, names)

    mapped = jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P(), P(names)),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    (value, (stats, _)), grads = expected()
    with jax.enable_x64(True):
        arguments = problem()
        got = mapped(*arguments)
        assert_close(got, (value, stats, grads), 1e-12)
        text = mapped.lower(*arguments).compile().as_text()
    # One each way a layer; count, value and gradients. None in a loop.
    always, seldom = split_conditional(text)
    assert len(re.findall(r" all-reduce\(", always)) <= 2 * LAYERS + 3
    assert len(re.findall(r" all-reduce\(", seldom)) == LAYERS
    assert " while(" in text
    for body in re.split(r"\n(?=%|ENTRY)", always):
        assert body.startswith("ENTRY") or " all-reduce(" not in body


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Auto, marks=pytest.mark.slow),
        AxisType.Explicit,
    ],
)
def test_global_arrays(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        params, stats, batch = problem()
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        got = jit(exact_step())(params, stats, batch)
        assert_close(jax.device_get(in_rows(got)), expected(), 1e-12)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize(
    "sharing", (Scope(num_ids=2), Scope(normalize_over=4)), ids=("ids", "ghost")
)
def test_rows_of_global_arrays(sharing, kind):
    """Statistics of ids and of chunks, which may span devices."""
    x, weights = np.random.default_rng(0).normal(2, 3, (2, 64, 3))
    ids = np.arange(64) % 2 if sharing.num_ids else None

    def loss(scale, batch, axis_name="micro"):
        x, weights, ids = batch
        y, _ = jaxbn.batch_norm(
            jnp.sin(x * scale),
            ids=ids,
            axis_name=axis_name,
            sharing=sharing,
        )
        return (jnp.sin(y) * weights).mean()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    step = accumulate.value_and_grad(loss, axis_name="micro", microbatches=2)
    with jax.enable_x64(True):
        batch, scale = (x, weights, ids), jnp.array([1.0, 2.0, 3.0])
        whole = functools.partial(loss, axis_name=None)
        want = jit(jax.value_and_grad(whole))(scale, batch)
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            got = jax.device_get(jit(step)(scale, batch))
    assert_close(got, want, 1e-12)


def test_mapped_axis_around():
    """vmap in place of devices."""
    step = exact_step(axis_name=BOTH, microbatches=2)
    with jax.enable_x64(True):
        params, stats, batch = problem()
        batch = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), batch)
        mapped = jax.vmap(step, (None, None, 0), axis_name="data")
        got = jax.device_get(jit(mapped)(params, stats, batch))
    (value, (stats, _)), grads = got
    (want_value, (want_stats, _)), want_grads = expected()
    for device in range(4):
        got = jax.tree.map(lambda a, i=device: a[i], (value, stats))
        assert_close(got, (want_value, want_stats), 1e-12)
    # As everywhere under vmap: one gradient a device, of their sum.
    mean = jax.tree.map(lambda a: a.mean(0), grads)
    assert_close(mean, want_grads, 1e-12)


def loss_in_pairs(axis_name):
    scope = jaxbn.Scope(group_size=2)
    norm = functools.partial(jaxbn_norm, axis_name, sharing=scope)
    return loss_of(norm, total=over(axis_name))


@functools.cache
def expected_in_pairs(devices):
    """With a device for each of 8 microbatches, as those lie on devices."""

    def step(params, stats, batch):
        parts = jax.tree.map(
            lambda a: (
                a.reshape(devices, -1, 8 // devices, *a.shape[1:])
                .swapaxes(1, 2)
                .reshape(8, -1, *a.shape[1:])
            ),
            batch,
        )
        mapped = jax.vmap(
            jax.value_and_grad(loss_in_pairs("all"), has_aux=True),
            (None, None, 0),
            axis_name="all",
        )
        (value, (new, _)), grads = mapped(params, stats, parts)
        return jax.tree.map(lambda a: a.mean(0), (value, new, grads))

    with jax.enable_x64(True):
        return jax.device_get(jit(step)(*problem()))


@pytest.mark.parametrize(
    "check_vma",
    [
        pytest.param(None, marks=pytest.mark.slow),
        True,
        pytest.param(False, marks=pytest.mark.slow),
    ],
)
def test_groups_of_microbatches(check_vma):
    devices = 1 if check_vma is None else 4

    def run(params, stats, batch):
        step = accumulate.value_and_grad(
            loss_in_pairs("micro" if check_vma is None else BOTH),
            microbatches=8 // devices,
            has_aux=True,
        )
        (value, (new, _)), grads = step(params, stats, batch)
        if check_vma is False:
            grads = jax.lax.pmean(grads, "data")
        return value, new, grads

    if check_vma is not None:
        run = jax.shard_map(
            run,
            mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    with jax.enable_x64(True):
        got = jit(run)(*problem())
        assert_close(got, expected_in_pairs(devices), 1e-12)


def loss_in_runs(axis_name, length):
    scope = jaxbn.Scope(normalize_over=length)
    norm = functools.partial(jaxbn_norm, axis_name, sharing=scope)
    return loss_of(norm, total=over(axis_name) if axis_name else lambda x: x)


@functools.cache
def expected_in_runs(length):
    """Runs of neighbours in the whole batch share statistics."""
    step = jax.value_and_grad(loss_in_runs(None, length), has_aux=True)
    with jax.enable_x64(True):
        return jax.device_get(jit(step)(*problem()))


@pytest.mark.slow
@pytest.mark.parametrize("length", (2, 16))
def test_runs_of_neighbours(length):
    """Of fewer, and of more examples than there are microbatches."""
    step = accumulate.value_and_grad(
        loss_in_runs("micro", length), microbatches=4, has_aux=True
    )
    with jax.enable_x64(True):
        got = jit(step)(*problem())
        assert_close(in_rows(got), expected_in_runs(length), 1e-10)


@pytest.mark.parametrize("length, names", [(2, BOTH), (16, BOTH[::-1])])
def test_runs_of_neighbours_on_devices(length, names):
    """A run on a part of a device, and on two of them."""
    step = accumulate.value_and_grad(
        loss_in_runs(names, length), microbatches=2, has_aux=True
    )

    def run(params, stats, batch):
        (value, (new, _)), grads = step(params, stats, batch)
        return value, new, grads

    mapped = jax.shard_map(
        run,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    (value, (new, _)), grads = expected_in_runs(length)
    with jax.enable_x64(True):
        got = jit(mapped)(*problem())
        assert_close(got, (value, new, grads), 1e-10)


def test_runs_that_do_not_fit():
    step = accumulate.value_and_grad(
        loss_in_runs("micro", 6), microbatches=4, has_aux=True
    )
    params, stats, batch = problem()
    batch = jax.tree.map(lambda a: a[:24], batch)
    message = (
        "normalize_over=6 is invalid for 4 microbatches of 6 examples on each "
        "of 1 devices: it must divide the 24 examples per device, and be a "
        "multiple or divisor of 4; or be a multiple of 24 that divides the "
        "devices. The nearest valid value is 4."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        step(params, stats, batch)
