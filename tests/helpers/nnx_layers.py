"""nnx layers with random scales and biases, and what they store."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn.nnx import BatchNorm
from tests.helpers import reference

NOISE = nnx.initializers.normal(1.0)


def draw(*shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1, 2, shape), dtype)


def make(cls=BatchNorm, features=3, **options):
    options = {"scale_init": NOISE, "bias_init": NOISE, **options}
    return cls(features, rngs=nnx.Rngs(0), **options)


def stats(module):
    return {"mean": module.mean[...], "var": module.var[...]}


def running(batches, keep=True, *, decay=0.99):
    """Running statistics after the batches, in float64."""
    mean, var = 0.0, 1.0
    for x in batches:
        flat = np.zeros(x.shape[-1])
        batch = reference.batch_norm(x, flat, flat, keep, np.zeros(x.shape))
        mean = decay * mean + (1 - decay) * batch.mean
        var = decay * var + (1 - decay) * batch.var
    return {"mean": mean, "var": var}
