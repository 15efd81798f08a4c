"""The time of synchronization, from a program and figures of a link."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.testing import LINKS, collectives, group_costs, sync_cost

C = 6
WAIT, RATE = 1e-5, 1e9
LINK = {"latency": WAIT, "bandwidth": RATE}


def over(function, out_specs, devices=8):
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto)
    return jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=out_specs
    )


def norm(axis_name="data", **scope):
    def forward(x):
        y, _ = jaxbn.batch_norm(
            x, axis_name=axis_name, sharing=jaxbn.Scope(**scope)
        )
        return y

    return forward


def backward(axis_name="data", **scope):
    """The derivative of a layer, and the all-reduce of a gradient."""

    def step(x):
        def loss(x, weight):
            y = norm(axis_name, **scope)(x * weight)
            return jnp.sin(y).sum()

        weight = jax.lax.pcast(jnp.ones(C), "data", to="varying")
        dx, dweight = jax.grad(loss, (0, 1))(x, weight)
        return dx, jax.lax.psum(jnp.outer(dweight, dweight), "data")

    return over(step, (P("data"), P()))


X = jax.ShapeDtypeStruct((32, C), jnp.float32)


def test_an_all_reduce_by_hand():
    cost = sync_cost(over(norm(), P("data")), X, **LINK)
    sent = 2 * 7 / 8 * 4 * 2 * C
    assert (cost.devices, cost.forward.count) == (8, 1)
    assert cost.backward == cost.rest == (0, 0.0, 0.0)
    np.testing.assert_allclose(cost.forward.sent, sent)
    np.testing.assert_allclose(cost.seconds, WAIT + sent / RATE)


def test_other_collectives_by_hand():
    def gather(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)
        return jax.lax.psum_scatter(whole * 2, "data", tiled=True)

    x = jax.ShapeDtypeStruct((64, C), jnp.float32)
    cost = sync_cost(over(gather, P("data")), x, **LINK)
    sent = 2 * 7 / 8 * 4 * 64 * C  # each of them moves 7/8 of the whole
    assert cost.forward.count == 2
    np.testing.assert_allclose(cost.forward.sent, sent)
    # Of 16 devices with as many rows each, the whole is twice as large: what
    # is gathered grows, and what is scattered was whole before.
    more = sync_cost(over(gather, P("data")), x, devices=16, **LINK)
    sent = 15 / 16 * 4 * 128 * C + 15 / 16 * 4 * 64 * C
    np.testing.assert_allclose(more.forward.sent, sent)


def test_parts_of_a_step():
    whole = sync_cost(
        backward(),
        X,
        unsynchronized=backward(None),
        compute=1e-3,
        **LINK,
    )
    assert whole.rest.count == 1
    np.testing.assert_allclose(whole.rest.sent, 2 * 7 / 8 * 4 * C * C)
    ring = 2 * 7 / 8 * 4
    np.testing.assert_allclose(whole.forward.sent, ring * 2 * C)
    np.testing.assert_allclose(whole.backward.sent, ring * 2 * C)
    share = whole.seconds / (1e-3 + whole.seconds + whole.rest.seconds)
    np.testing.assert_allclose(whole.share, share)
    assert f"synchronization is {share:.1%} of a step" in str(whole)
    assert sync_cost(backward(), X, **LINK).share is None


def test_more_devices_and_figures_that_depend_on_them():
    program = over(norm(), P("data"))
    cost = sync_cost(
        program,
        X,
        devices=256,
        latency=lambda n: 1e-6 * n,
        bandwidth=lambda n: LINKS["tpu_v5e"] / n,
    )
    sent = 2 * 255 / 256 * 4 * 2 * C
    np.testing.assert_allclose(cost.forward.sent, sent)
    np.testing.assert_allclose(
        cost.seconds, 256e-6 + sent / (LINKS["tpu_v5e"] / 256)
    )


def test_groups():
    def make(k):
        scope = {} if k == 8 else {"group_size": k}
        return over(norm(**scope), P("data"))

    costs = group_costs(
        make, X, sizes=(2, 8), latency=lambda n: 1e-6 * n, bandwidth=1e12
    )
    assert [*costs] == [2, 8]
    assert costs[8].forward.count == 1
    assert 0 < costs[2].seconds < costs[8].seconds


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latency": -1.0}, "latency must be seconds"),
        ({"latency": float("nan")}, "got nan and 1000000000.0 for 8 devices"),
        ({"bandwidth": 0.0}, "bandwidth positive bytes a second"),
        ({"compute": 0.0}, "compute must be positive seconds; got 0.0"),
        ({"devices": 0}, "devices=0, and the program is compiled for 8"),
    ],
)
def test_figures_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        sync_cost(over(norm(), P("data")), X, **{**LINK, **options})


def test_programs_that_do_not_fit():
    with pytest.raises(ValueError, match="Compile it for at least two"):
        sync_cost(norm(None), X, devices=8, **LINK)
    with pytest.raises(ValueError, match="more than fn. It must be the same"):
        sync_cost(
            over(norm(None), P("data")),
            X,
            unsynchronized=over(norm(), P("data")),
            **LINK,
        )
    groups = over(norm(group_size=4), P("data"))
    with pytest.raises(ValueError, match="joins 4 devices, and devices=2"):
        sync_cost(groups, X, devices=2, **LINK)


# Every kind of collective, and groups as XLA writes them

PARTS = P("data")


@functools.cache
def mesh(shape=(8,), names=("data",)):
    kind = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=kind)


def gather(x):
    return jax.lax.all_gather(x, "data", tiled=True)


def scatter(x):
    return jax.lax.psum_scatter(x, "data", tiled=True)


def turn(x):
    return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])


def exchange(x):
    return jax.lax.all_to_all(x, "data", 0, 0, tiled=True)


ROWS = jax.ShapeDtypeStruct((64, 4), jnp.float32)  # 128 bytes on each device
KINDS = {  # bytes that a device sends over n, of 128 that it puts in
    "all-reduce": (
        lambda x: jax.lax.psum(x, "data"),
        lambda n: 2 * (n - 1) / n * 128,
    ),
    "all-gather": (gather, lambda n: (n - 1) * 128),
    "reduce-scatter": (scatter, lambda n: (n - 1) / n * 128),
    "all-to-all": (exchange, lambda n: (n - 1) / n * 128),
    "collective-permute": (turn, lambda n: 128),
}


@pytest.mark.parametrize("kind", KINDS)
def test_formula_and_its_growth_with_devices(kind):
    fn, sent = KINDS[kind]
    out_specs = P() if kind == "all-reduce" else PARTS
    run = jax.jit(over(fn, out_specs))
    assert list(collectives(run, ROWS)) == [kind]
    for devices in (None, 2, 64):
        got = sync_cost(run, ROWS, devices=devices, **LINK)
        n = devices or 8
        assert got.devices == n and got.forward.count == 1
        assert got.forward.sent == pytest.approx(sent(n))
        want = WAIT + sent(n) / RATE
        assert got.seconds == pytest.approx(want)
        assert got.backward == got.rest == (0, 0, 0)
    alone = sync_cost(run, ROWS, devices=1, **LINK)
    assert alone.forward == (0, 0, 0)


def test_published_links():
    assert LINKS == {
        "nvlink3": 600e9 / 2,
        "nvlink4": 900e9 / 2,
        "tpu_v5e": 400e9 / 2,
        "tpu_v5p": 1200e9 / 2,
    }


def test_groups_in_every_form_that_xla_writes_them():
    pairs = mesh((4, 2), ("outer", "data"))

    def fn(x):
        return jax.lax.psum(x, "data")

    run = jax.jit(
        jax.shard_map(
            fn, mesh=pairs, in_specs=P(("outer", "data")), out_specs=P("outer")
        )
    )
    got = sync_cost(run, ROWS, devices=64, **LINK)
    assert got.forward.sent == 2 * (1 / 2) * 128  # of two, on any devices

    class Program:
        def __init__(self, groups):
            self.groups = groups

        def lower(self):
            return self

        compile = lower

        def as_text(self):
            return (
                "HloModule m, num_partitions=8\nENTRY %main () -> f32[32] {\n"
                "  %a = f32[32]{0} all-reduce(%b), channel_id=1, "
                f"replica_groups={self.groups}, to_apply=%add\n}}\n"
            )

    for groups, n in (
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", 2),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("{}", 8),
    ):
        sent = sync_cost(Program(groups), **LINK).forward.sent
        assert sent == 2 * (n - 1) / n * 128, groups
    with pytest.raises(ValueError, match="Groups in an unknown form"):
        sync_cost(Program("all of them"), **LINK)


def test_a_collective_without_a_formula(monkeypatch):
    from jaxbn.testing import _cost_model

    monkeypatch.delitem(_cost_model._SENT, "all-to-all")
    with pytest.raises(ValueError, match="no formula for 'all-to-all'"):
        sync_cost(over(exchange, PARTS), ROWS, **LINK)
