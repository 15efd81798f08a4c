"""Calls into JAX and flax that are private, or differ between versions."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Set
from typing import Any

import jax
import jax.numpy as jnp

Names = tuple[Hashable, ...]


def varying_axes(x: jax.Array) -> frozenset[Hashable]:
    """Returns the mesh axes over which x is known to differ.

    Under shard_map with check_vma=True; the empty set elsewhere. jax 0.11 moved
    it from `vma` to `manual_axis_type.varying`.
    """
    return varying_axes_of_type(jax.typeof(x))


def varying_axes_of_type(kind: Any) -> frozenset[Hashable]:
    """Returns the mesh axes over which values of a type differ."""
    kind = getattr(kind, "manual_axis_type", kind)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


def vary_over(x: jax.Array, axes: Iterable[Hashable]) -> jax.Array:
    """Returns x marked as differing over mesh axes too."""
    more = tuple(set(axes) - varying_axes(x))
    return jax.lax.pcast(x, more, to="varying") if more else x


def types_say_varying() -> bool:
    """Returns whether types say over which mesh axes values differ.

    They do under shard_map with check_vma=True.
    """
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return bool(manual) and bool(varying_axes(vary_over(jnp.zeros(()), manual)))


def match_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns x with the type of an array of its shape.

    That is: varying over the same axes of shard_map with check_vma=True, and
    sharded in the same way over Explicit mesh axes.
    """
    x = vary_over(x, varying_axes(like))
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, jax.typeof(like).sharding.spec)
    return x


def is_bound(name: Hashable) -> bool:
    """Whether a name is that of a mapped axis around the caller."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def axes_in_scope() -> list[Hashable]:
    """Returns the named axes that are bound, for error messages."""
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
    mapped, yet the check of their names fails.
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


def applied_mutable(layer: Any) -> Any:
    """Returns the argument `mutable` of the apply that calls a linen module.

    Inside nn.scan and other lifted transforms the root scope is theirs, whose
    filter may list names although the one outside is a DenyList. Such a root
    has a path, that of apply has none. nn.jit reuses what it traced wherever
    its own filter is the same, so nothing outside may count there. Where
    nothing outside is left, because a lifted class itself is applied, a set is
    what the transform has made of a filter that nobody knows: True.
    """
    import flax.linen as nn  # the core does without

    root = layer.scope.root
    for module in reversed(nn.module._context.module_stack):
        if not root.debug_path or "jit(" in root.debug_path[-1]:
            return root.mutable
        if module is not None and module.scope is not None:
            root = module.scope.root
    lifted = root.debug_path and isinstance(root.mutable, Set)
    return True if lifted else root.mutable


def _register_jet_rules() -> None:
    """Lets `jax.experimental.jet` differentiate a training step.

    It has no rules for checkpoint_name, optimization_barrier and cond; a rule
    that is already registered stays. It also evaluates `custom_jvp` functions
    outside its own trace, which fails, for `jax.nn.relu` too: seen in JAX 0.10.2
    and 0.11.2.
    """
    try:
        from jax._src.ad_checkpoint import name_p
        from jax._src.core import set_current_trace
        from jax._src.lax.lax import optimization_barrier_p
        from jax.experimental import jet
        from jax.lax import cond_p

        rules: Any = jet.jet_rules
        trace: Any = jet.JetTrace
        custom_jvp = trace.process_custom_jvp_call
        # Of series as rules have them; the public ones have factorials.
        unscaled = getattr(jet, "jet2", jet.jet)
    except (ImportError, AttributeError):
        return

    def name(primals: Any, series: Any, **params: Any) -> Any:
        return name_p.bind(primals[0], **params), series[0]

    def barrier(primals: Any, series: Any) -> Any:
        return jax.lax.optimization_barrier((list(primals), list(series)))

    def cond(primals: Any, series: Any, *, branches: Any, **_: Any) -> Any:
        import jax.extend.core

        core: Any = jax.extend.core

        def along(branch: Any) -> Any:
            fn = core.jaxpr_as_fun(branch)
            return lambda primals, series: unscaled(fn, primals, series)

        return jax.lax.switch(
            primals[0], list(map(along, branches)), primals[1:], series[1:]
        )

    def process_custom_jvp_call(self: Any, *args: Any, **params: Any) -> Any:
        with set_current_trace(self):
            return custom_jvp(self, *args, **params)

    for primitive, rule in (
        (name_p, name),
        (optimization_barrier_p, barrier),
        (cond_p, cond),
    ):
        rules.setdefault(primitive, rule)
    trace.process_custom_jvp_call = process_custom_jvp_call


_register_jet_rules()
