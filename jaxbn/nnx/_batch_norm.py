"""`BatchNorm` for flax.nnx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn._layer import Call, Layer
from jaxbn._options import (
    ExampleWeight,
    Limits,
    PerId,
    Prior,
    Running,
)
from jaxbn._running import RunningStats
from jaxbn._scope import Scope
from jaxbn._state import State

_SCOPE, _RUNNING = Scope(), Running()


class _FlaxOptions(TypedDict, total=False):
    """The options of `flax.nnx.BatchNorm`."""

    use_running_average: bool
    axis: int
    momentum: Any  # a number, or None to weight all batches equally
    epsilon: float
    dtype: Any
    param_dtype: Any
    use_bias: bool
    use_scale: bool
    bias_init: Any
    scale_init: Any
    axis_name: Any
    axis_index_groups: Any
    use_fast_variance: bool
    promote_dtype: Any
    rngs: nnx.Rngs
    bias_metadata: Any
    scale_metadata: Any


class BatchNorm(nnx.BatchNorm):
    """Drop-in replacement for `flax.nnx.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. A subclass: constructor, Variables, `train()`, `eval()` and
    `nnx.view` are those of flax, so checkpoints are compatible in both
    directions. Differences: all values count equally, whatever device they are
    on; the variance does not cancel; an empty batch does not change the running
    statistics; and if `axis_name` is not bound, the array is global. Flax casts
    input, statistics, scale and bias to `dtype` before computing; here only the
    result is cast. Running statistics are initialized in float32; if the input
    is float64 or complex, the first training step promotes them. Run it before
    a loop that carries the module and must preserve dtypes. Statistics cast to
    a narrower dtype keep it: they are updated in float32 and rounded once.

    Args:
      num_features: C, the length of the feature axis.
      sharing: which examples share statistics: groups of devices, a number of
        examples, ids; see `Scope`.
      per_id: what has a row per id, with sharing.num_ids = K: "statistics",
        (K, C); "affine", scale and bias, (K, C), with statistics shared by all
        examples (class-conditional batch norm); or "both". Rows are initially
        equal.
      running: how running statistics are updated; see `Running`.
      renorm: (r_max, d_max) of `jaxbn.batch_renorm`, or a function
        that returns them for a number of batches, such as
        `jaxbn.renorm_limits`. None is batch norm.
      inference: a `Prior` or `ExampleWeight`, to blend the batch into the
        running statistics in inference; None only uses running statistics.
      train_affine: False stops the gradient of scale and bias.
      **options: options of `flax.nnx.BatchNorm`: use_running_average, axis,
        momentum (decay of the running statistics; None weights all batches
        equally), epsilon, dtype (of the result), param_dtype, use_bias,
        use_scale, bias_init, scale_init, axis_name, axis_index_groups (see
        `Scope`), promote_dtype (only called to infer the dtype of the result),
        rngs, bias_metadata, scale_metadata. use_fast_variance has no effect:
        the variance is always computed from squared deviations.

    Attributes:
      mean: nnx.BatchStat, (C,), in the unit of the input; initially 0.
      var: nnx.BatchStat, (C,), unit of the input squared; initially 1.
      scale: nnx.Param, (C,), or None.
      bias: nnx.Param, (C,), or None.
      steps: nnx.BatchStat, int32 with the shape of mean, with momentum=None,
        running.debias or a function for renorm; otherwise None.

    Raises:
      ValueError: an option is out of range, or two options are incompatible.
    """

    def __init__(
        self,
        num_features: int,
        *,
        sharing: Scope = _SCOPE,
        per_id: PerId = "statistics",
        running: Running = _RUNNING,
        renorm: Limits | Callable[[jax.Array], Limits] | None = None,
        inference: Prior | ExampleWeight | None = None,
        train_affine: bool = True,
        **options: Unpack[_FlaxOptions],
    ):
        super().__init__(num_features, **options)
        self.sharing = sharing
        self.per_id = per_id
        self.running = running
        self.renorm = renorm
        self.inference = inference
        self.train_affine = train_affine
        # A Variable of `Collected`, where `batch_moments` puts one.
        self.moments: Any = nnx.data(None)
        layer = Layer.of(self)
        state = layer.init((num_features,), jnp.float32)
        if state.running.mean.ndim > 1:
            self.mean.set_value(state.running.mean)
            self.var.set_value(state.running.var)
        self.steps, self.skipped = (
            nnx.data(None) if value is None else nnx.BatchStat(value)
            for value in (state.running.steps, state.skipped)
        )
        shape = layer.affine_shape((num_features,))
        for param in (self.scale, self.bias):
            if param is not None and len(shape) > 1:
                rows = jnp.tile(param[...], (shape[0], 1))
                nnx.spmd.add_axis(param, 0, {nnx.PARTITION_NAME: None})
                param.set_value(rows)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        ids: jax.Array | None = None,
        timestep: int | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x, and in training updates mean and var.

        Args:
          x: the input, with features on `axis`. Integers are cast to float32.
          use_running_average: overrides the attribute unless it is None.
          mask: bool, broadcastable to x; False excludes a value from the
            statistics.
          ids: (N,) integers in [0, K) where sharing.num_ids is K.
          timestep: (), integer, where running.num_timesteps is set.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: use_running_average is None here and in the attribute;
            an argument does not match x or the options; or see
            `jaxbn.batch_norm`.
        """
        inference = use_running_average
        if inference is None:
            inference = self.use_running_average
        if inference is None and self.running.mode == "frozen":
            inference = False
        if inference is None:
            raise ValueError(
                "use_running_average is None in the constructor and in the "
                "call. Set it in one of them, or call train() or eval() on the "
                "model."
            )
        x = jnp.asarray(x)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = self.mean[...], self.var[...]
        # Only for its dtype: a promoted x would be rounded, or saved for the
        # backward pass as a wider copy.
        like = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        dtype = dtypes.canonicalize_dtype(like[0], *like[3:], dtype=self.dtype)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.float32)
        counters = (self.steps, self.skipped)
        steps, skipped = (None if c is None else c[...] for c in counters)
        old = State(RunningStats(mean, var, steps), skipped)
        return_moments = self.moments is not None
        call = Call(inference, mask, ids, timestep, dtype, return_moments)
        y, new, batch = Layer.of(self)(x, scale, bias, old, call)
        if batch is None:
            if return_moments:
                self.moments.get_value().note_inference()
            return y
        if self.running.mode == "update":
            # Not by index, which would cast to the dtype of the old value.
            variables = (self.mean, self.var, *counters)
            for variable, value in zip(variables, (*new.running, new.skipped)):
                if variable is not None and value is not None:
                    variable.set_value(value)
        if return_moments:
            moments_out = self.moments.get_value()
            self.moments.set_value(moments_out.add(batch, epsilon=self.epsilon))
        return y
