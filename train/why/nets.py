"""Small nets as pure functions on jaxbn, and their training as one scan.

Parameters are {"layer0": ..., "layer1": ..., "head": ...}, each with a kernel.
Training, and all else here, may be wrapped in vmap over seeds and settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import Moments, batch_norm, moments, normalize

Params = dict[str, dict[str, jax.Array]]
# (params, batch_stats, batch) -> (scalar, new batch_stats), in training mode.
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


class Output(NamedTuple):
    logits: jax.Array  # (B, K)
    moments: tuple[Moments, ...]  # of each normalized layer
    preactivations: tuple[jax.Array, ...]  # (B, C) of each hidden layer


def init(
    key: jax.Array,
    sizes: Sequence[int],
    *,
    norm: bool = True,
    affine: bool = True,
    before: bool = False,
    gain: str = "he",
    factor: float | jax.Array = 1.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Params:
    """Draws parameters; the kernels do not depend on the other options.

    Args:
      key: random.
      sizes: of the input, of the hidden layers and of the logits.
      norm, affine: hidden layers have a bias with affine, a scale with both.
      before: hidden layers have a bias "before" that is added ahead of the
        normalization; the head too without affine, in place of its bias.
      gain: "he", "lecun" or "glorot": hidden kernels have variance 2 / in,
        1 / in or 2 / (in + out). The head's is 1 / in.
      factor: times the hidden kernels.
      dtype: of all.
    """
    params = {}
    # One draw, cut up: each further one takes seconds to compile.
    total = sum(a * b for a, b in zip(sizes, sizes[1:]))
    drawn = jax.random.normal(key, (total,), dtype)
    for i, (rows, columns) in enumerate(zip(sizes, sizes[1:])):
        head = i == len(sizes) - 2
        variance = {
            "he": 2 / rows,
            "lecun": 1 / rows,
            "glorot": 2 / (rows + columns),
        }["lecun" if head else gain]
        kernel, drawn = jnp.split(drawn, [rows * columns])
        kernel = kernel.reshape(rows, columns)
        layer = {"kernel": kernel * variance**0.5}
        if not head:
            layer["kernel"] = layer["kernel"] * jnp.asarray(factor, dtype)
        if affine or (head and not before):
            layer["bias"] = jnp.zeros(columns, dtype)
        if norm and affine and not head:
            layer["scale"] = jnp.ones(columns, dtype)
        if before and not (affine and head):
            layer["before"] = jnp.zeros(columns, dtype)
        params["head" if head else f"layer{i}"] = layer
    return params


def layers(params: Params) -> tuple[str, ...]:
    """Names of the layers from the input to the head."""
    return (*(f"layer{i}" for i in range(len(params) - 1)), "head")


def apply(
    params: Params,
    x: jax.Array,
    *,
    norm: bool = True,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    epsilon: float = 1e-5,
    stop_statistics: bool = False,
    norm_logits: bool = False,
    statistics: Sequence[Any] | None = None,
    axis_name: str | None = None,
    between: Callable[[int, jax.Array], jax.Array] | None = None,
) -> Output:
    """kernel, batch norm, activation, layer by layer; the head is linear.

    Args:
      params: of `init`.
      x: (B, D).
      norm: normalizes the hidden layers.
      activation: between layers.
      epsilon: of batch norm.
      stop_statistics: takes mean and variance for constants, which is wrong.
      norm_logits: normalizes the logits too, without scale.
      statistics: mean and var of each normalized layer, as in inference.
      axis_name: over which a batch is synchronized.
      between: (layer number, normalized) -> what the activation is given.
    """
    found, preactivations = [], []
    for i, name in enumerate(layers(params)):
        layer = params[name]
        h = x @ layer["kernel"]
        if "before" in layer:
            h = h + layer["before"]
        head = name == "head"
        scale, bias = layer.get("scale"), layer.get("bias")
        if norm_logits if head else norm:
            given = {"scale": scale, "bias": bias, "epsilon": epsilon}
            if statistics is None and not stop_statistics:
                h, known = batch_norm(h, axis_name=axis_name, **given)
            else:
                if statistics is not None:
                    known = statistics[len(found)]
                else:
                    known = jax.lax.stop_gradient(moments(h))
                h = normalize(h, known.mean, known.var, **given)
            found.append(known)
        elif bias is not None:
            h = h + bias
        if head:
            break
        if between is not None:
            h = between(i, h)
        preactivations.append(h)
        x = activation(h)
    return Output(h, tuple(found), tuple(preactivations))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch, in nats: ()."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], -1).mean()


def loss_of(**options: Any) -> Loss:
    """Cross-entropy of `apply` with these options, as jaxbn.diagnostics takes.

    batch_stats is passed on unchanged; `population` finds the statistics to
    evaluate with.
    """

    def loss(params, batch_stats, batch):
        x, labels = batch
        logits = apply(params, x, **options).logits
        return cross_entropy(logits, labels), batch_stats

    return loss


def population(params: Params, x: jax.Array, **options: Any) -> tuple:
    """Moments of each layer over all of x, for `apply(statistics=...)`."""
    return apply(params, x, **options).moments


def accuracy(
    params: Params, x: jax.Array, labels: jax.Array, **options: Any
) -> jax.Array:
    """Share of right answers, (); a net that is not finite has none right."""
    logits = apply(params, x, **options).logits
    right = jnp.argmax(logits, -1) == labels
    return (right & jnp.isfinite(logits).all(-1)).mean()


def descend(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    params: Any,
    inputs: Any,
    learning_rate: float | jax.Array,
) -> tuple[Any, jax.Array, Any]:
    """params -= learning_rate gradient, a step for each input, as one scan.

    Args:
      loss: (params, input) -> (scalar, auxiliary).
      params: any tree.
      inputs: tree with a leading axis T.
      learning_rate: of all steps.

    Returns:
      (params, losses (T,), auxiliary with a leading axis T).
    """

    def step(params, given):
        found, gradient = jax.value_and_grad(loss, has_aux=True)(params, given)
        new = jax.tree.map(lambda p, g: p - learning_rate * g, params, gradient)
        return new, found

    params, (losses, auxiliary) = jax.lax.scan(step, params, inputs)
    return params, losses, auxiliary


def sgd(
    loss: Loss,
    params: Any,
    data: tuple[jax.Array, jax.Array],
    indices: jax.Array,
    learning_rate: float | jax.Array,
    *,
    weight_decay: float | jax.Array = 0.0,
    momentum: float | jax.Array = 0.0,
    watch: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, jax.Array, Any]:
    """params -= learning_rate (gradient + weight_decay params), as one scan.

    Args:
      loss: (params, batch_stats, (x, labels)) -> (scalar, batch_stats).
      params: any tree; decay acts on all of it.
      data: all x and all labels.
      indices: (T, B), which examples each step sees.
      learning_rate: one, or (T,).
      weight_decay: coefficient of half the squared norm.
      momentum: of the heavy ball.
      watch: (params before the step, after it) -> what to keep of each step.

    Returns:
      (params, losses (T,), watched with a leading axis T or None).
    """
    rates = jnp.broadcast_to(learning_rate, indices.shape[:1])
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(carry, given):
        params, velocity = carry
        index, rate = given
        batch = jax.tree.map(lambda a: a[index], data)
        (value, _), gradient = value_and_grad(params, (), batch)

        def accelerate(v, g, p):
            return momentum * v + g + weight_decay * p

        def move(p, v):
            return p - (rate * v).astype(p.dtype)

        velocity = jax.tree.map(accelerate, velocity, gradient, params)
        new = jax.tree.map(move, params, velocity)
        kept = None if watch is None else watch(params, new)
        return (new, velocity), (value, kept)

    start = params, jax.tree.map(jnp.zeros_like, params)
    (params, _), (losses, kept) = jax.lax.scan(step, start, (indices, rates))
    return params, losses, kept
