"""`BatchNorm` for flax.linen: variables only, the arithmetic is the core's."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jaxbn._normalize import batch_norm, normalize
from jaxbn._running import (
    RunningStats,
    init_running,
    is_finite,
    update_running,
)
from jaxbn._scope import Scope


class BatchNorm(nn.Module):
    """Drop-in for `flax.linen.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. Same fields, call arguments, variables and dtype of the result
    as flax, so checkpoints move both ways. What differs: every kept value
    counts equally whatever device it lies on, the variance does not cancel,
    an empty batch leaves the running statistics alone, and an `axis_name`
    that is not bound means that the array is already global.

    Attributes:
      use_running_average: True normalizes with the running statistics.
      axis: the feature axis, or axes, of the input.
      momentum: weight of the old running value (the core's decay).
      epsilon: added to the variance, unit of the input squared.
      dtype: of the result; None infers it from input and parameters.
      param_dtype: of scale and bias.
      use_bias: adds bias, (C,).
      use_scale: multiplies by scale, (C,).
      bias_init: initializer of bias.
      scale_init: initializer of scale.
      axis_name: named axis, or axes, to take statistics over.
      axis_index_groups: see `Scope`.
      use_fast_variance: accepted for flax's sake; the variance is always
        taken from squared deviations.
      force_float32_reductions: accepted for flax's sake; reductions and
        running statistics are always float32 or wider.
      group_size: neighbouring devices that share statistics; see `Scope`.
      normalize_over: examples that share statistics whatever the topology;
        see `Scope`.
      num_ids: K; the call takes ids, each has statistics of its own, and
        running statistics are (K, C).
      affine_per_id: scale and bias are (K, C), one row an id.
      pivot: False is exact from the first step and sends 4C+2 floats. True
        sends 2C+1, as sums about the running mean, and is exact once that has
        settled; until then it overestimates the variance (see `jaxbn.sync`).
      skip_nonfinite: a batch with a NaN or inf on any device changes no
        running statistic; the variable `skipped` in batch_stats, () int32,
        counts them.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: Hashable | tuple[Hashable, ...] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    group_size: int | None = None
    normalize_over: int | None = None
    num_ids: int | None = None
    affine_per_id: bool = False
    pivot: bool = False
    skip_nonfinite: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        ids: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input; features on `axis`. Integers are read as float32.
          use_running_average: see the attribute; give it in one place.
          mask: broadcastable to x; False leaves a value out of the
            statistics.
          ids: (N,) integers in [0, K) where num_ids is K.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: see `jaxbn.batch_norm`.
        """
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.float32)
        given = self.axis if isinstance(self.axis, Sequence) else (self.axis,)
        axes = tuple(sorted({axis % x.ndim for axis in given}))
        size = tuple(x.shape[axis] for axis in axes)
        rows = size
        if self.num_ids is not None:
            rows = (self.num_ids, *size)

        initial = init_running(rows, dtype=x.dtype)
        mean = self.variable("batch_stats", "mean", lambda: initial.mean)
        var = self.variable("batch_stats", "var", lambda: initial.var)
        if self.skip_nonfinite:
            skipped = self.variable(
                "batch_stats", "skipped", jnp.zeros, (), jnp.int32
            )
        scale = bias = None
        affine = rows if self.affine_per_id else size
        if self.use_scale:
            scale = self.param(
                "scale", self.scale_init, affine, self.param_dtype
            )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, affine, self.param_dtype)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        old = RunningStats(mean.value, var.value)
        options = dict(
            ids=ids, epsilon=self.epsilon, feature_axis=axes, dtype=dtype
        )

        if inference:
            return normalize(x, *old, scale, bias, **options)
        # Initialization runs outside the mapped axes and leaves no trace.
        alone = self.is_initializing()
        scope = Scope(num_ids=self.num_ids)
        if not alone:
            scope = dataclasses.replace(
                scope,
                group_size=self.group_size,
                axis_index_groups=self.axis_index_groups,
                normalize_over=self.normalize_over,
            )
        y, batch = batch_norm(
            x,
            scale,
            bias,
            where=None if mask is None else jnp.asarray(mask, bool),
            axis_name=None if alone else self.axis_name,
            scope=scope,
            pivot=old.mean if self.pivot else None,
            **options,
        )
        if not alone:
            mean.value, var.value = update_running(
                old,
                batch,
                decay=self.momentum,
                skip_nonfinite=self.skip_nonfinite,
            )
            if self.skip_nonfinite:
                skipped.value += jnp.where(is_finite(batch), 0, 1)
        return y
