"""`BatchNorm` for flax.linen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jaxbn._call_moments import collected_variable
from jaxbn._compat.modules import applied_mutable
from jaxbn._layer import Call, Layer
from jaxbn._options import ExampleWeight, Limits, PerId, Prior, Running
from jaxbn._running import RunningStats
from jaxbn._scope import Scope
from jaxbn._state import State, no_moments, record


class BatchNorm(nn.Module):
    """Drop-in replacement for `flax.linen.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. Fields, call arguments, variables and result dtype are those of
    flax, so checkpoints are compatible in both directions. Differences: all
    values count equally, whatever device they are on; the variance does not
    cancel; an empty batch does not change the running statistics; and if
    `axis_name` is not bound, the array is global.

    With momentum=None all batches have equal weight. In that case, with
    running.debias or with a function for renorm, batch_stats has the variable
    `steps`, int32 with the shape of mean. If `mutable` contains the name
    `batch_moments`, and is not True or a DenyList, the layer stores the Moments
    of the batch in that collection; see `batch_moments`.

    Attributes:
      use_running_average: True normalizes with the running statistics.
      axis: the feature axis or axes of the input.
      momentum: decay of the running statistics.
      epsilon: added to the variance, unit of the input squared.
      dtype: dtype of the result; None infers it from input and parameters.
      param_dtype: dtype of scale and bias.
      use_bias: adds bias, (C,).
      use_scale: multiplies by scale, (C,).
      bias_init: initializer of bias; with a row per id, of each row, (C,).
        Partition names are those of a row.
      scale_init: initializer of scale, likewise.
      axis_name: named axis or axes to compute statistics over.
      axis_index_groups: see `Scope`.
      use_fast_variance: has no effect; the variance is always computed from
        squared deviations.
      force_float32_reductions: has no effect; reductions and running
        statistics are always float32 or wider.
      sharing: which examples share statistics: groups of devices, a number of
        examples, ids; see `Scope`.
      per_id: what has a row per id, with sharing.num_ids = K: "statistics",
        (K, C); "affine", scale and bias, (K, C), with statistics shared by all
        examples (class-conditional batch norm); or "both".
      running: how running statistics are updated; see `Running`.
      renorm: (r_max, d_max) of `jaxbn.batch_renorm`, or a function
        that returns them for a number of batches, such as
        `jaxbn.renorm_limits`. None is batch norm.
      inference: a `Prior` or `ExampleWeight`, to blend the batch into the
        running statistics in inference; None only uses running statistics.
      train_affine: False stops the gradient of scale and bias.

    Raises:
      ValueError: an option is out of range, or two options are incompatible.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
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
    sharing: Scope = Scope()
    per_id: PerId = "statistics"
    running: Running = Running()
    renorm: Limits | Callable[[jax.Array], Limits] | None = None
    inference: Prior | ExampleWeight | None = None
    train_affine: bool = True

    def __post_init__(self) -> None:
        Layer.of(self)  # raises ValueError for invalid options
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        ids: jax.Array | None = None,
        timestep: int | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: the input, with features on `axis`. Integers are cast to float32.
          use_running_average: see the attribute; set only one of them.
          mask: bool, broadcastable to x; False excludes a value from the
            statistics.
          ids: (N,) integers in [0, K) where sharing.num_ids is K.
          timestep: (), integer, where running.num_timesteps is set.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: an argument does not match x or the options; or see
            `jaxbn.batch_norm`.
        """
        frozen = self.running.mode == "frozen"
        if frozen and self.use_running_average is None:
            use_running_average = bool(use_running_average)
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        given_x = x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(jnp.float32)
        layer = Layer.of(self)
        initializing = self.is_initializing()
        if initializing:  # not inside mapped axes
            layer = layer.unsynchronized()
        features, _ = layer.split_axes(x)
        size = tuple(x.shape[axis] for axis in features)
        initial = layer.init(size, x.dtype)
        variables: list[Any] = [
            None
            if value is None
            else self.variable("batch_stats", name, lambda value=value: value)
            for name, value in (
                *initial.running._asdict().items(),
                ("skipped", initial.skipped),
            )
        ]
        mean, var, steps, skipped = variables
        scale = bias = None
        affine = layer.affine_shape(size)
        per_id = affine != size
        if self.use_scale:
            init = _rows_of(self.scale_init) if per_id else self.scale_init
            scale = self.param("scale", init, affine, self.param_dtype)
        if self.use_bias:
            init = _rows_of(self.bias_init) if per_id else self.bias_init
            bias = self.param("bias", init, affine, self.param_dtype)
        dtype = dtypes.canonicalize_dtype(
            given_x, scale, bias, dtype=self.dtype
        )

        def read(variable: nn.Variable[Any] | None) -> jax.Array | None:
            return None if variable is None else variable.value

        old = State(
            RunningStats(mean.value, var.value, read(steps)), read(skipped)
        )
        collects = collected_variable(self)
        by_name = self._returns_moments()
        return_moments = by_name or collects is not None
        call = Call(
            inference, mask, ids, timestep, dtype, return_moments, initializing
        )
        y, new, batch = layer(x, scale, bias, old, call)
        if batch is None or initializing:
            if collects is not None:
                collects.value.note_inference()
            return y
        if self.running.mode == "update":
            values = (*new.running, new.skipped)
            for variable, value in zip(variables, values):
                if variable is not None:
                    variable.value = value
        if collects is not None:
            collects.value = collects.value.add(batch, epsilon=self.epsilon)
        if by_name:
            moments_out = self.variable(
                "batch_moments", "moments", no_moments, old.running
            )
            moments_out.value = record(moments_out.value, batch)
        return y

    @nn.nowrap
    def _returns_moments(self) -> bool:
        # Not for True or a DenyList: the moments were not asked for by name,
        # and if passed back in with the variables they would accumulate.
        by_name = isinstance(applied_mutable(self), Collection)
        return by_name and self.is_mutable_collection("batch_moments")


def _rows_of(
    init: nn.initializers.Initializer,
) -> nn.initializers.Initializer:
    """Returns an initializer of (K, C) with independent rows."""

    def init_rows(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        keys = jax.random.split(key, shape[0])
        rows = jax.vmap(lambda key: init(key, shape[1:], dtype))(keys)
        return nn.meta.add_axis(rows, 0, {nn.PARTITION_NAME: None})

    return init_rows
