"""Types of arrays, named axes and meshes, across versions of JAX."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

Names = tuple[Hashable, ...]


def is_traced(x: Any) -> bool:
    """Whether a value is known to the compiled program alone.

    `jax.core.Tracer` is public, of a module that 0.11 took most names from.
    """
    return isinstance(x, jax.core.Tracer)


def shape_of(kind: Any) -> tuple[int, ...]:
    """Returns the shape that a type has; () for those of effects' tokens.

    There is no public class of the types that have one.
    """
    shape: tuple[int, ...] = getattr(kind, "shape", ())
    return shape


def dtype_of(kind: Any) -> Any:
    """Returns the dtype that a type has, or None; see `shape_of`."""
    return getattr(kind, "dtype", None)


def is_weakly_typed(x: Any) -> bool:
    """Whether an array, or its type, takes the dtype of what it is added to.

    Arrays and `jax.ShapeDtypeStruct` say so by an attribute that numpy's lack;
    there is no function for all of them.
    """
    return bool(getattr(x, "weak_type", False))


def tracing_settings() -> tuple[Any, ...]:
    """Returns the settings of JAX that what is traced depends on.

    `jax.config` has them as attributes that its types leave out.
    """
    config: Any = jax.config
    return config.jax_enable_x64, config.jax_default_matmul_precision


def varying_axes(x: jax.Array) -> frozenset[Hashable]:
    """Returns the mesh axes over which x is known to differ.

    Under shard_map with check_vma=True; the empty set elsewhere.
    """
    return varying_axes_of_type(jax.typeof(x))


def varying_axes_of_type(kind: Any) -> frozenset[Hashable]:
    """Returns the mesh axes over which values of a type differ.

    No function reads them. By jax 0.10.1 the attribute `vma` has become
    `manual_axis_type.varying`; types without it have no axis.
    """
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", ()))


def vary_over(x: jax.Array, axes: Iterable[Hashable]) -> jax.Array:
    """Returns x marked as differing over mesh axes too.

    `jax.lax.pcast` raises for axes that x varies over already.
    """
    more = tuple(set(axes) - varying_axes(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def types_say_varying() -> bool:
    """Returns whether types say over which mesh axes values differ.

    They do under shard_map with check_vma=True, which nothing public says.
    """
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return bool(manual) and bool(varying_axes(vary_over(jnp.zeros(()), manual)))


def explicit_spec(kind: Any) -> PartitionSpec | None:
    """Returns how a type says that its values are sharded, if it does.

    That is over Explicit mesh axes. Types of arrays have an attribute
    `sharding`, those of tokens do not, and no public class tells which.
    """
    sharding: Any = getattr(kind, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    spec: PartitionSpec = sharding.spec
    return spec


def match_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns x with the type of an array of its shape.

    That is: varying over the same axes of shard_map with check_vma=True, and
    sharded in the same way over Explicit mesh axes. `jnp.zeros_like` and its
    kind do so for new arrays, nothing public for those that exist.
    """
    x = vary_over(x, varying_axes(like))
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, jax.typeof(like).sharding.spec)
    return x


def is_bound(name: Hashable) -> bool:
    """Whether a name is that of a mapped axis around the caller.

    JAX has no public API for this; `jax.lax.axis_size` raises NameError.
    """
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def axes_in_scope() -> list[Hashable]:
    """Returns the named axes that are bound, for error messages.

    JAX has no public API for this. Without the function of jax.extend: none.
    """
    # Here, because it takes as long to import as all of the core together.
    import jax.extend.core

    core: Any = jax.extend.core  # its types leave this function out
    ask = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", list)
    names: list[Hashable] = list(ask())
    return names


def bind_axes(
    names: Names, sizes: tuple[int, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Binds named axes again where JAX has forgotten them.

    JAX calls the derivative rule of a `custom_jvp` function when it
    differentiates. With `vmap(axis_name=...)` inside of `jit`, `checkpoint` or
    `scan`, that is after vmap has returned: collectives in the rule are still
    mapped, yet the check of their names fails. `jax.make_jaxpr` alone binds
    names in public, for a trace of its own. Without the private function
    nothing is bound, and JAX raises NameError where it has forgotten a name.
    """
    if not all(map(is_bound, names)):
        from jax._src import core

        extend = getattr(core, "extend_axis_env_nd", None)
        if extend is not None:
            found: contextlib.AbstractContextManager[Any] = extend(
                list(zip(names, sizes))
            )
            return found
    return contextlib.nullcontext()


@contextlib.contextmanager
def mesh_with_axis(
    name: Hashable, size: int, *, closed_over: str
) -> Iterator[None]:
    """The abstract mesh with one more Manual axis, to trace in.

    A mesh may not be replaced by one of another size, but by none, and none by
    any. What is then traced may not read arrays of the mesh around it, which
    JAX says in a ValueError about the "context mesh".

    Args:
      name: of the axis.
      size: its length.
      closed_over: what to say in place of that error.

    Raises:
      ValueError: an array of the mesh around it is closed over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names: Any = (*mesh.axis_names, name)
    wider = jax.sharding.AbstractMesh(
        (*mesh.axis_sizes, size),
        names,
        axis_types=(*mesh.axis_types, AxisType.Manual),
    )
    nothing = jax.sharding.AbstractMesh((), ())
    use = jax.sharding.use_abstract_mesh
    try:
        with use(nothing), use(wider):
            yield
    except ValueError as error:
        if "context mesh" not in str(error):
            raise
        raise ValueError(closed_over) from error
