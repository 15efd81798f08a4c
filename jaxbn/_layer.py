"""The batch norm layer, independent of the module framework."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxbn._batch_norm import normalize_batch
from jaxbn._checks import check_where, describe
from jaxbn._inference import normalize, normalize_weighted
from jaxbn._layer_options import LayerOptions
from jaxbn._options import ExampleWeight
from jaxbn._passes import Moments
from jaxbn._renorm import batch_renorm
from jaxbn._running import (
    RunningStats,
    adapt,
    is_finite,
    update_running,
)
from jaxbn._state import State, as_stored, in_row, put_row, take_row, widened


class Call(NamedTuple):
    """The arguments of one call, besides x and the variables."""

    inference: bool
    mask: jax.Array | None
    ids: jax.Array | None
    timestep: int | jax.Array | None
    dtype: Any  # of the result
    return_moments: bool  # even if normalization does not need them
    initializing: bool = False  # allows statistics of a single value


class Layer(LayerOptions):
    """A batch norm layer, given its options."""

    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        state: State,
        call: Call,
    ) -> tuple[jax.Array, State, Moments | None]:
        """Returns y, the new state, and in training the batch moments."""
        self.split_axes(x)
        mask = check_where(call.mask, x, name="mask")
        if (call.ids is None) != (self.num_ids is None):
            ids = None if call.ids is None else describe(jnp.asarray(call.ids))
            raise ValueError(
                "sharing.num_ids of the layer and ids of the call must be "
                f"given together; got num_ids={self.num_ids} and ids={ids}."
            )
        if not self.train_affine:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        # Without rows of statistics, scale or bias, ids have no effect.
        chooses = (
            self.shared_by.num_ids or scale is not None or bias is not None
        )
        row = self._row(call.timestep)
        running = widened(take_row(state.running, row))
        options = dict(
            ids=call.ids if chooses else None,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            dtype=call.dtype,
        )
        if call.inference or self.is_frozen:
            plain = not call.inference
            y = self._infer(x, scale, bias, running, mask, options, plain)
            if call.inference or not call.return_moments:
                return y, state, None
            batch = self._moments(x, mask, call.ids)
            return y, state, in_row(batch, state.running, row)
        options.update(
            where=mask,
            axis_name=self.axis_name,
            sharing=self.shared_by,
            shift=running.mean,
        )
        if self.renorm is None:
            y, batch = normalize_batch(
                x,
                scale,
                bias,
                # Callers that ask for moments can check the count.
                allow_single_value=call.initializing or call.return_moments,
                **options,
            )
        else:
            limits = self.renorm
            if callable(limits):
                # Not None, by counts_steps.
                steps = cast("jax.Array", state.running.steps)
                limits = limits(jnp.max(steps))
            options.update(r_max=limits[0], d_max=limits[1])
            y, batch = batch_renorm(x, scale, bias, running=running, **options)
        moments_out = in_row(batch, state.running, row)
        if self.running.mode == "keep":
            return y, state, moments_out
        new = update_running(
            running,
            batch,
            decay=self.momentum,
            ddof=self.running.ddof,
            debias=self.running.debias,
            skip_nonfinite=self.running.skip_nonfinite,
        )
        skipped = state.skipped
        if skipped is not None:
            skipped = skipped + jnp.where(is_finite(batch), 0, 1)
        stored = as_stored(put_row(state.running, new, row), state.running)
        return y, State(stored, skipped), moments_out

    def _infer(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        running: RunningStats,
        where: jax.Array | None,
        options: dict[str, Any],
        plain: bool,
    ) -> jax.Array:
        inference = None if plain else self.inference
        if isinstance(inference, ExampleWeight):
            return normalize_weighted(
                x,
                running.mean,
                running.var,
                scale,
                bias,
                weight=inference.weight,
                where=where,
                **options,
            )
        if inference is None:
            return normalize(
                x,
                running.mean,
                running.var,
                scale,
                bias,
                where=where,
                **options,
            )
        batch = self._moments(x, where, options["ids"])
        # The prior is in examples, the count of moments in values.
        _, axes = self.split_axes(x)
        values = 1
        for axis in axes[1:]:
            values *= x.shape[axis]
        adapted = adapt(running, batch, prior=inference.examples * values)
        return normalize(
            x, adapted.mean, adapted.var, scale, bias, where=where, **options
        )

    def _moments(
        self,
        x: jax.Array,
        where: jax.Array | None,
        ids: jax.Array | None,
    ) -> Moments:
        _, batch = normalize_batch(
            x,
            ids=None if self.shared_by.num_ids is None else ids,
            where=where,
            axis_name=self.axis_name,
            sharing=self.shared_by,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            allow_single_value=True,
        )
        return batch

    def _row(self, timestep: int | jax.Array | None) -> jax.Array | None:
        """Returns the row of a timestep; later ones use the last row."""
        length = self.running.num_timesteps
        if (timestep is None) != (length is None):
            raise ValueError(
                "running.num_timesteps of the layer and timestep of the call "
                f"must be given together; got num_timesteps={length} and "
                f"timestep={timestep}."
            )
        if timestep is None or length is None:
            return None
        timestep = jnp.asarray(timestep)
        if timestep.ndim or not jnp.issubdtype(timestep.dtype, jnp.integer):
            raise ValueError(
                "timestep must be a scalar integer, for the whole batch; got "
                f"{describe(timestep)}."
            )
        return jnp.clip(timestep, 0, length - 1)
