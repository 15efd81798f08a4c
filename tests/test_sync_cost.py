"""The time of synchronization, from a program and figures of a link."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.testing import LINKS, group_costs, sync_cost

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
            x, axis_name=axis_name, scope=jaxbn.Scope(**scope)
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
    sent = 2 * 7 / 8 * 4 * (4 * C + 2)
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
    np.testing.assert_allclose(whole.forward.sent, ring * (4 * C + 2))
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
    sent = 2 * 255 / 256 * 4 * (4 * C + 2)
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
