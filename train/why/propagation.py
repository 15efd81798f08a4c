"""Signals and gradients through deep nets whose kernels are just drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import batch_norm

# Layers at either end that are left out where growth a layer is read off.
ENDS = 5


class Kernels(NamedTuple):
    """Of a deep net, standard normal; each use scales them."""

    first: Any  # (inputs, width)
    rest: Any  # (layers, width, width)


def draw_kernels(
    seeds: tuple[int, ...], inputs: int, width: int, layers: int
) -> Kernels:
    """Draws for all seeds; each field has a leading axis of seeds."""

    def one(seed):
        rng = np.random.default_rng(seed)
        shapes = (inputs, width), (layers, width, width)
        return [rng.standard_normal(shape, np.float32) for shape in shapes]

    return Kernels(*map(np.stack, zip(*map(one, seeds))))


def over_seeds(
    measure: Callable, kernels: Kernels, *arrays: np.ndarray, **options: Any
) -> Any:
    """measure(kernels of a seed, *arrays), stacked over seeds."""
    every = functools.partial(measure, **options)
    every = jax.vmap(every, (0, *(None,) * len(arrays)))
    return jax.tree.map(np.asarray, jax.jit(every)(kernels, *arrays))


def _start(kernels: Kernels, x: jax.Array) -> jax.Array:
    return x @ kernels.first / len(kernels.first) ** 0.5


def _through(
    h: jax.Array, kernel: jax.Array, gain: float | jax.Array = 2.0
) -> jax.Array:
    """h W with W of variance gain / width; 2 is that of He et al."""
    return h @ kernel * (gain / len(kernel)) ** 0.5


def _normed(h: jax.Array, norm: bool) -> jax.Array:
    return batch_norm(h)[0] if norm else h


def gradient_norms(kernels: Kernels, x: jax.Array, *, norm: bool) -> jax.Array:
    """Norm of the gradient at the input of each layer: (layers,).

    A layer is relu(batch norm(h W)), W after He et al. The gradient at the
    output is random.
    """
    start = _start(kernels, x)

    def layer(h, given):
        tap, kernel = given
        h = _through(h + tap, kernel)
        return jax.nn.relu(_normed(h, norm)), None

    def output(taps):
        return jax.lax.scan(layer, start, (taps, kernels.rest))[0]

    taps = jnp.zeros((len(kernels.rest), *start.shape))
    _, backward = jax.vjp(output, taps)
    (slopes,) = backward(jax.random.normal(jax.random.key(0), start.shape))
    return jnp.sqrt(jnp.square(slopes).sum((1, 2)))


def growth(norms: np.ndarray) -> np.ndarray:
    """Factor by which gradients grow a layer on their way back.

    Least squares through the logarithms, without the layers at the ends.

    Args:
      norms: (S, layers).

    Returns:
      (S,).
    """
    inside = np.log(norms[:, ENDS : norms.shape[1] - ENDS])
    slope = np.polyfit(np.arange(inside.shape[1]), inside.T, 1)[0]
    return np.exp(-slope)


def residual(
    kernels: Kernels, x: jax.Array, *, norm: bool
) -> tuple[jax.Array, jax.Array]:
    """x + relu(batch norm(x)) W, block after block, W after He et al.

    Returns:
      (variance behind each block, the branch's variance over it), both
      (layers,), means over features. The first input has variance 1.
    """

    def block(h, kernel):
        branch = _through(jax.nn.relu(_normed(h, norm)), kernel)
        new = h + branch
        whole = new.var(0).mean()
        return new, (whole, branch.var(0).mean() / whole)

    start = _normed(_start(kernels, x), True)
    return jax.lax.scan(block, start, kernels.rest)[1]


def collapse(
    kernels: Kernels, x: jax.Array, leak: jax.Array, *, norm: bool
) -> tuple[jax.Array, jax.Array]:
    """How far the examples of a batch are from orthogonal, by layer.

    A layer is batch norm(leaky_relu(h) W). With G = h h^T of the n examples
    the gap is || G / tr(G) - I / n ||_F and the stable rank tr(G) / ||G||_2:
    n when they are orthogonal, 1 when all are multiples of one.

    Returns:
      (gap (layers,), stable rank (layers,)).
    """
    gain = 2 / (1 + leak**2)

    def layer(h, kernel):
        h = _through(jax.nn.leaky_relu(h, leak), kernel, gain)
        h = _normed(h, norm)
        g = h @ h.T
        g = g / jnp.trace(g)
        gap = jnp.linalg.norm(g - jnp.eye(len(h)) / len(h))
        return h, (gap, 1 / jnp.linalg.eigvalsh(g)[-1])

    return jax.lax.scan(layer, _start(kernels, x), kernels.rest)[1]
