"""A training step on an accelerator, with one norm or another."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn.remat
from jaxbn import _passes
from tests.bench.gpu_nets import Network
from tests.bench.gpu_run import together

GIB = 2**30


class Steps:
    """Takes a training step at each call, from where the last one ended.

    Forward, backward and SGD with momentum on one device; images are of the
    computation's dtype and stay on it. The learning rate is so small that a
    net without a norm stays finite. With loop a call is so many steps, in one
    program.

    Attributes:
      lowered: the program before `compile`, which has to be called first.
      compiled: the program.
      temp: bytes of XLA's temporary memory.
      total: these, arguments and results that are no arguments.
    """

    def __init__(
        self,
        network: Network,
        norm: str,
        *,
        dtype: str = "bfloat16",
        batch: int | None = None,
        policy: Any = None,
        loop: int | None = None,
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
        program = step if loop is None else functools.partial(_many, step, loop)
        self.lowered = jax.jit(program, donate_argnums=0).lower(
            self._state, self._images, self._labels
        )

    def compile(self) -> Steps:
        self.compiled = self.lowered.compile()
        memory = self.compiled.memory_analysis()
        self.temp = memory.temp_size_in_bytes
        self.total = (
            self.temp
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        return self

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


def _many(step: Callable[..., Any], loop: int, state, images, labels):
    state, values = jax.lax.scan(
        lambda state, _: step(state, images, labels), state, length=loop
    )
    return state, values[-1]


@contextlib.contextmanager
def _changed_core(variant: str) -> Iterator[None]:
    """Traces jaxbn's layers in another way for the variants of _CHANGED.

    "conditional" takes its shift from the running mean, and a second pass if
    sums cancel, as on TPUs. "one pass" leaves that pass out. It is no batch
    norm to train with, and shows what exactness costs.
    """
    if variant not in _CHANGED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        jax.clear_caches()
        patch.setattr(_passes, "_about_sample", _passes._about_shift)
        if variant == "jaxbn, one pass":
            # Known while compiling, so that no conditional is left.
            never = jnp.zeros((), bool)
            patch.setattr(_passes, "_cancels", lambda found, epsilon: never)
        yield
    jax.clear_caches()


VARIANTS: dict[str, dict[str, Any]] = {
    "jaxbn": {"norm": "jaxbn"},
    "flax": {"norm": "flax"},
    "flax stable": {"norm": "flax stable"},
    "none": {"norm": "none"},
    "jaxbn, recomputed": {"norm": "jaxbn", "policy": jaxbn.remat.policy()},
    "jaxbn, conditional": {"norm": "jaxbn"},
    "jaxbn, one pass": {"norm": "jaxbn"},
}
_CHANGED = ("jaxbn, conditional", "jaxbn, one pass")

_compiled: dict[tuple[Any, ...], Steps] = {}


def compile_all(
    networks: Sequence[Network], variants: Sequence[str], **options: Any
) -> dict[tuple[Network, str], Steps | Exception]:
    """Returns the steps of VARIANTS, compiled once for all sections.

    Args:
      networks: each with all variants; what is recomputed is a block of
        bottlenecks, and left out of other networks.
      variants: of VARIANTS.
      **options: fields of `Steps`.
    """
    wanted = [
        (network, name)
        for network in networks
        for name in variants
        if network.bottleneck or name != "jaxbn, recomputed"
    ]
    keys = {each: (*each, *sorted(options.items())) for each in wanted}
    missing = [each for each in wanted if keys[each] not in _compiled]
    # First, since tracing it is not for others to see.
    missing.sort(key=lambda each: each[1] not in _CHANGED)
    traced = {}
    for network, name in missing:
        with _changed_core(name):
            traced[network, name] = Steps(network, **VARIANTS[name], **options)
    # One of each network first: the others then find its convolutions tried.
    first = [each for each in missing if each[1] == variants[0]]
    for group in (first, [each for each in missing if each not in first]):
        programs = together([traced[each].compile for each in group])
        for each, steps in zip(group, programs):
            _compiled[keys[each]] = steps
    return {each: _compiled[keys[each]] for each in wanted}
