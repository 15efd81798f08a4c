"""Moments of layers wherever they lie, and of nothing else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert, doctor, precise

pytestmark = pytest.mark.sample(3)

AXES = {"params": 0, "batch_stats": 0}


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (16, 3)).astype(np.float32)


class Block(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, momentum=0.0)(x)
        return nn.Dense(3)(x) + x, None


def scanned(block=Block):
    return nn.scan(
        block,
        variable_axes=AXES,
        split_rngs={"params": True},
        length=2,
        in_axes=nn.broadcast,
    )


def mapped(axes=AXES):
    return nn.vmap(
        Block,
        variable_axes=axes,
        split_rngs={"params": True},
        in_axes=(0, None),
        axis_size=2,
    )


class Net(nn.Module):
    block: type
    members: bool = False

    @nn.compact
    def __call__(self, x, train):
        if self.members:
            x = jnp.stack([x, 2 * x])
        return self.block(name="block")(x, train)[0]


LIFTED = {
    "scan": Net(scanned()),
    "vmap": Net(mapped(), True),
    "vmap on another axis": Net(mapped({"params": 0, "batch_stats": 1}), True),
    "remat": Net(nn.remat(Block, static_argnums=2)),
    "jit": Net(nn.jit(Block, static_argnums=2)),  # cached by flax's own run
}


@pytest.mark.parametrize("name", LIFTED)
def test_layers_inside_lifted_transforms(name, x):
    """flax's own update with momentum 0 leaves what the batch has."""
    model = LIFTED[name]
    variables = model.init(jax.random.key(0), x, False)
    _, updates = model.apply(variables, x, True, mutable=["batch_stats"])
    want = updates["batch_stats"]["block"]["BatchNorm_0"]
    ours = convert.to_jaxbn(model)
    got = jaxbn.linen.batch_moments(ours, variables, x, True)
    layer = got["block"]["BatchNorm_0"]
    np.testing.assert_array_equal(layer.count, np.full(want["mean"].shape, 16))
    np.testing.assert_allclose(layer.mean, want["mean"], atol=1e-5)
    np.testing.assert_allclose(layer.var, want["var"], rtol=1e-5)
    # In batches, and as they go back.
    found = precise.recompute(model, variables, [x[:8], x[8:]])
    stats = precise.with_statistics(variables["batch_stats"], found.stats)
    new = stats["block"]["BatchNorm_0"]
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, want)
    first = {"vmap on another axis": np.s_[:, 0], "vmap": 0}.get(name, np.s_[:])
    mean = np.asarray(new["mean"])[first].reshape(-1)[:3]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    if name in ("scan", "jit"):
        report = doctor.examine(model, variables, [x], quiet=True)
        (layer,) = report.layers
        assert layer.path == "block/BatchNorm_0" and layer.calls == 1


def test_a_carry_collects_all_iterations(x):
    """Weights that are shared by the iterations of a scan."""
    looped = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
        length=3,
        in_axes=nn.broadcast,
    )
    variables = Net(Block).init(jax.random.key(0), x, False)
    got = precise.recompute(Net(looped), variables, [x]).stats
    layer = got["block"]["BatchNorm_0"]
    want, y = [], x
    for _ in range(3):
        want.append(y)
        y, _ = Net(Block).apply(variables, y, True, mutable=["batch_stats"])
    want = np.concatenate(want)
    np.testing.assert_array_equal(layer.count, [48] * 3)
    np.testing.assert_allclose(layer.mean, want.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var, want.var(0), rtol=1e-5)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_of_the_program(taken, x):
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            block = Block(name="block")
            if self.is_initializing():
                block(x, train)
            x = nn.BatchNorm(use_running_average=not train, name="always")(x)
            return nn.cond(
                jnp.bool_(taken),
                lambda block, x: block(x, train)[0],
                lambda block, x: x,
                block,
                x,
            )

    model = Branch()
    variables = model.init(jax.random.key(0), x, False)
    got = precise.recompute(model, variables, [x]).stats
    count = got["block"]["BatchNorm_0"].count
    np.testing.assert_array_equal(count, [16 if taken else 0] * 3)
    report = doctor.examine(model, variables, [x], quiet=True)
    assert len(report.layers) == (2 if taken else 1)
    text = "block/BatchNorm_0 receives no value"
    assert (text in str(report)) != taken


@pytest.mark.parametrize("transform", [nnx.vmap, nnx.scan])
def test_nnx_transforms(transform, x):
    class Members(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=2)
            @nnx.vmap
            def make(rngs):
                return nnx.BatchNorm(3, rngs=rngs)

            self.norm = make(rngs)

        def __call__(self, x):
            axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None})
            if transform is nnx.vmap:
                run = nnx.vmap(lambda norm, x: norm(x), in_axes=(axes, None))
            else:
                run = nnx.scan(
                    lambda norm, x: norm(x),
                    in_axes=(axes, nnx.Carry),
                    out_axes=nnx.Carry,
                )
            return run(self.norm, x)

    found = precise.recompute(Members(nnx.Rngs(0)), None, [x[:6], x[6:]])
    layer = found.stats["norm"]
    assert layer.mean.shape == (2, 3)
    np.testing.assert_allclose(layer.mean[0], x.mean(0), rtol=1e-5)


# Layers that do not train


class Parts(nn.Module):
    """Of four parts with a mean and a var one is a batch norm that trains."""

    @nn.compact
    def __call__(self, x, train):
        frozen = jaxbn.linen.BatchNorm(use_running_average=True, name="frozen")
        unused = jaxbn.linen.BatchNorm(use_running_average=True, name="unused")
        if self.is_initializing():
            unused(x)
        x = Observed(name="seen")(frozen(x), train)
        x = nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)
        return jaxbn.linen.BatchNorm(use_running_average=not train)(x)


class Observed(nn.Module):
    """The mean and variance of observations, as reinforcement learners do."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, 3)
        self.variable("batch_stats", "var", jnp.ones, 3)
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        if train:
            mean.value += x.mean(0)
            count.value += 1
        return x - mean.value


def test_only_what_ran_as_batch_norm_counts(x):
    model = Parts()
    variables = model.init(jax.random.key(0), x, False)
    stats = variables["batch_stats"]
    assert set(stats) > {"seen", "frozen", "unused", "BatchNorm_0"}
    found = precise.recompute(model, variables, [x[:6], x[6:]]).stats
    assert list(found) == ["BatchNorm_0"]
    new = precise.with_statistics(stats, found)
    for name in stats:
        moved = not all(
            jax.tree.leaves(
                jax.tree.map(
                    lambda a, b: bool((a == b).all()), new[name], stats[name]
                )
            )
        )
        assert moved == (name == "BatchNorm_0")
    report = doctor.examine(model, variables, [x[:6], x[6:]], quiet=True)
    assert [layer.path for layer in report.layers] == ["BatchNorm_0"]
    text = "\n".join(report.warnings)
    assert "frozen runs in inference mode while the model trains" in text
    assert "unused, seen: each has a mean and a var in batch_stats" in text or (
        "seen, unused: each has a mean and a var in batch_stats" in text
    )


def test_state_of_an_nnx_model_that_is_no_batch_norm(x):
    class Observed(nnx.Module):
        def __init__(self):
            self.mean = nnx.BatchStat(jnp.zeros(3))
            self.var = nnx.BatchStat(jnp.ones(3))

        def __call__(self, x):
            self.mean[...] = self.mean[...] + x.mean(0)
            return x - self.mean[...][None]

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.seen = Observed()
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.seen(x))

    found = precise.recompute(Model(nnx.Rngs(0)), None, [x]).stats
    assert set(found) == {"norm"}
    report = doctor.examine(Model(nnx.Rngs(0)), None, [x], quiet=True)
    assert [layer.path for layer in report.layers] == ["norm"]


def test_a_copy_of_the_layer_beside_other_state(x):
    class Copy(nn.Module):
        """flax's layer, as authors write it again."""

        use_running_average: bool | None = None
        axis: int = -1
        momentum: float = 0.99
        epsilon: float = 1e-5
        dtype: type | None = None
        param_dtype: type = jnp.float32
        use_bias: bool = True
        use_scale: bool = True
        bias_init: nn.initializers.Initializer = nn.initializers.zeros
        scale_init: nn.initializers.Initializer = nn.initializers.ones
        axis_name: str | None = None
        axis_index_groups: tuple | None = None

        @nn.compact
        def __call__(self, x, use_running_average=None):
            inference = nn.merge_param(
                "use_running_average",
                self.use_running_average,
                use_running_average,
            )
            size = x.shape[-1]
            mean = self.variable("batch_stats", "mean", jnp.zeros, size)
            var = self.variable("batch_stats", "var", jnp.ones, size)
            scale = self.param("scale", self.scale_init, (size,))
            bias = self.param("bias", self.bias_init, (size,))
            axes = tuple(range(x.ndim - 1))
            m, v = mean.value, var.value
            if not inference:
                m, v = x.mean(axes), x.var(axes)
                if not self.is_initializing():
                    keep = self.momentum
                    mean.value = keep * mean.value + (1 - keep) * m
                    var.value = keep * var.value + (1 - keep) * v
            shape = (1,) * (x.ndim - 1) + (size,)
            m, v, scale, bias = (a.reshape(shape) for a in (m, v, scale, bias))
            return (x - m) / jnp.sqrt(v + self.epsilon) * scale + bias

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = Copy(use_running_average=not train, name="copy")(x)
            return Observed(name="seen")(x, train)

    model = Model()
    variables = model.init(jax.random.key(0), x, False)
    found = precise.recompute(model, variables, [x]).stats
    assert set(found) == {"copy"}
    np.testing.assert_allclose(found["copy"].mean, x.mean(0), rtol=1e-5)
    report = doctor.examine(model, variables, [x], quiet=True)
    assert [layer.path for layer in report.layers] == ["copy"]
    assert any("seen has a mean and a var in" in w for w in report.warnings)


def test_nnx_layers_in_the_order_of_the_calls(x):
    class Odd(nnx.Module):
        def __init__(self, rngs):
            for name in "afuz":
                setattr(self, name, nnx.BatchNorm(3, rngs=rngs))

        def __call__(self, x):
            return self.a(self.f(self.z(x), use_running_average=True))

    report = doctor.examine(Odd(nnx.Rngs(0)), None, [x, x + 1], quiet=True)
    assert [layer.path for layer in report.layers] == ["z", "a"]
    text = "\n".join(report.warnings)
    assert "\nf runs in inference mode while the model trains" in text
    assert "\nu is not called in training" in text
    found = precise.recompute(Odd(nnx.Rngs(0)), None, [x]).stats
    assert set(found) == {"z", "a"}


def test_a_model_in_inference_mode_is_refused(x):
    model = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="inference mode, in the model itself"):
        jaxbn.linen.batch_moments(model, variables, x)

    def call(model, batch, train):
        return model(batch)

    with pytest.raises(
        ValueError, match="in this call the model is in inference"
    ):
        doctor.examine(model, variables, [x], call=call)
    dense = nn.Dense(3)
    variables = {**dense.init(jax.random.key(0), x), "batch_stats": variables}
    with pytest.raises(
        ValueError, match="no batch norm layer of jaxbn was called"
    ):
        doctor.examine(dense, variables, [x], call=call)
    with pytest.raises(ValueError, match="no batch norm layer of jaxbn was"):
        jaxbn.linen.batch_moments(dense, variables, x)
    with pytest.raises(
        ValueError, match="and no mean and var in its batch_stats"
    ):
        jaxbn.linen.batch_moments(dense, {"params": variables["params"]}, x)


# Nobody gets moments who did not ask


@pytest.mark.parametrize("lift", [scanned, nn.remat, nn.jit])
def test_lifted_classes_that_are_applied_themselves(lift, x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jaxbn.linen.BatchNorm(use_running_average=False)(x), None

    axes = dict.fromkeys([*AXES, "batch_moments"], 0)
    model = lift(Layer)()
    if lift is scanned:
        rngs = {"params": True}
        scan = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)
        model = scan()
    variables = model.init(jax.random.key(0), x, None)
    for mutable in (True, DenyList("params"), DenyList(()), ["batch_stats"]):
        _, updates = model.apply(variables, x, None, mutable=mutable)
        assert "batch_moments" not in updates
        assert set(jax.tree.leaves(jax.tree.map(jnp.ndim, updates))) <= {1, 2}
    found = jaxbn.linen.batch_moments(model, variables, x, None)
    mean = found["BatchNorm_0"].mean.reshape(-1, 3)[0]
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
