"""Small networks as pure functions on jaxbn, and their training as one scan.

Parameters are {"hidden": [layer, ...], "head": layer}; a layer is a dict with a
kernel (in, out). All functions work under vmap over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxbn import Moments, batch_norm, normalize

Params = dict[str, Any]
# (params, input of a step) -> (scalar, auxiliary).
Loss = Callable[[Any, Any], tuple[jax.Array, Any]]
# (h, scale, bias) -> (normalized, statistics), as `batch_norm`; or None.
Norm = Callable[..., tuple[jax.Array, Moments]] | None
Sizes = tuple[int, ...]  # of the input, of the hidden layers and of the logits

_VARIANCES = {
    "he": lambda rows, _: 2 / rows,
    "lecun": lambda rows, _: 1 / rows,
    "glorot": lambda rows, columns: 2 / (rows + columns),
}


class Output(NamedTuple):
    logits: jax.Array  # (B, K)
    moments: tuple[Moments, ...]  # of each normalized layer
    preactivations: tuple[jax.Array, ...]  # (B, C) of each hidden layer


def init(
    key: jax.Array,
    sizes: Sizes,
    *,
    norm: Norm = batch_norm,
    gain: str = "he",
    factor: float | jax.Array = 1.0,
) -> Params:
    """Draws parameters; the kernels do not depend on norm.

    gain is "he", "lecun" or "glorot": hidden kernels have variance 2 / in,
    1 / in or 2 / (in + out), times factor^2. That of the head is 1 / in. With
    norm, hidden layers have a scale.
    """
    shapes = list(zip(sizes, sizes[1:]))
    # One draw for all kernels: each takes seconds to compile.
    *ends, total = np.cumsum([rows * columns for rows, columns in shapes])
    drawn = jnp.split(jax.random.normal(key, (total,)), ends)
    layers = []
    for i, (shape, kernel) in enumerate(zip(shapes, drawn)):
        head = i == len(shapes) - 1
        variance = _VARIANCES["lecun" if head else gain](*shape)
        kernel = kernel.reshape(shape) * variance**0.5
        kernel = kernel if head else kernel * factor
        layers.append({"kernel": kernel, "bias": jnp.zeros(shape[1])})
        if norm and not head:
            layers[-1]["scale"] = jnp.ones(shape[1])
    return {"hidden": layers[:-1], "head": layers[-1]}


def apply(
    params: Params,
    x: jax.Array,
    *,
    norm: Norm = batch_norm,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    statistics: Sequence[Any] | None = None,
    between: Callable[[int, jax.Array], jax.Array] | None = None,
) -> Output:
    """Kernel, batch norm and activation in each layer; the head is linear.

    Args:
      params: of `init`. "before", if a layer has it, is a bias before batch
        norm. A head without bias is normalized too.
      x: (B, D).
      norm: of hidden layers, with the statistics of the batch.
      activation: of hidden layers.
      statistics: mean and var of each layer, for inference.
      between: (layer number, normalized) -> input of the activation.
    """
    found, preactivations = [], []

    def through(layer, x, norm):
        h = x @ layer["kernel"]
        if "before" in layer:
            h = h + layer["before"]
        scale, bias = layer.get("scale"), layer.get("bias")
        if not norm:
            return h if bias is None else h + bias
        if statistics is None:
            h, known = norm(h, scale, bias)
        else:
            known = statistics[len(found)]
            h = normalize(h, known.mean, known.var, scale, bias)
        found.append(known)
        return h

    for i, layer in enumerate(params["hidden"]):
        h = through(layer, x, norm)
        if between is not None:
            h = between(i, h)
        preactivations.append(h)
        x = activation(h)
    head = params["head"]
    logits = through(head, x, None if "bias" in head else norm)
    return Output(logits, tuple(found), tuple(preactivations))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch, in nats: ()."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], -1).mean()


def loss_on(examples: tuple[jax.Array, jax.Array], **options: Any) -> Loss:
    """(params, indices of a batch) -> (cross-entropy, accuracy) of `apply`."""

    def loss(params, index):
        x, labels = (a[index] for a in examples)
        logits = apply(params, x, **options).logits
        return cross_entropy(logits, labels), accuracy(logits, labels)

    return loss


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of correct predictions, (); non-finite logits are incorrect."""
    right = logits.argmax(-1) == labels
    return (right & jnp.isfinite(logits).all(-1)).mean()


def train(
    loss: Loss,
    params: Any,
    inputs: Any,
    optimizer: optax.GradientTransformation,
    *,
    watch: Callable[..., Any] = lambda old, new, auxiliary: auxiliary,
) -> tuple[Any, jax.Array, Any]:
    """Takes one step of the optimizer for each of inputs, as one scan.

    watch is called with the parameters before and after the step, and the
    auxiliary output of loss.

    Returns:
      (params, losses (T,), results of watch with a leading axis T).
    """

    def step(carry, given):
        params, state = carry
        found, gradient = jax.value_and_grad(loss, has_aux=True)(params, given)
        updates, state = optimizer.update(gradient, state, params)
        new = optax.apply_updates(params, updates)
        return (new, state), (found[0], watch(params, new, found[1]))

    start = params, optimizer.init(params)
    (params, _), (losses, kept) = jax.lax.scan(step, start, inputs)
    return params, losses, kept


def intervals(inputs: Any, steps: int) -> Any:
    """Reshapes a leading axis T to (T / steps, steps)."""
    return jax.tree.map(lambda a: a.reshape(-1, steps, *a.shape[1:]), inputs)
