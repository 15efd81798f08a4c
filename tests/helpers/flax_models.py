"""Models whose code says flax's BatchNorm, and what one asks of them."""

import functools

import flax.linen as nn
import jax
import numpy as np

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
