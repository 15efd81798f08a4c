"""`BatchNorm` for flax.linen: variables only, the arithmetic is the core's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jaxbn._call import (
    ModelCall,
    linen_options,
    make_model_call,
    single_argument,
)
from jaxbn._collect import collect_linen, collected_variable, nested
from jaxbn._compat import applied_mutable
from jaxbn._layer import Call, Layer
from jaxbn._options import ExampleWeight, Limits, PerId, Prior, Running
from jaxbn._running import RunningStats
from jaxbn._scope import Scope
from jaxbn._state import State, no_moments, record

__all__ = ["BatchNorm", "batch_moments"]


class BatchNorm(nn.Module):
    """Drop-in for `flax.linen.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. Same fields, call arguments, variables and dtype of the result
    as flax, so checkpoints move both ways. What differs: every kept value
    counts equally whatever device it lies on, the variance does not cancel,
    an empty batch leaves the running statistics alone, and an `axis_name`
    that is not bound means that the array is already global.

    With momentum=None all batches weigh the same. That, running.debias and a
    renorm that is a function add the variable `steps` to batch_stats, int32 of the
    shape of mean. Where `mutable` names the collection `batch_moments`, the
    layer leaves the Moments of the batch there, not where True or a DenyList
    takes the collection in; see `batch_moments`.

    Attributes:
      use_running_average: True normalizes with the running statistics.
      axis: the feature axis, or axes, of the input.
      momentum: weight of the old running value (the core's decay).
      epsilon: added to the variance, unit of the input squared.
      dtype: of the result; None infers it from input and parameters.
      param_dtype: of scale and bias.
      use_bias: adds bias, (C,).
      use_scale: multiplies by scale, (C,).
      bias_init: initializer of bias; of each of its rows, (C,), where it has
        one an id. Partition names are those of a row.
      scale_init: likewise of scale.
      axis_name: named axis, or axes, to take statistics over.
      axis_index_groups: see `Scope`.
      use_fast_variance: has no effect; the variance is always taken from
        squared deviations.
      force_float32_reductions: has no effect; reductions and the running
        statistics that the layer makes are always float32 or wider.
      sharing: which examples share statistics: groups of devices, so many
        examples on any topology, ids; see `Scope`.
      per_id: what ids choose a row of, where sharing.num_ids is K: "statistics",
        (K, C); "affine", scale and bias, (K, C), while all examples share
        statistics (class-conditional batch norm); or "both".
      running: how running statistics are kept, and whether they are frozen;
        see `Running`.
      renorm: (r_max, d_max) of `jaxbn.batch_renorm`, or a function of the
        number of batches so far that returns them, such as
        `jaxbn.renorm_limits`. None is batch norm.
      inference: a `Prior` or an `ExampleWeight`, which blend the batch into
        the running statistics in inference; None leaves it out.
      train_affine: False stops the gradient of scale and bias.

    Raises:
      ValueError: an option is out of its range, or two exclude each other.
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
        Layer.of(self)  # raises ValueError for options of no layer
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
          x: the input; features on `axis`. Integers are read as float32.
          use_running_average: see the attribute; give it in one place.
          mask: bool, broadcastable to x; False leaves a value out of the
            statistics.
          ids: (N,) integers in [0, K) where sharing.num_ids is K.
          timestep: (), integer, where running.num_timesteps is set.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: an argument does not fit x or the options; or see
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
        if initializing:  # outside of mapped axes
            layer = layer.alone()
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
        # Not where True or a DenyList takes them in: nobody asked for them
        # there, and variables that are passed back in would keep accumulating.
        by_name = isinstance(applied_mutable(self), Collection)
        return by_name and self.is_mutable_collection("batch_moments")


def _rows_of(
    init: nn.initializers.Initializer,
) -> nn.initializers.Initializer:
    """An initializer of (K, C), whose rows are independent."""

    def init_rows(
        key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Any:
        keys = jax.random.split(key, shape[0])
        rows = jax.vmap(lambda key: init(key, shape[1:], dtype))(keys)
        return nn.meta.add_axis(rows, 0, {nn.PARTITION_NAME: None})

    return init_rows


def batch_moments(
    model: nn.Module,
    variables: Any,
    *args: Any,
    call: ModelCall | None = None,
    rngs: Any = None,
    mutable: Collection[str] = (),
    **kwargs: Any,
) -> Any:
    """Returns the Moments of the batch of every layer, in training mode.

    A pure function, which changes no running statistic. A layer that is called
    several times has the moments of all its calls together. Layers inside of
    nn.scan or nn.vmap have theirs on the axis of their running statistics.

    Args:
      model: whose batch norm layers are jaxbn's; `jaxbn.convert.to_jaxbn`
        makes them so.
      variables: of the model.
      *args: of the call; with `call` the batch alone.
      call: (model, batch, train) -> output, where model is bound, as it is for
        `method` of flax, and train is True. None calls the model with the
        arguments given.
      rngs: a key, or a dict of them. None makes one for every stream.
      mutable: names of collections that the call creates. Those of variables
        may be written already, but for params.
      **kwargs: of the call, with what puts it into training mode, such as
        train=True.

    Returns:
      The tree of batch_stats with `jaxbn.Moments` in place of the dict of a
      layer; counts have the shape of mean. A layer that the call does not
      train is not in it: one in inference mode, one in a branch not taken. In
      a branch of nn.cond its counts are zero. Nor is anything else that lies in
      batch_stats.

    Raises:
      ValueError: no layer returned any, or a layer of flax was trained.
    """
    if call is not None:
        batch = single_argument(args, kwargs)
        args, kwargs = (batch, True), {"method": make_model_call(model, call)}
    kwargs.update(linen_options(variables, rngs, mutable))
    _, found, _ = collect_linen(model, variables, *args, **kwargs)
    return nested({path: part.values for path, part in found.items()})
