"""Microbatches together give what the whole batch gives."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import accumulate
from jaxbn.linen import BatchNorm
from jaxbn.testing._collectives import split_conditional
from train.resnet import ResNet

N, CHANNELS, LAYERS = 32, 4, 2
EPSILON, DECAY = 1e-5, 0.9
BOTH = ("data", "micro")

# Most of the time here goes into compilation.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def plain_norm(x, scale, bias, keep):
    """The formula over all examples of one array, for autodiff."""
    axes = tuple(range(x.ndim - 1))
    n = jnp.broadcast_to(keep, x.shape).sum(axes)
    mean = jnp.where(keep, x, 0).sum(axes) / n
    var = jnp.where(keep, jnp.square(x - mean), 0).sum(axes) / n
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    return y * scale + bias, (mean, var)


def jaxbn_norm(axis_name, x, scale, bias, keep, **options):
    y, batch = jaxbn.batch_norm(
        x, scale, bias, where=keep, axis_name=axis_name, **options
    )
    return y, (batch.mean, batch.var)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def dense(x, w):
    return x @ w


def loss_of(norm, mix=dense, total=lambda x: x):
    """loss(params, stats, batch) -> (value, (stats, outputs))."""

    def loss(params, stats, batch):
        x, cotangent, keep = batch
        new = []
        for (w, scale, bias), old in zip(params, stats):
            x, found = norm(mix(x, w), scale, bias, keep)
            x = jnp.sin(x)
            new.append(
                [DECAY * a + (1 - DECAY) * b for a, b in zip(old, found)]
            )
        count = total(keep.sum()).astype(x.dtype)
        losses = jnp.where(keep, x * cotangent, 0)
        return total(losses.sum()) / count, (new, x)

    return loss


def over(axis_name):
    return lambda x: jax.lax.psum(x, axis_name)


def problem(mix=dense, dtype=np.float64, seed=0, offset=0.0):
    """(params, stats, batch): of 8 parts of the batch one keeps nothing."""
    rng = np.random.default_rng(seed)
    inner = (5, 5) if mix is conv else ()
    kernel = (3, 3) if mix is conv else ()
    x, cotangent = rng.normal(1, 2, (2, N, *inner, CHANNELS))
    x = x + offset
    keep = rng.random((N, *(1 for _ in inner), 1)) < 0.6
    keep[:2] = True
    # Whatever is cut, by neighbours or by stride, has unlike counts.
    keep[4::8] = keep[8:12] = False
    params = [
        (
            rng.normal(0, 0.5, (*kernel, CHANNELS, CHANNELS)),
            rng.normal(1, 0.3, CHANNELS),
            rng.normal(0, 0.3, CHANNELS),
        )
        for _ in range(LAYERS)
    ]
    stats = [[np.zeros(CHANNELS), np.ones(CHANNELS)] for _ in range(LAYERS)]
    cast = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
    return cast(params), cast(stats), (*cast((x, cotangent)), keep)


@functools.cache
def expected(mix=dense, offset=0.0):
    """Value, aux and gradients of the whole batch in float64."""
    with jax.enable_x64(True):
        step = jax.value_and_grad(loss_of(plain_norm, mix), has_aux=True)
        return jax.device_get(jit(step)(*problem(mix, offset=offset)))


def in_rows(got):
    """Puts what comes a microbatch at a time in the order of the batch."""
    (value, (stats, out)), grads = got
    out = out.swapaxes(0, 1).reshape(N, *out.shape[2:])
    return (value, (stats, out)), grads


def assert_close(got, want, tolerance):
    def close(got, want):
        np.testing.assert_allclose(
            np.asarray(got, np.float64),
            want,
            rtol=0,
            atol=tolerance * np.abs(want).max(),
        )

    jax.tree.map(close, got, want)


def exact_step(mix=dense, axis_name="micro", **options):
    norm = functools.partial(jaxbn_norm, axis_name)
    options = dict(microbatches=4, has_aux=True) | options
    return accumulate.value_and_grad(
        loss_of(norm, mix, over(axis_name)), **options
    )


def test_convolutions_equal_the_whole_batch():
    step = exact_step(conv, microbatches=2)
    with jax.enable_x64(True):
        got = jit(step)(*problem(conv))
    assert_close(in_rows(got), expected(conv), 1e-10)


@pytest.mark.parametrize("microbatches", (1, 4))
def test_any_number_of_microbatches(microbatches):
    step = jit(exact_step(microbatches=microbatches))
    with jax.enable_x64(True):
        got = step(*problem())
        assert_close(in_rows(got), expected(), 1e-12)
    if microbatches == 4:
        got = step(*problem(dtype=np.float32))
        assert got[1][0][0].dtype == jnp.float32
        assert_close(in_rows(got), expected(), 1e-5)


def test_sums_that_are_taken_again():
    """Far from the shift: a branch that reduces over the microbatches."""
    step = jit(exact_step())
    with jax.enable_x64(True):
        got = step(*problem(offset=1e3))
    assert_close(in_rows(got), expected(offset=1e3), 1e-8)
    got = step(*problem(offset=1e3, dtype=np.float32))
    assert_close(got[0][0], expected(offset=1e3)[0][0], 1e-3)


def test_mean_of_means_where_counts_are_equal():
    """A loss that does not know of microbatches."""

    def loss(norm, params, stats, batch):
        value, (stats, _) = loss_of(norm)(params, stats, batch)
        return value + jnp.square(params[0][0]).sum(), stats

    micro = functools.partial(jaxbn_norm, "micro")
    with jax.enable_x64(True):
        params, stats, (x, cotangent, keep) = problem()
        batch = x, cotangent, np.ones_like(keep)
        got, want = (
            jit(step(functools.partial(loss, norm), has_aux=True))(
                params, stats, batch
            )
            for step, norm in (
                (jax.value_and_grad, plain_norm),
                (
                    functools.partial(
                        accumulate.value_and_grad, microbatches=4
                    ),
                    micro,
                ),
            )
        )
        assert_close(got, want, 1e-12)


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


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_global_arrays(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        params, stats, batch = problem()
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        got = jit(exact_step())(params, stats, batch)
        assert_close(jax.device_get(in_rows(got)), expected(), 1e-12)


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


def resnet():
    """Losses of ResNet-8 without and with an axis, and their arguments.

    In float64 but for the logits, which the network rounds to float32.
    """

    def loss_with(axis_name):
        norm = functools.partial(BatchNorm, momentum=0.9, axis_name=axis_name)
        model = ResNet(8, num_classes=3, width=2, norm=norm, dtype=jnp.float64)

        def loss(params, batch_stats, batch):
            images, labels = batch
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -losses.mean(), (updates["batch_stats"], logits)

        return model, loss

    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 8, 8, 3))
    labels = rng.integers(0, 3, 12)
    model, loss = loss_with(None)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    variables = jax.tree.map(lambda a: rng.normal(1, 0.5, a.shape), shapes)
    arguments = variables["params"], variables["batch_stats"], (images, labels)
    return loss, loss_with("micro")[1], arguments


def test_resnet():
    with jax.enable_x64(True):
        loss, in_microbatches, arguments = resnet()
        want = jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
        step = accumulate.value_and_grad(
            in_microbatches, microbatches=3, has_aux=True
        )
        (value, (stats, logits)), grads = jit(step)(*arguments)
        logits = logits.swapaxes(0, 1).reshape(12, 3)
        got = jax.device_get(((value, (stats, logits)), grads))
    assert_close(got, want, 1e-6)


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


def loss_in_pairs(axis_name):
    scope = jaxbn.Scope(group_size=2)
    norm = functools.partial(jaxbn_norm, axis_name, scope=scope)
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


@pytest.mark.parametrize("check_vma", (None, True, False))
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


def loops_and_checkpoints(axis_name, params, batch):
    x, cotangent, keep = batch
    total = over(axis_name) if axis_name else lambda x: x

    @jax.checkpoint
    def block(layers, x):
        for w, scale, bias in layers:
            x, _ = jaxbn.batch_norm(
                x @ w, scale, bias, where=keep, axis_name=axis_name
            )
            x = jnp.sin(x)
        return x

    def step(x, _):
        x = jnp.sin(x @ params[0][0])
        return x, x.sum(-1)

    x, sums = jax.lax.scan(step, block(params[:2], x), length=2)
    x = jax.lax.cond(params[0][1][0] > 0, jnp.sin, jnp.cos, x)
    x = x + jax.lax.fori_loop(
        0, 2, lambda _, x: x * x, jax.lax.stop_gradient(x)
    )
    x = block(params[1:], x)
    sums = total(jnp.where(keep, x * cotangent, 0).sum() + sums.sum())
    return sums / total(keep.sum())


@pytest.mark.parametrize("check_vma", (None, True))
def test_loops_and_checkpoints(check_vma):
    with jax.enable_x64(True):
        params, _, batch = problem()
        loss = functools.partial(loops_and_checkpoints, None)
        want = jit(jax.value_and_grad(loss))(params, batch)
        axis_name = BOTH if check_vma else "micro"
        step = accumulate.value_and_grad(
            functools.partial(loops_and_checkpoints, axis_name), microbatches=2
        )
        if check_vma:
            mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
            )
        assert_close(jit(step)(params, batch), want, 1e-12)


def test_effects_happen_once_a_microbatch(capsys):
    def loss(w, x):
        jax.debug.print("microbatch {i}", i=jax.lax.axis_index("micro"))
        return jax.lax.pmean((w * x).sum(), "micro")

    step = accumulate.value_and_grad(loss, microbatches=3)
    jax.block_until_ready(jit(step)(1.0, jnp.ones(6)))
    jax.effects_barrier()
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == ["microbatch 0", "microbatch 1", "microbatch 2"]


def test_gradients_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256."""

    def loss(w, x):
        return (w * x).sum() * jax.lax.psum(1.0 + 0 * x.sum(), "micro") / 64

    x = jnp.ones(64, jnp.float32).at[0].set(256)
    step = accumulate.value_and_grad(loss, microbatches=64)
    _, grad = jit(step)(jnp.ones((), jnp.bfloat16), x)
    assert grad.dtype == jnp.bfloat16
    assert float(grad) == float(jnp.bfloat16(319 / 64))


def test_several_arguments_are_differentiated():
    def loss(w, b, x):
        return jax.lax.pmean((w["w"] * x + b).mean(), "micro")

    step = accumulate.value_and_grad(loss, microbatches=2, argnums=(0, 1))
    _, (w, b) = step({"w": jnp.ones(())}, jnp.ones(()), jnp.arange(4.0))
    assert (float(w["w"]), float(b)) == (1.5, 1.0)


def six_convolutions(axis_name, checkpoint, params, x):
    def block(params, x):
        for w, scale, bias in params:
            x, _ = jaxbn.batch_norm(
                conv(x, w), scale, bias, axis_name=axis_name
            )
            x = jax.nn.relu(x)
        return x

    wrapped = jax.checkpoint(block) if checkpoint else block
    x = wrapped(params[3:], wrapped(params[:3], x))
    return (x.mean((1, 2)) ** 3).sum(-1).mean()


def compiled_convolutions(microbatches=None, checkpoint=False, **options):
    """The program, and the bytes of one activation of the whole batch."""
    channels, shape = 8, (32, 16, 16)
    w = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    x = jax.ShapeDtypeStruct((*shape, channels), jnp.float32)
    if microbatches is None:
        loss = functools.partial(six_convolutions, None, checkpoint)
        step = jax.value_and_grad(loss)
    else:
        exact = options.get("exact", True)
        loss = functools.partial(
            six_convolutions, "micro" if exact else None, checkpoint
        )
        step = accumulate.value_and_grad(
            loss, microbatches=microbatches, **options
        )
    lowered = jit(step).lower([(w, vector, vector)] * 6, x)
    return lowered, 4 * channels * np.prod(shape)


def temporaries(*args, **options):
    """In activations of the whole batch."""
    lowered, unit = compiled_convolutions(*args, **options)
    return lowered.compile().memory_analysis().temp_size_in_bytes / unit


def test_memory():
    whole = temporaries()
    assert whole > 12
    # The inputs of six normalizations, and four of one microbatch.
    assert temporaries(8) < 6 + 4 / 8 + 0.2
    # Of three in a block inside jax.checkpoint, and one gradient.
    assert temporaries(8, checkpoint=True) < 5.2
    assert temporaries(8, exact=False) < 15 / 8


def test_no_convolution_runs_twice():
    lowered, _ = compiled_convolutions(2)
    # Forward, and two backward of which the first layer needs one.
    assert lowered.as_text().count("stablehlo.convolution") == 3 * 6 - 1


def moments_loss(norm, params, batch):
    """Every layer's moments as aux; microbatches know nothing of another."""
    x, cotangent, keep = batch
    found = {}
    for i, (w, scale, bias) in enumerate(params):
        x, found[f"layer{i}"] = jaxbn.batch_norm(
            x @ w, scale, bias, where=keep, axis_name=norm
        )
        x = jnp.sin(x)
    return jnp.where(keep, x * cotangent, 0).sum(), (found, x)


def numpy_moments(params, parts):
    """Moments of all parts, each normalized by its own: float64."""
    layers, outputs = [[] for _ in params], []
    for x, _, keep in parts:
        rows = keep[:, 0]
        for (w, scale, bias), seen in zip(params, layers):
            x = x @ w
            seen.append(x[rows])
            mean, var = x[rows].mean(0), x[rows].var(0)
            x = np.sin((x - mean) / np.sqrt(var + EPSILON) * scale + bias)
        outputs.append(x)
    values = [np.concatenate(seen) for seen in layers]
    return [
        (np.float64(len(x)), x.mean(0), x.var(0) * len(x)) for x in values
    ], outputs


def test_apart():
    params, _, batch = problem()
    parts = [jax.tree.map(lambda a, i=i: a[i::4], batch) for i in range(4)]
    want, outputs = numpy_moments(params, parts)
    step = accumulate.value_and_grad(
        functools.partial(moments_loss, None),
        microbatches=4,
        exact=False,
        has_aux=True,
    )
    one = jax.value_and_grad(
        functools.partial(moments_loss, None), has_aux=True
    )
    with jax.enable_x64(True):
        (value, (found, out)), grads = jit(step)(params, batch)
        assert_close(list(map(tuple, found.values())), want, 1e-12)
        assert_close(list(out), outputs, 1e-12)
        one = jit(one)
        each = [one(params, part) for part in parts]
        values, gradients = zip(*((value, grad) for (value, _), grad in each))
        assert_close(value, np.mean(values), 1e-12)
        mean = jax.tree.map(lambda *a: np.mean(a, 0), *gradients)
        assert_close(grads, mean, 1e-12)


@pytest.mark.parametrize("check_vma", (True, False))
def test_apart_in_shard_map(check_vma):
    """Microbatches apart, each over all devices."""
    params, _, batch = problem()
    step = accumulate.value_and_grad(
        functools.partial(moments_loss, "data"),
        microbatches=2,
        exact=False,
        has_aux=True,
    )

    def run(params, batch):
        (value, (found, _)), grads = step(params, batch)
        value = jax.lax.psum(value, "data")
        return value, found, grads if check_vma else jax.lax.psum(grads, "data")

    mapped = jax.shard_map(
        run,
        mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    parts = [
        jax.tree.map(
            lambda a, i=i: np.concatenate([b[i::2] for b in np.split(a, 4)]),
            batch,
        )
        for i in range(2)
    ]
    want, _ = numpy_moments(params, parts)
    one = jax.value_and_grad(
        functools.partial(moments_loss, None), has_aux=True
    )
    with jax.enable_x64(True):
        value, found, grads = jit(mapped)(params, batch)
        assert_close(list(map(tuple, found.values())), want, 1e-12)
        each = [jit(one)(params, part) for part in parts]
        assert_close(value, np.mean([value for (value, _), _ in each]), 1e-12)
        mean = jax.tree.map(
            lambda *a: np.mean(a, 0), *(grads for _, grads in each)
        )
        assert_close(grads, mean, 1e-12)


def test_flax_moments_move_running_statistics_once():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = functools.partial(
                BatchNorm,
                use_running_average=False,
                momentum=DECAY,
                debias=True,
                skip_nonfinite=True,
            )
            return norm(name="last")(nn.Dense(3)(norm(name="first")(x)))

    model = Net()

    def loss(params, batch_stats, x):
        y, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats", "batch_moments"],
        )
        return jnp.square(y).mean(), updates["batch_moments"]

    x = np.random.default_rng(0).normal(3, 2, (12, 5)).astype(np.float32)
    variables = jit(model.init)(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]
    step = accumulate.value_and_grad(
        loss, microbatches=3, exact=False, has_aux=True
    )
    (_, moments), _ = jit(step)(params, stats, x)
    update = jit(
        functools.partial(
            accumulate.update_batch_stats,
            decay=DECAY,
            debias=True,
            skip_nonfinite=True,
        )
    )
    got = update(stats, moments)["first"]
    apply = jit(functools.partial(model.apply, mutable=["batch_stats"]))
    _, whole = apply(variables, x)
    assert_close(got, jax.device_get(whole["batch_stats"]["first"]), 1e-5)
    poisoned = jax.tree.map(lambda a: a * jnp.nan, moments)
    skipped = update(stats, poisoned)["first"]
    assert (int(skipped["skipped"]), float(skipped["mean"][0])) == (1, 0.0)


def test_update_batch_stats():
    moments = jaxbn.Moments(jnp.array(4.0), jnp.ones(2), jnp.full(2, 8.0))
    stats = {
        "a": {"b": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
        "c": jaxbn.init_running(2),
        "d": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    new = accumulate.update_batch_stats(
        stats, {"a": {"b": moments}, "c": {"moments": moments}}, decay=0.75
    )
    assert_close(new["a"]["b"], {"mean": [0.25] * 2, "var": [1.25] * 2}, 1e-6)
    assert_close(tuple(new["c"])[:2], ([0.25] * 2, [1.25] * 2), 1e-6)
    assert new["d"] is stats["d"]
    unbiased = accumulate.update_batch_stats(
        stats["c"], moments, decay=0.0, ddof=1
    )
    assert_close(unbiased.var, [8 / 3] * 2, 1e-6)


def psum_loss(w, x):
    return jax.lax.psum((w * x).sum(), "micro")


def in_scan(w, x):
    def step(carry, _):
        return jax.lax.psum(carry * w, "micro"), None

    return jax.lax.scan(step, x.sum(), length=2)[0]


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
    "none": (
        lambda: step(microbatches=0)(1.0, jnp.ones(12)),
        "microbatches=0 does not divide the 12 examples of the batch; 1 would.",
    ),
    "no axis": (
        lambda: step()(1.0, (jnp.ones(4), jnp.ones(()))),
        "needs the examples on axis 0; got float32[4], float32[].",
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
        lambda: step(in_scan)(1.0, jnp.ones(4)),
        "psum over 'micro' stands inside scan, which cannot be cut there.",
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
        lambda: accumulate.update_batch_stats({"a": {}}, {"b": {}}, decay=0.9),
        "moments has ['b'] where batch_stats has ['a'].",
    ),
    "moments of a container": (
        lambda: accumulate.update_batch_stats(
            {"a": {"b": {}}}, {"a": jaxbn.Moments(1, 0, 0)}, decay=0.9
        ),
        "moments has Moments where batch_stats has ['b'].",
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
