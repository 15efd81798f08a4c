"""What synchronization costs a model, read off its compiled step."""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn.linen import BatchNorm
from jaxbn.testing import LINKS, collectives, group_costs, sync_cost
from tests.bench.gpu_nets import ResNet50

WAIT, RATE = 1e-5, 1e9
LINK = {"latency": WAIT, "bandwidth": RATE}


# Every kind of collective, and groups as XLA writes them

PARTS = P("data")


@functools.cache
def mesh(shape=(8,), names=("data",)):
    kind = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=kind)


# A model


class Net(nn.Module):
    axis_name: str | None = "data"
    group_size: int | None = None

    @nn.compact
    def __call__(self, x):
        for width in (4, 8):
            x = nn.Dense(width, use_bias=False)(x)
            x = BatchNorm(
                use_running_average=False,
                axis_name=self.axis_name,
                sharing=jaxbn.Scope(group_size=self.group_size),
            )(x)
            x = nn.relu(x)
        return nn.Dense(3)(x)


CHANNELS, NORMS = 4 + 8, 2
BATCH = jax.ShapeDtypeStruct((32, 6), jnp.float32)


@functools.cache
def variables():
    x = jnp.zeros((2, 6))
    return jax.eval_shape(lambda: Net(None).init(jax.random.key(0), x))


@functools.cache
def step(axis_name="data", group_size=None, check_vma=False):
    model = Net(axis_name, group_size)

    def run(variables, x):
        def loss(params):
            both = {**variables, "params": params}
            y, new = model.apply(both, x, mutable=["batch_stats"])
            return jax.lax.pmean(jnp.square(y).mean(), "data"), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        if not check_vma:
            grads = jax.lax.pmean(grads, "data")
        return value, new, grads

    specs = {"in_specs": (P(), PARTS), "out_specs": P()}
    return jax.jit(
        jax.shard_map(run, mesh=mesh(), check_vma=check_vma, **specs)
    )


@functools.cache
def cost(**options):
    return sync_cost(
        step(), variables(), BATCH, unsynchronized=step(None), **LINK, **options
    )


def test_batch_norm_is_told_from_the_gradient():
    got = cost()
    assert (got.forward.count, got.backward.count) == (NORMS, NORMS)
    assert got.forward.sent == pytest.approx(2 * 7 / 8 * 4 * 2 * CHANNELS)
    assert got.backward.sent == pytest.approx(2 * 7 / 8 * 4 * 2 * CHANNELS)
    params = sum(p.size for p in jax.tree.leaves(variables()["params"]))
    # And the loss, and the cotangent that its pmean turns into.
    assert got.rest.sent == pytest.approx(2 * 7 / 8 * 4 * (params + 2))
    total = collectives(step(), variables(), BATCH)["all-reduce"]
    parts = got.forward + got.backward + got.rest
    assert parts.count == total.count
    assert parts.sent == pytest.approx(2 * 7 / 8 * total.bytes)


def test_passes_are_told_apart_where_nothing_is_subtracted():
    got = sync_cost(step(check_vma=True), variables(), BATCH, **LINK)
    assert got.forward.count == NORMS and got.rest.count == 0
    assert got.backward.count >= NORMS

    def forward(x):
        return Net().init_with_output(jax.random.key(0), x)[0]

    alone = jax.shard_map(forward, mesh=mesh(), in_specs=PARTS, out_specs=PARTS)
    got = sync_cost(alone, BATCH, **LINK)
    assert got.backward.count == 0


def test_global_arrays_under_jit():
    def run(variables, x):
        def loss(params):
            both = {**variables, "params": params}
            return jnp.square(Net().apply(both, x, mutable=True)[0]).mean()

        return jax.grad(loss)(variables["params"])

    places = NamedSharding(mesh(), P()), NamedSharding(mesh(), PARTS)
    jitted = jax.jit(run, in_shardings=places, out_shardings=places[0])
    got = sync_cost(jitted, variables(), BATCH, **LINK)
    assert got.forward.count == NORMS
    assert got.backward.count >= NORMS


def test_share_and_table():
    got = cost(compute=1e-3)
    sync = got.forward.seconds + got.backward.seconds
    assert got.seconds == sync
    assert got.share == sync / (1e-3 + sync + got.rest.seconds)
    assert cost().share is None
    lines = str(got).splitlines()
    assert lines[0].split() == ["8", "devices", "collectives", "MB", "ms"]
    count, sent, ms = lines[1].removeprefix("batch norm, forward").split()
    assert (int(count), float(sent)) == (
        NORMS,
        round(got.forward.sent / 1e6, 3),
    )
    assert float(ms) == round(1e3 * got.forward.seconds, 3)
    assert f"{got.share:.1%} of a step" in lines[-1]
    assert "of a step" not in str(cost())


def test_groups_pay_where_few_devices_answer_sooner():
    got = group_costs(
        lambda size: step("data", size),
        variables(),
        BATCH,
        sizes=(2, 8),
        devices=64,
        unsynchronized=step(None),
        latency=lambda n: n * 1e-6,
        bandwidth=RATE,
    )
    assert got[2].seconds < got[8].seconds
    # Of two: an all-gather forward, a reduce-scatter back; the all-reduce for
    # running statistics goes with the gradient's.
    for size, members in ((2, 2), (8, 64)):
        assert got[size].forward.count == got[size].backward.count == NORMS
        assert got[size].seconds == pytest.approx(4e-6 * members, rel=0.3)


@pytest.mark.slow
def test_table_of_the_page_on_resnet_50():
    model = ResNet50(num_classes=1000, norm=BatchNorm)
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    both = jax.eval_shape(init, jax.random.key(0), images)

    def resnet(axis_name):
        norm = functools.partial(BatchNorm, axis_name=axis_name)
        net = model.clone(norm=norm)

        def run(variables, x):
            def loss(params):
                both = {**variables, "params": params}
                y, new = net.apply(both, x, train=True, mutable=["batch_stats"])
                return jnp.square(y).mean(), new

            grads, new = jax.grad(loss, has_aux=True)(variables["params"])
            return jax.lax.pmean(grads, "data"), new

        specs = {"in_specs": (P(), PARTS), "out_specs": P()}
        return jax.jit(
            jax.shard_map(run, mesh=mesh(), check_vma=False, **specs)
        )

    calls = {"latency": 0.0, "unsynchronized": resnet(None)}
    table = {}
    for link, devices in (("nvlink4", 8), ("tpu_v5e", 256)):
        table[link] = sync_cost(
            resnet("data"),
            both,
            images,
            devices=devices,
            bandwidth=LINKS[link],
            **calls,
        )
    eight = table["nvlink4"]
    assert (eight.forward.count, eight.backward.count) == (49, 49)
    assert eight.rest.count == 1
    assert eight.forward.sent == 2 * 7 / 8 * 4 * 53_120
    assert eight.backward.sent == 2 * 7 / 8 * 4 * 53_120
    page = Path(__file__).parent.parent / "jaxbn/docs/communication.md"
    rows = re.findall(r"\| ([\w ]+?)(?: µs)? \|(.* ms) \|\n", page.read_text())
    assert [row[0] for row in rows] == ["5", "10", "20", "bandwidth alone"]
    for latency, cells in rows:
        wait = 1e-6 * float(latency) if latency.isdigit() else 0.0
        want = []
        for c in table.values():
            sync = c.seconds + wait * (c.forward.count + c.backward.count)
            want += [sync, c.rest.seconds + wait]
        shown = [f"{1e3 * seconds:.3f}" for seconds in want]
        assert re.findall(r"([\d.]+) ms", cells) == shown
