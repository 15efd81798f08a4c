"""Checks of scalar options, with their error messages."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat import is_traced


def is_known(value: float | jax.Array) -> bool:
    """Whether value is not traced, so that it can be checked."""
    return not is_traced(value)


def check_between(
    name: str, value: float | jax.Array, least: float, most: float
) -> None:
    """Raises ValueError unless least <= value <= most."""
    if not is_known(value):
        return
    known = np.asarray(value)
    if not ((known >= least) & (known <= most)).all():
        raise ValueError(f"{name} must be in [{least}, {most}]; got {value}.")


def check_at_least(
    name: str, value: float | jax.Array, least: float, *, finite: bool = False
) -> None:
    """Raises ValueError unless value >= least, and < inf if finite."""
    if not is_known(value):
        return
    if not value >= least or (finite and math.isinf(value)):
        also = "finite and " if finite else ""
        raise ValueError(f"{name} must be {also}at least {least}; got {value}.")


def check_epsilon(epsilon: float) -> None:
    """Raises ValueError unless epsilon is finite and at least 0."""
    check_at_least("epsilon", epsilon, 0, finite=True)


def check_ddof(ddof: int) -> None:
    """Raises ValueError unless ddof is 0 or 1."""
    if is_known(ddof) and ddof not in (0, 1):
        raise ValueError(
            "ddof must be 0, the biased variance, or 1, the unbiased one; got "
            f"{ddof}."
        )


def check_limits(r_max: float | jax.Array, d_max: float | jax.Array) -> None:
    """Raises ValueError unless both are numbers, r_max >= 1 and d_max >= 0."""
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if jnp.ndim(value) or (is_known(value) and not value >= least):
            raise ValueError(
                f"{name} must be a number and at least {least}; got {value}."
            )
