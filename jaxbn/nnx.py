"""`BatchNorm` for flax.nnx: variables only, the arithmetic is the core's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn._moments import widen
from jaxbn._normalize import batch_norm, normalize
from jaxbn._running import (
    RunningStats,
    init_running,
    is_finite,
    update_running,
)
from jaxbn._scope import Scope


class BatchNorm(nnx.BatchNorm):
    """Drop-in for `flax.nnx.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. A subclass: constructor, Variables, `train()`, `eval()` and
    `nnx.view` are flax's own, so checkpoints move both ways. What differs:
    every kept value counts equally whatever device it lies on, the variance
    does not cancel, an empty batch leaves the running statistics alone, and
    an `axis_name` that is not bound means that the array is already global.
    Flax rounds input, statistics, scale and bias to `dtype` before it
    computes; here only the result is rounded. The running statistics are
    never narrower than float32: where the input is float64 or complex, the
    first step in training gives them its dtype. Take it before a loop that
    carries the module and must keep dtypes.

    Args:
      num_features: C, the length of the feature axis.
      group_size: neighbouring devices that share statistics; see `Scope`.
      normalize_over: examples that share statistics whatever the topology;
        see `Scope`.
      num_ids: K; the call takes ids, each has statistics of its own, and
        running statistics are (K, C).
      affine_per_id: scale and bias are (K, C), one row an id; the rows start
        equal.
      pivot: False is exact from the first step and sends 4C+2 floats. True
        sends 2C+1, as sums about the running mean, and is exact once that has
        settled; until then it overestimates the variance (see `jaxbn.sync`).
      skip_nonfinite: a batch with a NaN or inf on any device changes no
        running statistic; the Variable `skipped`, () int32, counts them.
      **options: of `flax.nnx.BatchNorm`: use_running_average, axis, momentum
        (the core's decay), epsilon, dtype (of the result), param_dtype,
        use_bias, use_scale, bias_init, scale_init, axis_name,
        axis_index_groups (see `Scope`), promote_dtype (called to infer the
        dtype of the result alone), rngs, bias_metadata, scale_metadata.
        use_fast_variance has no effect: the variance is always taken from
        squared deviations.

    Attributes:
      mean: nnx.BatchStat, (C,), in the unit of the input; starts at 0.
      var: nnx.BatchStat, (C,), unit of the input squared; starts at 1.
      scale: nnx.Param, (C,), or None.
      bias: nnx.Param, (C,), or None.
    """

    def __init__(
        self,
        num_features: int,
        *,
        group_size: int | None = None,
        normalize_over: int | None = None,
        num_ids: int | None = None,
        affine_per_id: bool = False,
        pivot: bool = False,
        skip_nonfinite: bool = False,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.scope = Scope(
            group_size=group_size,
            axis_index_groups=self.axis_index_groups,
            normalize_over=normalize_over,
            num_ids=num_ids,
        )
        self.pivot = pivot
        self.skipped = nnx.data(None)
        if skip_nonfinite:
            self.skipped = nnx.BatchStat(jnp.zeros((), jnp.int32))
        if num_ids is None:
            return
        rows = init_running((num_ids, num_features))
        self.mean.set_value(rows.mean)
        self.var.set_value(rows.var)
        for param in (self.scale, self.bias):
            if affine_per_id and param is not None:
                param.set_value(jnp.tile(param[...], (num_ids, 1)))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        ids: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x, and in training updates mean and var.

        Args:
          x: the input; features on `axis`. Integers are read as float32.
          use_running_average: goes before the attribute unless it is None.
          mask: bool, broadcastable to x; False leaves a value out of the
            statistics.
          ids: (N,) integers in [0, K) where num_ids is K.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: use_running_average is None here and in the attribute;
            or see `jaxbn.batch_norm`.
        """
        inference = use_running_average
        if inference is None:
            inference = self.use_running_average
        if inference is None:
            raise ValueError(
                "use_running_average is None in the constructor and in the "
                "call. Pass it in one of them, or call train() or eval() on "
                "the model."
            )
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.float32)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        # Wide though somebody cast the whole state to a narrow dtype.
        old = RunningStats(widen(self.mean[...]), widen(self.var[...]))
        # Only for its dtype: a promoted x would be rounded, or kept for the
        # backward pass in a wider copy.
        like = self.promote_dtype((x, *old, scale, bias), dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(like[0], *like[3:], dtype=self.dtype)
        options = dict(
            ids=ids, epsilon=self.epsilon, feature_axis=self.axis, dtype=dtype
        )

        if inference:
            return normalize(x, *old, scale, bias, **options)
        y, batch = batch_norm(
            x,
            scale,
            bias,
            where=mask,
            axis_name=self.axis_name,
            scope=self.scope,
            pivot=old.mean if self.pivot else None,
            **options,
        )
        skip = self.skipped is not None
        new = update_running(
            old, batch, decay=self.momentum, skip_nonfinite=skip
        )
        if skip:
            self.skipped[...] += jnp.where(is_finite(batch), 0, 1)
        # Not by index, which would round to the dtype of the old value.
        self.mean.set_value(new.mean)
        self.var.set_value(new.var)
        return y
