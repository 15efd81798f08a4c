"""Checks of shapes, dtypes and axes, with their error messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Axes = int | Sequence[int]


def given_fields(options: Any) -> str:
    """Returns the repr of a dataclass without default values."""
    given = (
        f"{field.name}={getattr(options, field.name)!r}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    )
    return f"{type(options).__name__}({', '.join(given)})"


def describe(x: jax.Array) -> str:
    """Returns dtype and shape for messages, such as float32[8, 4]."""
    return f"{x.dtype.name}{list(x.shape)}"


def check_input(x: jax.Array) -> jax.Array:
    """Returns x as an array; raises ValueError unless floating or complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"x must be floating or complex; got {describe(x)}. Convert it "
            "first, for example x.astype(jnp.float32)."
        )
    return x


def split_axes(
    x: jax.Array,
    feature_axis: Axes,
    *,
    needs_batch: bool = False,
    name: str = "feature_axis",
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (feature axes, reduced axes) of x, both positive and sorted.

    If x has only feature axes, there is nothing to reduce: x is one example, or
    an error if needs_batch. name: name of feature_axis in messages.
    """
    given = (
        feature_axis if isinstance(feature_axis, Sequence) else (feature_axis,)
    )
    if any(not -x.ndim <= axis < x.ndim for axis in given):
        raise ValueError(
            f"{name}={feature_axis} is not an axis of x, which is "
            f"{describe(x)}."
        )
    features = tuple(sorted({axis % x.ndim for axis in given}))
    reduced = tuple(axis for axis in range(x.ndim) if axis not in features)
    if needs_batch and not reduced:
        raise ValueError(
            f"{name}={feature_axis} names every axis of x, which is "
            f"{describe(x)}: no axis is left to reduce over."
        )
    return features, reduced


def check_where(
    where: jax.Array | None, x: jax.Array, *, name: str = "where"
) -> jax.Array | None:
    """Returns where with as many axes as x; None stays None.

    name: name of where in messages.
    """
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(
            f"{name} must be bool; got {describe(where)}. Compare first, for "
            f"example {name}=mask > 0."
        )
    # A mask (N,) would broadcast along the last axis, although meant for the
    # first one, unnoticed if both have equal length.
    per_example = where.ndim == 1 and where.shape[0] == x.shape[0]
    if per_example and x.ndim > 1:
        index = ", ".join([":"] + ["None"] * (x.ndim - 1))
        raise ValueError(
            f"{name} is {describe(where)} and x is {describe(x)}: write a mask "
            f"over the first axis as {name}[{index}], and one over the last "
            f"axis as {name}[None, :]."
        )
    try:
        fits = jnp.broadcast_shapes(where.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} must broadcast to x; got {name} {describe(where)} and x "
            f"{describe(x)}."
        )
    return where.reshape((1,) * (x.ndim - where.ndim) + where.shape)


def check_features(
    name: str,
    value: jax.Array,
    x: jax.Array,
    features: tuple[int, ...],
    *rows: int | None,
) -> jax.Array:
    """Returns value as an array; raises unless it has one value per feature.

    rows: valid lengths of a leading axis; None for no such axis.
    """
    value = jnp.asarray(value)
    want = tuple(x.shape[axis] for axis in features)
    shapes = [want if n is None else (n, *want) for n in rows or (None,)]
    if value.shape not in shapes:
        raise ValueError(
            f"{name} must have shape {' or '.join(map(str, shapes))}, one "
            f"value for each feature of x {describe(x)} on axes {features}; "
            f"got {describe(value)}."
        )
    return value


def check_affine(
    scale: jax.Array | None,
    bias: jax.Array | None,
    x: jax.Array,
    features: tuple[int, ...],
    num_ids: int | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns scale and bias as arrays, (F) or (num_ids, F)."""
    rows = (None,) if num_ids is None else (None, num_ids)
    if scale is not None:
        scale = check_features("scale", scale, x, features, *rows)
    if bias is not None:
        bias = check_features("bias", bias, x, features, *rows)
    return scale, bias


def affine_rows(
    ids: jax.Array | None,
    num_ids: int | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    features: tuple[int, ...],
) -> int | None:
    """Returns K if scale and bias may be (K, C), one row per id.

    num_ids: rows of the statistics. If None, all ids share them, and K is taken
    from scale and bias.
    """
    if ids is None or num_ids is not None:
        return num_ids
    shapes = [jnp.shape(a) for a in (scale, bias) if a is not None]
    for shape in shapes:
        if len(shape) == len(features) + 1:
            return shape[0]
    raise ValueError(
        "ids select rows of statistics, with sharing.num_ids, or of scale and "
        "bias, of shape (K, C); got sharing.num_ids=None and scale and bias of "
        f"shapes {shapes}."
    )


def check_ids(
    ids: jax.Array | None,
    num_ids: int | None,
    x: jax.Array,
    axes: tuple[int, ...],
) -> jax.Array | None:
    """Returns ids as an array; raises unless it has one integer per example."""
    if (ids is None) != (num_ids is None):
        raise ValueError(
            f"ids and sharing.num_ids must be given together; got ids "
            f"{'None' if ids is None else describe(jnp.asarray(ids))} and "
            f"num_ids={num_ids}."
        )
    if ids is None:
        return None
    ids = jnp.asarray(ids)
    want = tuple(x.shape[axis] for axis in axes[:1])
    if ids.shape != want or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"ids must be integers of shape {want}, one for each example of x "
            f"{describe(x)}; got {describe(ids)}."
        )
    return ids
