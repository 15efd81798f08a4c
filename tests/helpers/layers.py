"""Both layers in training mode, with any options, and data for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx


def draw(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(1, 2, shape), dtype)


_GROUPS = {
    jaxbn.Scope: ("sharing", ("group_size", "normalize_over", "num_ids")),
    jaxbn.Running: (
        "running",
        ("mode", "ddof", "debias", "skip_nonfinite", "num_timesteps"),
    ),
}


def grouped(options):
    """Returns options given one by one as the fields of a layer."""
    fields = dict(options)
    for kind, (field, names) in _GROUPS.items():
        own = {name: fields.pop(name) for name in names if name in fields}
        if own:
            fields[field] = kind(**own)
    return fields


def linen_layer(**options):
    return jaxbn.linen.BatchNorm(use_running_average=False, **options)


def nnx_layer(**options):
    """A layer of three features."""
    return jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)


def call_linen(x, options, **arguments):
    layer = linen_layer(**options)
    return layer.init_with_output(jax.random.key(0), x, **arguments)[0]


def call_nnx(x, options, **arguments):
    return nnx_layer(**options)(x, **arguments)
