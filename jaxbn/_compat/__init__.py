"""Every call into JAX and flax that is private, or differs between versions.

No other file of jaxbn names a private attribute of theirs, `jax.extend` or
`jax.core`. Each function says what public API is missing, and the version that
it was seen to change in; what is not said to change was the same in jax 0.10.2
and 0.11.2 and in flax 0.12.8 and 0.12.12.

  arrays: types, named axes and meshes; in the names of this package.
  jaxprs: reading and evaluating jaxprs. Imports jax.extend, which takes as long
    as all of the core, so that the core does without.
  modules: flax.linen and flax.nnx. Imports flax, which the core does without.
  jet: rules that `jax.experimental.jet` lacks, registered here.
"""

from jaxbn._compat.arrays import (
    Names,
    axes_in_scope,
    bind_axes,
    dtype_of,
    explicit_spec,
    is_bound,
    is_traced,
    is_weakly_typed,
    match_type,
    mesh_with_axis,
    shape_of,
    tracing_settings,
    types_say_varying,
    vary_over,
    varying_axes,
    varying_axes_of_type,
)
from jaxbn._compat.jet import register_rules

__all__ = [
    "Names",
    "axes_in_scope",
    "bind_axes",
    "dtype_of",
    "explicit_spec",
    "is_bound",
    "is_traced",
    "is_weakly_typed",
    "match_type",
    "mesh_with_axis",
    "shape_of",
    "tracing_settings",
    "types_say_varying",
    "vary_over",
    "varying_axes",
    "varying_axes_of_type",
]

register_rules()
