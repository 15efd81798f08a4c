"""Networks and whole training steps for an accelerator."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn
import jaxbn.remat
from tests.bench import measure
from train.norms import NORMS
from train.resnet18 import ResNet18

GIB = 2**30


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], (1, 1), strides=self.stride)(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 of ImageNet, with 53 norms of 26,560 channels together.

    Attributes:
      num_classes: length of the logits.
      norm: what makes a layer, given use_running_average and dtype.
      stages: blocks of each; (3, 4, 6, 3) for 50 layers.
      width: of the first stage's inner convolutions.
      policy: of jax.checkpoint around each block; None is without.
      dtype: of the computation; parameters are float32.

    Source: He et al. (2015), Table 1; the stride on the 3x3 convolution, as
    torchvision has it.
    """

    num_classes: int
    norm: Any
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    policy: Any = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.norm, use_running_average=not train, dtype=self.dtype
        )
        block = Bottleneck
        if self.policy is not None:
            block = nn.remat(block, policy=self.policy)
        x = conv(self.width, (7, 7), strides=2, padding=3)(x)
        x = nn.relu(norm()(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if stage and not i else 1
                x = block(self.width * 2**stage, stride, conv, norm)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))
        return x.astype(jnp.float32)


class Network(NamedTuple):
    """One network at one size; build takes a norm's name and a policy."""

    name: str
    images: tuple[int, int, int, int]
    classes: int
    bottleneck: bool
    width: int = 64
    stages: tuple[int, ...] = (3, 4, 6, 3)  # of bottlenecks

    def build(
        self, norm: str, dtype: str = "bfloat16", policy: Any = None
    ) -> nn.Module:
        fields = {
            "num_classes": self.classes,
            "width": self.width,
            "norm": NORMS[norm],
            "dtype": jnp.dtype(dtype),
        }
        if not self.bottleneck:
            return ResNet18(**fields)
        return ResNet50(stages=self.stages, policy=policy, **fields)


LARGE = (
    Network("ResNet-50", (256, 224, 224, 3), 1000, bottleneck=True),
    Network("ResNet-18 (CIFAR)", (1024, 32, 32, 3), 10, bottleneck=False),
)
QUICK = (Network("one bottleneck", (4, 16, 16, 3), 10, True, 4, (1,)),)


class Run:
    """What every section is given: the sizes, the clock and a deadline."""

    def __init__(
        self, *, quick: bool, seconds: float, trace: str | None = None
    ):
        self.quick = quick
        self.on_cpu = jax.default_backend() == "cpu"
        self.networks = QUICK if quick else LARGE
        self.trace = trace
        self.deadline = time.perf_counter() + seconds

    def over(self) -> bool:
        """Whether the section's time is spent."""
        return time.perf_counter() > self.deadline

    def time(
        self, calls: dict[str, Callable[[], Any]], rounds: int = 10
    ) -> dict[str, np.ndarray]:
        """Seconds a call, (rounds,), interleaved, several queued at a time."""
        if self.quick:
            return measure.interleaved(calls, rounds=2)
        slowest = 0.0
        for call in calls.values():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            slowest = max(slowest, time.perf_counter() - start)
        repeat = int(min(max(0.05 / slowest, 1), 50))
        return measure.interleaved(calls, rounds=rounds, repeat=repeat)


def short(error: Exception) -> str:
    """Returns an error in a few words."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[
        :100
    ]


class Steps:
    """Takes one training step at each call, from where the last one ended.

    Forward, backward and SGD with momentum on one device; images are of the
    computation's dtype and stay on it. The learning rate is so small that a
    net without a norm stays finite.

    Attributes:
      temp: bytes of XLA's temporary memory.
      total: these, arguments and results that are no arguments.
      compiled: the program.
    """

    def __init__(
        self,
        network: Network,
        norm: str,
        *,
        dtype: str = "bfloat16",
        batch: int | None = None,
        policy: Any = None,
    ):
        model = network.build(norm, dtype, policy)
        optimizer = optax.sgd(1e-6, momentum=0.9)
        size = batch or network.images[0]
        images = (size, *network.images[1:])

        def step(state, images, labels):
            params, stats, momentum = state

            def loss(params):
                logits, new = model.apply(
                    {"params": params, "batch_stats": stats},
                    images,
                    train=True,
                    mutable=["batch_stats"],
                )
                wanted = optax.softmax_cross_entropy_with_integer_labels
                return wanted(logits, labels).mean(), new.get("batch_stats", {})

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
                params
            )
            moved, momentum = optimizer.update(grads, momentum, params)
            return (optax.apply_updates(params, moved), stats, momentum), value

        def abstract(key):
            x = jnp.zeros((1, *images[1:]), dtype)
            variables = model.init(key, x, train=False)
            params, stats = (
                variables.get(kind, {}) for kind in ("params", "batch_stats")
            )
            return params, stats, optimizer.init(params)

        self._state = jax.eval_shape(abstract, jax.random.key(0))
        self._images = jax.ShapeDtypeStruct(images, dtype)
        self._labels = jax.ShapeDtypeStruct((size,), jnp.int32)
        self._started = False
        self.size = size
        self.compiled = (
            jax.jit(step, donate_argnums=0)
            .lower(self._state, self._images, self._labels)
            .compile()
        )
        memory = self.compiled.memory_analysis()
        self.temp = memory.temp_size_in_bytes
        self.total = (
            self.temp
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def _start(self) -> None:
        rng = np.random.default_rng(0)

        def draw(path, leaf):
            if leaf.ndim > 1:  # kernels, as He et al. draw them
                fan_in = math.prod(leaf.shape[:-1])
                values = rng.standard_normal(leaf.shape, np.float32)
                return jnp.asarray(values * (2 / fan_in) ** 0.5, leaf.dtype)
            one = path[-1].key in ("scale", "var")
            return jnp.full(leaf.shape, float(one), leaf.dtype)

        params, stats, momentum = self._state
        params, stats = (
            jax.tree_util.tree_map_with_path(draw, t) for t in (params, stats)
        )
        momentum = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), momentum
        )
        self._state = params, stats, momentum
        shape, dtype = self._images.shape, self._images.dtype
        self._images = jax.random.normal(jax.random.key(0), shape, dtype)
        self._labels = jnp.arange(self.size) % 10
        self._started = True

    def __call__(self) -> jax.Array:
        if not self._started:
            self._start()
        self._state, value = self.compiled(
            self._state, self._images, self._labels
        )
        return value


@functools.cache
def steps(network: Network, variant: str) -> Steps:
    """Returns the steps of one of VARIANTS, compiled once for all sections."""
    return Steps(network, **VARIANTS[variant])


VARIANTS: dict[str, dict[str, Any]] = {
    "jaxbn": {"norm": "jaxbn"},
    "flax": {"norm": "flax"},
    "none": {"norm": "none"},
    "jaxbn, recomputed": {"norm": "jaxbn", "policy": jaxbn.remat.policy()},
}
