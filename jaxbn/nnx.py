"""`BatchNorm` for flax.nnx: variables only, the arithmetic is the core's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jaxbn._call import ModelCall, single_argument
from jaxbn._collect import collect_nnx
from jaxbn._layer import Call, Layer
from jaxbn._options import (
    ExampleWeight,
    Limits,
    PerId,
    Prior,
    Running,
)
from jaxbn._passes import Moments
from jaxbn._running import RunningStats
from jaxbn._scope import Scope
from jaxbn._state import State
from jaxbn._with_statistics import with_statistics

__all__ = [
    "BatchNorm",
    "batch_moments",
    "batch_norms",
    "set_statistics",
]


_SCOPE, _RUNNING = Scope(), Running()


class _FlaxOptions(TypedDict, total=False):
    """The options of `flax.nnx.BatchNorm`, as they are there."""

    use_running_average: bool
    axis: int
    momentum: Any  # a number, or None: all batches weigh the same
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
    """Drop-in for `flax.nnx.BatchNorm` with exact statistics.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with the statistics of
    the batch in training (see `jaxbn.batch_norm`) and the running ones in
    inference. A subclass: constructor, Variables, `train()`, `eval()` and
    `nnx.view` are flax's own, so checkpoints move both ways. What differs:
    every kept value counts equally whatever device it lies on, the variance
    does not cancel, an empty batch leaves the running statistics alone, and
    an `axis_name` that is not bound means that the array is already global.
    Flax rounds input, statistics, scale and bias to `dtype` before it
    computes; here only the result is rounded. The running statistics start in
    float32; where the input is float64 or complex, the first step in training
    gives them its dtype. Take it before a loop that carries the module and
    must keep dtypes. Statistics that were cast to a narrower dtype keep it:
    they are updated in float32 and rounded once.

    Args:
      num_features: C, the length of the feature axis.
      sharing: which examples share statistics: groups of devices, so many
        examples on any topology, ids; see `Scope`.
      per_id: what ids choose a row of, where sharing.num_ids is K:
        "statistics", (K, C); "affine", scale and bias, (K, C), while all
        examples share statistics (class-conditional batch norm); or "both".
        The rows start equal.
      running: how running statistics are kept, and whether they are frozen;
        see `Running`.
      renorm: (r_max, d_max) of `jaxbn.batch_renorm`, or a function of the
        number of batches so far that returns them, such as
        `jaxbn.renorm_limits`. None is batch norm.
      inference: a `Prior` or an `ExampleWeight`, which blend the batch into
        the running statistics in inference; None leaves it out.
      train_affine: False stops the gradient of scale and bias.
      **options: of `flax.nnx.BatchNorm`: use_running_average, axis, momentum
        (the core's decay; None weighs all batches equally), epsilon, dtype (of
        the result), param_dtype, use_bias, use_scale, bias_init, scale_init,
        axis_name, axis_index_groups (see `Scope`), promote_dtype (called to
        infer the dtype of the result alone), rngs, bias_metadata,
        scale_metadata. use_fast_variance has no effect: the variance is always
        taken from squared deviations.

    Attributes:
      mean: nnx.BatchStat, (C,), in the unit of the input; starts at 0.
      var: nnx.BatchStat, (C,), unit of the input squared; starts at 1.
      scale: nnx.Param, (C,), or None.
      bias: nnx.Param, (C,), or None.
      steps: nnx.BatchStat, int32 of the shape of mean, with momentum=None,
        running.debias, or a renorm that is a function; else None.

    Raises:
      ValueError: an option is out of its range, or two exclude each other.
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
          x: the input; features on `axis`. Integers are read as float32.
          use_running_average: goes before the attribute unless it is None.
          mask: bool, broadcastable to x; False leaves a value out of the
            statistics.
          ids: (N,) integers in [0, K) where sharing.num_ids is K.
          timestep: (), integer, where running.num_timesteps is set.

        Returns:
          Array of the shape of x.

        Raises:
          ValueError: use_running_average is None here and in the attribute;
            an argument does not fit x or the options; or see
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
                "call. Pass it in one of them, or call train() or eval() on "
                "the model."
            )
        x = jnp.asarray(x)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = self.mean[...], self.var[...]
        # Only for its dtype: a promoted x would be rounded, or kept for the
        # backward pass in a wider copy.
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
            # Not by index, which would round to the dtype of the old value.
            variables = (self.mean, self.var, *counters)
            for variable, value in zip(variables, (*new.running, new.skipped)):
                if variable is not None and value is not None:
                    variable.set_value(value)
        if return_moments:
            moments_out = self.moments.get_value()
            self.moments.set_value(moments_out.add(batch, epsilon=self.epsilon))
        return y


def batch_moments(
    model: nnx.Module, *args: Any, call: ModelCall | None = None, **kwargs: Any
) -> dict[str, Moments]:
    """Returns the Moments of the batch of every layer, in training mode.

    A pure function: it calls a copy, whose batch norm layers are in training
    mode; the other layers are in that of model.

    Args:
      model: whose batch norm layers are jaxbn's; `jaxbn.convert.to_jaxbn`
        makes them so.
      *args: of the call; with `call` the batch alone.
      call: (model, batch, train) -> output, where train is True. None calls
        the model with the arguments given.
      **kwargs: of the call.

    Returns:
      dict from the path of a layer, such as "blocks/0/norm", to
      `jaxbn.Moments`, whose counts have the shape of mean, in the order of the
      calls. A layer that is called several times has the moments of all its
      calls together; one that the call does not train is not in it.

    Raises:
      ValueError: a batch norm layer is not jaxbn's, or none was trained.
    """
    copy: Any = nnx.clone(model)
    for layer in batch_norms(copy).values():
        layer.use_running_average = False

    def run() -> None:
        if call is None:
            copy(*args, **kwargs)
        else:
            call(copy, single_argument(args, kwargs), True)

    found, _ = collect_nnx(batch_norms(copy), run)
    return {path: part.values for path, part in found.items()}


def set_statistics(model: nnx.Module, stats: Any, *, ddof: int = 0) -> None:
    """Puts means and variances into the batch norm layers of model.

    Args:
      model: whose layers take them; changed in place.
      stats: dict from the path of a layer to `jaxbn.Moments`, such as
        `jaxbn.precise.recompute` returns.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Raises:
      ValueError: a path or a shape does not fit. Nothing is changed then.
    """
    layers = batch_norms(model)
    old = {
        path: {"mean": layer.mean[...], "var": layer.var[...]}
        for path, layer in layers.items()
    }
    new = with_statistics(old, stats, ddof=ddof)
    for path, layer in layers.items():
        layer.mean.set_value(new[path]["mean"])
        layer.var.set_value(new[path]["var"])


def batch_norms(model: nnx.Module) -> dict[str, nnx.BatchNorm]:
    """Returns the batch norm layers of a model, flax's or jaxbn's, by path.

    Args:
      model: it stays as it is.

    Returns:
      dict from the path of a layer, such as "blocks/0/norm", to the layer
      itself, not a copy. One with several owners stands under one path.
    """
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
