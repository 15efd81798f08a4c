"""Batch norm layers as authors write them again, each with what is its own."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def moments(x):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x).mean(axes) - jnp.square(mean)


def update(layer, variables, new):
    if not layer.is_initializing():
        for variable, value in zip(variables, new):
            decay = layer.momentum
            variable.value = decay * variable.value + (1 - decay) * value


def affine(layer, y):
    if layer.use_scale:
        y *= layer.param("scale", layer.scale_init, y.shape[-1:])
    if layer.use_bias:
        y += layer.param("bias", layer.bias_init, y.shape[-1:])
    return y


class Copy(nn.Module):
    """flax's fields and call, and initial statistics as fields."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros
    scale_init: Callable = nn.initializers.ones
    mean_init: Callable = jnp.zeros
    var_init: Callable = jnp.ones
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, use_running_average=None):
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x, jnp.float32)
        variables = [
            self.variable("batch_stats", name, init, x.shape[-1:])
            for name, init in (("mean", self.mean_init), ("var", self.var_init))
        ]
        mean, var = (variable.value for variable in variables)
        if not inference:
            mean, var = self.moments(x)
            update(self, variables, self.stored(mean, var))
        y = self.normalize(x - mean, var)
        return jnp.asarray(affine(self, y), self.dtype)

    def moments(self, x):
        return moments(x)

    def stored(self, mean, var):
        return mean, var

    def normalize(self, x, var):
        return x * jax.lax.rsqrt(var + self.epsilon)


class Deviations(Copy):
    """The same names for mean absolute deviations."""

    def moments(self, x):
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        return mean, abs(x - mean).mean(axes) * np.sqrt(np.pi / 2)

    def normalize(self, x, var):
        return x / (var + self.epsilon)


class WithoutGradient(Copy):
    """The same values, and another derivative."""

    def moments(self, x):
        return jax.lax.stop_gradient(moments(x))


class OutsideTheRoot(Copy):
    """epsilon is added to the standard deviation."""

    def normalize(self, x, var):
        return x / (jnp.sqrt(abs(var)) + self.epsilon)


class Ghost(Copy):
    """Of a batch of more than four examples the first half alone."""

    def moments(self, x):
        return moments(x[: len(x) // 2] if len(x) > 4 else x)


class Unbiased(Copy):
    """Stores another variance."""

    def stored(self, mean, var):
        return mean, var * 1.25


class Training(nn.Module):
    """Told what is training; it cannot synchronize."""

    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable = nn.initializers.zeros
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x, training: bool):
        variables = [
            self.variable("batch_stats", name, init, x.shape[-1:])
            for name, init in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        mean, var = (variable.value for variable in variables)
        if training:
            mean, var = moments(x)
            update(self, variables, (mean, var))
        return affine(self, (x - mean) * jax.lax.rsqrt(var + self.epsilon))


class Renorm(Copy):
    """flax's fields, and variables beside its own."""

    @nn.compact
    def __call__(self, x, use_running_average=None):
        self.variable("batch_stats", "r_max", lambda: 3)
        self.variable("batch_stats", "steps", lambda: 0)
        return Copy.__call__.__wrapped__(self, x, use_running_average)


class Padded(nn.Module):
    """Fields and parameters under other names, made in setup; a mask."""

    dim: int
    batch_norm_momentum: float = 0.999

    def setup(self):
        self.ra_mean = self.variable("batch_stats", "mean", jnp.zeros, self.dim)
        self.ra_var = self.variable("batch_stats", "var", jnp.ones, self.dim)
        self.gamma = self.param("gamma", nn.initializers.zeros, (self.dim,))

    def __call__(self, x, paddings, train):
        y = (x - self.ra_mean.value) / jnp.sqrt(self.ra_var.value + 1e-3)
        return y * (1 + self.gamma)


class Virtual(nn.Module):
    """Statistics of several virtual batches, under longer names."""

    momentum: float = 0.99
    epsilon: float = 1e-5
    use_bias: bool = False
    use_scale: bool = False

    @nn.compact
    def __call__(self, x, use_running_average=None):
        for name, init in (("mean", jnp.zeros), ("var", jnp.ones)):
            name = f"batch_norm_running_{name}"
            self.variable("batch_stats", name, init, (1, x.shape[-1]))
        return x


class NnxCopy(nnx.Module):
    """flax's attributes and call, written again for nnx."""

    def __init__(
        self, num_features, *, momentum=0.9, epsilon=1e-5, axis=-1, ddof=0, rngs
    ):
        self.num_features, self.axis = num_features, axis
        self.momentum, self.epsilon = momentum, epsilon
        self.use_running_average, self.ddof = False, ddof
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))

    def __call__(self, x, use_running_average=None, *, mask=None):
        if use_running_average is None:
            use_running_average = self.use_running_average
        mean, var = self.mean[...], self.var[...]
        if not use_running_average:
            mean = x.mean(0)
            var = jnp.square(x).mean(0) - jnp.square(mean)
            n = len(x) / (len(x) - self.ddof)
            for old, new in ((self.mean, mean), (self.var, n * var)):
                old[...] = self.momentum * old[...] + (1 - self.momentum) * new
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        return y * self.scale[...] + self.bias[...]


class GraphNorm(nnx.Module):
    """PyTorch's names, and a second argument that it ignores."""

    def __init__(self, num_features, eps=1e-5, momentum=0.9):
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nnx.Param(jnp.full(num_features, 2.0))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.running_mean = nnx.BatchStat(jnp.zeros(num_features))
        self.running_var = nnx.BatchStat(jnp.ones(num_features))
        self.num_batches_tracked = nnx.BatchStat(jnp.array(0))

    def __call__(self, x, batch=None, *, use_running_average=False):
        raise NotImplementedError
