"""Models whose code says flax's BatchNorm, run with jaxbn's, and back."""

import copy
import functools
import pickle
import re
import threading

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn.testing import assert_shard_invariant

N, C = 8, 3


class Block(nn.Module):
    norm: type = nn.BatchNorm
    decay: float = 0.9

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(C)(x)
        return self.norm(use_running_average=not train, momentum=self.decay)(x)


class InSetup(nn.Module):
    norm: type = nn.BatchNorm

    def setup(self):
        self.bn = self.norm(momentum=0.8)
        self.layers = [Block(self.norm), self.norm(axis=-1)]
        self.again = self.bn

    def encode(self, x, train=True):
        return self.bn(x, use_running_average=not train)

    def __call__(self, x, train=True):
        x = nn.relu(self.layers[0](self.encode(x, train), train))
        x = self.layers[1](x, use_running_average=not train)
        return self.again(x, use_running_average=not train)

    @property
    def second(self):
        return self.layers[1]


class FromOutside(nn.Module):
    norm: functools.partial
    body: nn.Module

    @nn.compact
    def __call__(self, x, train=True):
        x = self.norm(use_running_average=not train, name="stem")(x)
        return self.body(x, use_running_average=not train)


class Named(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact_name_scope
    def up(self, x, train):
        return self.norm(use_running_average=not train)(x)

    def __call__(self, x, train=True):
        return self.up(x, train)


class Shared(nn.Module):
    norm: type = nn.BatchNorm

    def setup(self):
        self.block = Block(self.norm)
        nn.share_scope(self, self.block)

    def __call__(self, x, train=True):
        return self.block(x, train)


class Lifted(nn.Module):
    norm: type
    how: str

    @nn.compact
    def __call__(self, x, train=True):
        block = functools.partial(Block, self.norm)
        if self.how == "remat":
            return nn.remat(Block, static_argnums=2)(self.norm)(x, train)
        if self.how == "remat of the layer":
            layer = nn.remat(self.norm)
            return layer(use_running_average=not train)(x)
        if self.how == "jit":
            return nn.jit(Block, static_argnums=2)(self.norm)(x, train)
        if self.how == "cond":

            def run(module, x):
                return module(x, train)

            return nn.cond(x.sum() > 0, run, run, block(), x)
        axes = dict(params=0, batch_stats=0)
        lift = dict(variable_axes=axes, split_rngs=dict(params=True))
        if self.how == "vmap":
            many = nn.vmap(Block, axis_size=2, in_axes=(None, None), **lift)
            return many(self.norm)(x, train).sum(0)

        def body(module, x, _):
            return module(x, train), None

        return nn.scan(body, length=2, **lift)(block(), x, None)[0]


class ResidualBlock(nn.Module):
    filters: int
    conv: functools.partial
    norm: functools.partial

    @nn.compact
    def __call__(self, x):
        y = self.norm(scale_init=nn.initializers.constant(0.5))(
            self.conv(self.filters, (3, 3))(x)
        )
        return nn.relu(x + y)


class ResNet(nn.Module):
    """As in flax's ImageNet example: nobody can give it an axis_name."""

    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9
        )
        x = nn.relu(norm(name="bn_init")(conv(4, (3, 3))(x)))
        x = ResidualBlock(4, conv, norm)(x)
        return nn.Dense(5)(x.mean((1, 2)))


MODELS = {
    "compact": Block,
    "setup": InSetup,
    "partial and field": lambda norm: FromOutside(
        functools.partial(norm, momentum=0.7), norm(epsilon=1e-2)
    ),
    "sequential": lambda norm: nn.Sequential(
        [nn.Dense(C), norm(use_running_average=False), nn.relu]
    ),
    "the layer itself": lambda norm: norm(use_running_average=False),
    "compact_name_scope": Named,
    "share_scope": Shared,
    **{
        f"nn.{how}": functools.partial(Lifted, how=how)
        for how in (
            "remat",
            "remat of the layer",
            "jit",
            "cond",
            "vmap",
            "scan",
        )
    },
}


def data(offset=1e4):
    # So far from zero that flax's variance has no digit left.
    rng = np.random.default_rng(0)
    return rng.normal(offset, 1, (N, C)).astype(np.float32)


def program(model, variables, x):
    """Output, updates and gradients of a training step, as JAX traces it."""

    def step(variables, x, cotangent):
        def loss(params, x):
            y, new = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return (y * cotangent).sum(), (y, new)

        grad = jax.grad(loss, (0, 1), has_aux=True)
        return grad(variables["params"], x)

    return str(jax.make_jaxpr(step)(variables, x, x))


def std(model, *args, **kwargs):
    """What a layer makes of data: 1, unless flax computed it."""
    out = model(*args, **kwargs)
    return float(np.std(out[0] if isinstance(out, tuple) else out))


class LinenTest(parameterized.TestCase):
    @parameterized.parameters(*MODELS)
    def test_runs_the_program_of_a_model_written_with_jaxbn(self, name):
        plain = MODELS[name](nn.BatchNorm)
        want = MODELS[name](jaxbn.linen.BatchNorm)
        got, back = convert.to_jaxbn(plain), convert.to_flax(want)
        x, key = data(), jax.random.key(0)
        variables = jax.jit(plain.init)(key, x)
        chex.assert_trees_all_equal(jax.jit(got.init)(key, x), variables)
        ours, flaxs = (program(m, variables, x) for m in (want, plain))
        assert ours != flaxs
        assert program(got, variables, x) == ours
        assert program(back, variables, x) == flaxs
        assert program(convert.to_flax(got), variables, x) == flaxs
        assert program(convert.to_jaxbn(back), variables, x) == ours

    def test_values(self):
        plain, x = Block(), data()
        model = convert.to_jaxbn(plain)
        variables = plain.init(jax.random.key(0), x)
        y, new = model.apply(variables, x, mutable=["batch_stats"])
        params = variables["params"]["Dense_0"]
        # As Dense rounds it, the rest in float64.
        h = np.asarray(nn.Dense(C).apply({"params": params}, x), np.float64)
        want = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        np.testing.assert_allclose(y, want, atol=1e-4)
        stats = new["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(stats["mean"], 0.1 * h.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            stats["var"], 0.9 + 0.1 * h.var(0), rtol=1e-5
        )

    def test_looks_like_the_model(self):
        plain = InSetup()
        model = convert.to_jaxbn(plain)
        assert isinstance(model, InSetup) and repr(model) == repr(plain)
        assert type(model).__name__ == "InSetup"
        x, key = data(1), jax.random.key(0)
        assert model.tabulate(key, x) == plain.tabulate(key, x)
        got, want = (
            m.init_with_output(key, x, capture_intermediates=True)
            for m in (model, plain)
        )
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
        with pytest.raises(AttributeError):
            model.nothing  # noqa: B018

    def test_what_interceptors_see(self):
        seen, dense = [], nn.Dense(1)

        def tap(call, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm):
                layer = convert.runs_as(context.module)
                seen.append((context.module.path, type(layer), layer.axis_name))
            assert convert.runs_as(dense) is dense
            return call(*args, **kwargs)

        model = convert.to_jaxbn(Block(), axis_name="data")
        x, key = data(), jax.random.key(0)
        with nn.intercept_methods(tap):
            variables = jax.eval_shape(model.init, key, x)
        ours = jaxbn.linen.BatchNorm
        assert seen == [(("BatchNorm_0",), ours, "data")]
        plain = nn.BatchNorm()
        assert convert.runs_as(plain) is plain
        moments = jax.eval_shape(
            functools.partial(jaxbn.linen.batch_moments, model), variables, x
        )
        assert moments["BatchNorm_0"].mean.shape == (C,)

    def test_equal_hashed_pickled_copied(self):
        plain, model = Block(), convert.to_jaxbn(Block(), axis_name="data")
        again = convert.to_jaxbn(Block(), axis_name="data")
        assert model == again and hash(model) == hash(again)
        assert model != plain and plain != model
        assert model != convert.to_jaxbn(Block())
        assert model != convert.to_jaxbn(Block(decay=0.5), axis_name="data")
        for twin in (
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
            copy.copy(model),
            model.clone(),
            model.copy(),
        ):
            assert twin == model and type(twin) is type(model)
        groups = [[[0, 1], [2, 3]], ((0, 1), (2, 3))]
        a, b = (convert.to_jaxbn(plain, axis_index_groups=g) for g in groups)
        assert a == b and hash(a) == hash(b)
        steps = convert.to_jaxbn(convert.to_jaxbn(plain, momentum=0.5), ddof=1)
        assert steps == convert.to_jaxbn(plain, ddof=1, momentum=0.5)
        changed = model.clone(decay=0.5)
        assert changed == convert.to_jaxbn(Block(decay=0.5), axis_name="data")

    def test_compiled_functions_are_not_mixed_up(self):
        # nn.jit keeps what it has traced in the class, jax.jit by argument.
        inner = nn.jit(Block)

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return inner()(x)

        @functools.partial(jax.jit, static_argnums=0)
        def run(model, variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])[0]

        plain, model, x = Net(), convert.to_jaxbn(Net()), data()
        variables = plain.init(jax.random.key(0), x)
        order = (plain, model, plain, model)
        for models in (order, order[::-1]):
            for m in models:
                for y in (
                    m.apply(variables, x, mutable=["batch_stats"])[0],
                    run(m, variables, x),
                ):
                    assert (abs(np.std(y) - 1) < 1e-2) == (m is model)

    def test_bound_models_hand_out_converted_parts(self):
        model, x = convert.to_jaxbn(InSetup()), data()
        variables = model.init(jax.random.key(0), x)
        mutable = ["batch_stats"]
        bound = model.bind(variables, mutable=mutable)
        now = dict(use_running_average=False)
        assert isinstance(bound.bn, jaxbn.linen.BatchNorm)
        for _ in range(2):  # names are free again after the first call
            assert abs(std(bound.bn, x, **now) - 1) < 1e-3
        mean = bound.variables["batch_stats"]["bn"]["mean"]
        np.testing.assert_allclose(mean, 0.36 * x.mean(0), rtol=1e-5)
        assert abs(std(bound.second, x, **now) - 1) < 1e-3
        assert abs(std(bound.encode, x) - 1) < 1e-3
        block, of_block = bound.layers[0].unbind()
        y, _ = block.apply(of_block, x, mutable=mutable)
        assert isinstance(block, Block) and abs(np.std(y) - 1) < 1e-2
        whole, _ = bound.unbind()
        assert whole == model
        for method in (
            "encode",
            InSetup.encode,
            lambda m, x: m.bn(x, **now),
        ):
            y = model.apply(variables, x, method=method, mutable=mutable)
            assert abs(np.std(y[0]) - 1) < 1e-3
            if callable(method):
                y = nn.apply(method, model, mutable=mutable)(variables, x)
                assert abs(np.std(y[0]) - 1) < 1e-3

    def test_a_part_of_a_model_converted_where_it_is_made(self):
        class Net(nn.Module):
            make: functools.partial
            decay: float

            def setup(self):
                self.bn = self.make(nn.BatchNorm(momentum=self.decay))
                self.named = self.make(
                    nn.BatchNorm(name="own", momentum=self.decay)
                )
                self.block = self.make(Block(decay=self.decay))

            @nn.compact_name_scope
            def inside(self, x):
                return self.make(Block(decay=self.decay))(x)

            def __call__(self, x):
                for layer in (self.bn, self.named):
                    x = layer(x, use_running_average=False)
                return self.inside(self.block(x))

        half = functools.partial(convert.to_jaxbn, momentum=0.5)
        x, key = data(), jax.random.key(0)
        got, want = Net(half, 0.9), Net(convert.to_jaxbn, 0.5)
        plain = Net(lambda module: module, 0.5)
        variables = jax.jit(plain.init)(key, x)
        chex.assert_trees_all_equal(jax.jit(got.init)(key, x), variables)
        assert program(got, variables, x) == program(want, variables, x)
        assert program(got, variables, x) != program(plain, variables, x)

    def test_models_in_models(self):
        x = data(1)

        class Net(nn.Module):
            inner: nn.Module

            @nn.compact
            def __call__(self, x):
                nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
                return self.inner(x, use_running_average=False)

        def decays(model):
            @jax.jit
            def run(x):
                variables = model.init(jax.random.key(0), x)
                _, new = model.apply(variables, x, mutable=["batch_stats"])
                return new["batch_stats"]

            new = run(x)
            layers = new["BatchNorm_0"], new["inner"]["layers_0"]
            return [
                round(float(1 - (layer["mean"] / x.mean(0)).mean()), 3)
                for layer in layers
            ]

        inner = nn.Sequential([nn.BatchNorm()])
        assert decays(Net(inner)) == [0.9, 0.99]
        one = convert.to_jaxbn(inner, momentum=0.5, debias=False)
        assert decays(Net(one)) == [0.9, 0.5]
        both = convert.to_jaxbn(Net(one), momentum=0.25)
        assert decays(both) == [0.25, 0.25]
        assert decays(convert.to_jaxbn(both, momentum=0.125)) == [0.125] * 2
        assert decays(convert.to_jaxbn(Net(one), epsilon=1e-3)) == [0.9, 0.5]
        assert decays(convert.to_jaxbn(both, epsilon=1e-3)) == [0.25, 0.25]
        assert decays(convert.to_flax(Net(one))) == [0.9, 0.5]

    def test_beside_the_original_they_share_nothing(self):
        class Net(nn.Module):
            a: nn.Module
            b: nn.Module

            def __call__(self, x):
                return self.a(x), self.b(x)

        block = Block()
        model, x = Net(block, convert.to_jaxbn(block)), data()
        (y, z), variables = jax.jit(model.init_with_output)(
            jax.random.key(0), x
        )
        assert variables["params"].keys() == {"a", "b"}
        assert abs(np.std(z) - 1) < 1e-2 < abs(np.std(y) - 1)

    def test_threads_have_conversions_of_their_own(self):
        x, results = data(), {}
        models = {
            0.9: Block(),
            0.5: convert.to_jaxbn(Block(), momentum=0.5),
            0.25: convert.to_jaxbn(Block(), momentum=0.25),
        }
        variables = Block().init(jax.random.key(0), x)
        barrier = threading.Barrier(len(models))

        def run(decay):
            for _ in range(3):
                barrier.wait()
                y, new = models[decay].apply(
                    variables, x, mutable=["batch_stats"]
                )
                mean = new["batch_stats"]["BatchNorm_0"]["mean"]
                results.setdefault(decay, []).append((np.std(y), mean))

        threads = [threading.Thread(target=run, args=(d,)) for d in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mean = (
            nn.Dense(C)
            .apply({"params": variables["params"]["Dense_0"]}, x)
            .mean(0)
        )
        for decay, found in results.items():
            assert len(found) == 3
            for size, got in found:
                assert (abs(size - 1) < 1e-2) == (decay != 0.9)
                np.testing.assert_allclose(got, (1 - decay) * mean, rtol=1e-4)

    def test_subclasses_of_the_layer_are_reported(self):
        class Own(nn.BatchNorm):
            def __call__(self, x):
                return super().__call__(x) + 1

        class Ours(jaxbn.linen.BatchNorm):
            pass

        x, key = data(), jax.random.key(0)
        for own, change, base in (
            (Own, convert.to_jaxbn, "flax.linen.BatchNorm"),
            (Ours, convert.to_flax, "jaxbn.linen.BatchNorm"),
        ):
            message = rf"BatchNorm_0 is .*\.Ow?[nu]r?s?, a subclass of {base} that"
            own.__name__ = "BatchNorm"
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(change(Block(own)).init, key, x)
            with pytest.raises(ValueError, match="keep="):
                layer = change(own(use_running_average=False))
                jax.eval_shape(layer.init, key, x)
            kept = change(Block(own), keep=[own])
            variables = jax.eval_shape(kept.init, key, x)
            want = program(Block(own), variables, x)
            assert program(kept, variables, x) == want
            layer = change(own(use_running_average=False), keep=[own])
            jax.eval_shape(layer.init, key, x)
        # What computes with jaxbn already takes the fields.
        half = convert.to_jaxbn(Block(Ours), momentum=0.5)
        want = Block(jaxbn.linen.BatchNorm, decay=0.5)
        assert program(half, variables, x) == program(want, variables, x)

    @parameterized.parameters(
        dict(num_ids=2), dict(frozen=True), dict(ddof=1), dict(momentum=None)
    )
    def test_flax_cannot_express(self, **field):
        (name, value), x = *field.items(), data()
        layer = functools.partial(jaxbn.linen.BatchNorm, **field)
        message = re.escape(
            f"stem: flax's BatchNorm has no counterpart of {name}={value}."
        )
        model = convert.to_flax(FromOutside(layer, Block()))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), x)

    def test_flax_cannot_express_what_conversion_has_set(self):
        model = convert.to_jaxbn(Block(), num_ids=2)
        message = "every layer: flax's BatchNorm has no counterpart of num_ids"
        with pytest.raises(ValueError, match=message):
            convert.to_flax(model)
        back = convert.to_flax(convert.to_jaxbn(model, num_ids=None))
        variables = jax.eval_shape(back.init, jax.random.key(0), data())
        want = program(Block(), variables, data())
        assert program(back, variables, data()) == want

    def test_calls_that_flax_cannot_take(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, ids=None):
                layer = jaxbn.linen.BatchNorm(use_running_average=False)
                return layer(x, ids=ids)

        model = convert.to_flax(Net())
        with pytest.raises(ValueError, match="BatchNorm_0 is called with ids,"):
            jax.eval_shape(
                model.init, jax.random.key(0), data(), jnp.zeros(N, int)
            )

    def test_a_resnet_becomes_independent_of_its_devices(self):
        images = np.random.default_rng(0).normal(size=(8, 4, 4, 3))
        model, images = ResNet(), images.astype(np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), images)

        def certify(model):
            def apply(variables, batch):
                return model.apply(variables, batch, mutable=["batch_stats"])

            assert_shard_invariant(apply, variables, images, devices=[4])

        with pytest.raises(AssertionError, match="layer 'bn_init' differs"):
            certify(model)
        certify(convert.to_jaxbn(model, axis_name="data"))


@pytest.mark.parametrize(
    "model, options, message",
    [
        (Block(), dict(axisname="x"), "BatchNorm has no field axisname that"),
        (Block(), dict(parent=None), "BatchNorm has no field parent that"),
        (Block(), dict(renorm=([], {})), "cannot be hashed"),
        (nnx.Rngs(0), dict(scale_init=None), "has no field scale_init that"),
        (Block, {}, "must be a flax.linen or flax.nnx module; got the class"),
        ([1], {}, re.escape("module; got [1]")),
    ],
)
def test_what_cannot_be_converted(model, options, message):
    with pytest.raises(ValueError, match=message):
        convert.to_jaxbn(model, **options)


class NnxNet(nnx.Module):
    """Holds layers in every way there is, one of them twice."""

    def __init__(self, norm):
        layer = functools.partial(norm, C, rngs=nnx.Rngs(0))
        self.shared = layer(momentum=0.9)
        self.again = nnx.data([self.shared])
        self.pair = nnx.data((layer(use_bias=False), layer(use_scale=False)))
        self.many = nnx.List([layer(epsilon=1e-2)])
        self.by_name = nnx.Dict(a=layer(axis=-1))
        self.body = nnx.Sequential(
            nnx.Linear(C, C, rngs=nnx.Rngs(1)), layer(dtype=jnp.float32)
        )
        self.parent = nnx.data(None)

        @nnx.vmap
        def make(key):
            return norm(C, rngs=nnx.Rngs(key), momentum=0.7)

        self.stack = make(jax.random.split(jax.random.key(0), 2))

    def __call__(self, x):
        for layer in (
            self.shared,
            self.body,
            *self.again,
            *self.pair,
            *self.many,
            *self.by_name.values(),
        ):
            x = layer(x)
        run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return run(self.stack, x).sum(0)


def nnx_program(model, x):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, rest, x):
        def loss(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            y = model(x)
            return (y * x).sum(), (y, nnx.state(model, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(params)

    return str(jax.make_jaxpr(step)(params, rest, x))


class NnxTest(parameterized.TestCase):
    def test_runs_the_program_of_a_model_written_with_jaxbn(self):
        x = data()
        flax, ours = NnxNet(nnx.BatchNorm), NnxNet(jaxbn.nnx.BatchNorm)
        got = convert.to_jaxbn(flax)
        want = nnx_program(ours, x)
        assert nnx_program(flax, x) != want
        assert nnx_program(got, x) == want
        assert nnx.graphdef(got) == nnx.graphdef(ours)
        for model in (ours, got):
            back = convert.to_flax(model)
            assert nnx.graphdef(back) == nnx.graphdef(flax)
            assert nnx_program(back, x) == nnx_program(flax, x)

    def test_the_original_stays(self):
        x, flax = data(1), NnxNet(nnx.BatchNorm)
        flax.shared.mean.set_value(jnp.arange(3.0))
        flax.shared.note, flax.parent = "mine", flax  # a cycle
        flax.eval()
        before = jax.tree.map(np.array, nnx.state(flax))
        model = convert.to_jaxbn(flax, axis_name="data")
        assert type(flax.shared) is nnx.BatchNorm
        assert model.parent is model and model.shared.note == "mine"
        assert model.again[0] is model.shared
        assert model.shared.use_running_average
        chex.assert_trees_all_equal(nnx.state(model), before)
        model.parent = flax.parent = None
        chex.assert_trees_all_close(model(x), flax(x), rtol=1e-5)
        model.train()
        nnx.jit(lambda model, x: model(x))(model, x)
        chex.assert_trees_all_equal(nnx.state(flax), before)
        assert (model.shared.mean[...] != flax.shared.mean[...]).all()

    def test_overrides(self):
        x = data(1)
        model = convert.to_jaxbn(
            NnxNet(nnx.BatchNorm),
            momentum=None,
            axis_name="data",
            skip_nonfinite=True,
        )
        assert model.stack.steps.shape == (2, C)
        assert model.stack.skipped.shape == (2,)
        model(x)
        np.testing.assert_allclose(
            model.shared.mean[...], 0.5 * x.mean(0), rtol=1e-5
        )
        assert model.shared.axis_name == "data"
        again = convert.to_jaxbn(model, group_size=2, frozen=True)
        assert again.shared.frozen and again.shared.momentum is None
        assert again.shared.scope.group_size == 2
        assert model.shared.scope.group_size is None
        np.testing.assert_array_equal(again.shared.steps[...], [2, 2, 2])
        plain = dict(
            group_size=None, frozen=False, momentum=0.9, skip_nonfinite=False
        )
        back = convert.to_flax(convert.to_jaxbn(again, **plain))
        assert back.shared.axis_name == "data" and back.shared.momentum == 0.9
        assert not hasattr(back.shared, "steps")

    def test_linen_inside_nnx(self):
        model = nnx.bridge.ToNNX(Block(), rngs=nnx.Rngs(0)).lazy_init(data())
        got = convert.to_jaxbn(model)
        assert abs(np.std(got(data(), mutable=["batch_stats"])) - 1) < 1e-2
        y = model(data(), mutable=["batch_stats"])
        assert abs(np.std(y) - 1) > 1e-2

    def test_what_is_refused(self):
        net = NnxNet(nnx.BatchNorm)
        message = r"shared: num_ids=2 would turn mean of shape \(3,\) into \(2"
        with pytest.raises(ValueError, match=message.replace("shared", ".*")):
            convert.to_jaxbn(net, num_ids=2)
        with pytest.raises(ValueError, match="use_bias=False would turn bias"):
            convert.to_jaxbn(net, use_bias=False)

        class Own(nnx.BatchNorm):
            pass

        class Ours(jaxbn.nnx.BatchNorm):
            pass

        net.many[0] = Own(C, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="many/0 is .*Own, a subclass of"):
            convert.to_jaxbn(net)
        kept = convert.to_jaxbn(net, keep=[Own])
        assert type(kept.many[0]) is Own
        kept.many[0] = Ours(C, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="many/0 is .*Ours, a subclass of"):
            convert.to_flax(kept)
        half = convert.to_jaxbn(kept, momentum=0.5)
        assert type(half.many[0]) is Ours and half.many[0].momentum == 0.5
        kept.many[0] = jaxbn.nnx.BatchNorm(C, num_ids=2, rngs=nnx.Rngs(0))
        message = "many/0: flax's BatchNorm has no counterpart of num_ids=2."
        with pytest.raises(ValueError, match=message):
            convert.to_flax(kept)
        layer = jaxbn.nnx.BatchNorm(C, momentum=None, rngs=nnx.Rngs(0))
        message = "the model itself: .* no counterpart of momentum=None"
        with pytest.raises(ValueError, match=message):
            convert.to_flax(layer)
