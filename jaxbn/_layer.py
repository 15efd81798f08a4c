"""What a layer does with its variables, whichever framework owns them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arithmetic import widen
from jaxbn._checks import (
    AxisName,
    check_at_least,
    check_between,
    check_ddof,
    check_epsilon,
    check_limits,
    check_where,
    describe,
    is_known,
    split_axes,
)
from jaxbn._inference import normalize, normalize_weighted
from jaxbn._moments import merge
from jaxbn._normalize import normalize_batch
from jaxbn._passes import Moments
from jaxbn._renorm import batch_renorm
from jaxbn._running import (
    RunningStats,
    adapt,
    init_running,
    is_finite,
    update_running,
)
from jaxbn._scope import Scope

PerId = Literal["statistics", "affine", "both"]
Limits = tuple[float | jax.Array, float | jax.Array]


class State(NamedTuple):
    """The variables that training moves."""

    running: RunningStats  # (C,), with ids (K, C), with timesteps (T, C)
    skipped: jax.Array | None  # () batches left out; None: nobody counts


class Call(NamedTuple):
    """The arguments of one call, besides x and the variables."""

    inference: bool
    mask: jax.Array | None
    ids: jax.Array | None
    timestep: int | jax.Array | None
    dtype: Any  # of the result
    hand_out: bool  # moments also where normalization does not need them
    initializing: bool = False  # on as little as one value


@dataclasses.dataclass(frozen=True)
class Layer:
    """The options of a layer; `jaxbn.linen.BatchNorm` documents each."""

    axis: int | tuple[int, ...]
    momentum: float | None
    epsilon: float
    axis_name: AxisName
    axis_index_groups: Sequence[Sequence[int]] | None
    group_size: int | None
    normalize_over: int | None
    num_ids: int | None
    per_id: PerId
    skip_nonfinite: bool
    ddof: int
    debias: bool
    renorm: Limits | Callable[[jax.Array], Limits] | None
    frozen: bool
    update_stats: bool
    train_affine: bool
    num_timesteps: int | None
    example_weight: float
    prior: float | None

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_ddof(self.ddof)
        check_between("example_weight", self.example_weight, 0, 1)
        if self.momentum is not None:
            check_between("momentum", self.momentum, 0, 1)
            if self.debias and is_known(self.momentum) and self.momentum >= 1:
                raise ValueError(
                    f"debias=True needs momentum < 1; got {self.momentum}."
                )
        if self.prior is not None:
            check_at_least("prior", self.prior, 0)
        if self.num_timesteps is not None:
            check_at_least("num_timesteps", self.num_timesteps, 1)
        if self.renorm is not None and not callable(self.renorm):
            if len(self.renorm) != 2:
                raise ValueError(
                    "renorm must be (r_max, d_max), or a function that returns "
                    f"them; got {self.renorm}."
                )
            check_limits(*self.renorm)
        if self.per_id not in get_args(PerId):
            raise ValueError(
                f"per_id must be one of {get_args(PerId)}; got {self.per_id!r}."
            )
        if self.per_id != "statistics" and self.num_ids is None:
            raise ValueError(
                f"per_id={self.per_id!r} gives scale and bias a row for each "
                "id and needs num_ids; got num_ids=None."
            )
        scope = self.scope  # raises ValueError where its options are wrong
        if self.num_timesteps is not None and scope.num_ids is not None:
            raise ValueError(
                f"num_timesteps={self.num_timesteps} and "
                f"num_ids={self.num_ids} each give the running statistics "
                "rows; give one of them, or per_id='affine'."
            )
        if self.example_weight and self.prior is not None:
            raise ValueError(
                f"example_weight={self.example_weight} and prior={self.prior} "
                "are two ways to normalize in inference; give one of them."
            )

    @classmethod
    def of(cls, owner: Any) -> Layer:
        """Returns the layer whose options are attributes of owner."""
        fields = dataclasses.fields(cls)
        return cls(
            **{field.name: getattr(owner, field.name) for field in fields}
        )

    def alone(self) -> Layer:
        """Returns the layer for a batch that lies on this device."""
        return dataclasses.replace(
            self,
            axis_name=None,
            axis_index_groups=None,
            group_size=None,
            normalize_over=None,
        )

    @property
    def scope(self) -> Scope:
        """Which examples share statistics."""
        return Scope(
            group_size=self.group_size,
            axis_index_groups=self.axis_index_groups,
            normalize_over=self.normalize_over,
            num_ids=None if self.per_id == "affine" else self.num_ids,
        )

    def split_axes(
        self, x: jax.Array
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (feature axes, reduced axes) of x."""
        return split_axes(x, self.axis, name="axis")

    def affine_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of scale and bias, for features of size."""
        if self.num_ids is None or self.per_id == "statistics":
            return size
        return (self.num_ids, *size)

    @property
    def counts_steps(self) -> bool:
        """Whether the running statistics come with a count of batches."""
        scheduled = callable(self.renorm)
        return self.momentum is None or self.debias or scheduled

    def init(self, size: tuple[int, ...], dtype: Any) -> State:
        """Returns the state before the first batch, for features of size."""
        rows = self.scope.num_ids or self.num_timesteps
        shape = size if rows is None else (rows, *size)
        running = init_running(
            shape, dtype=dtype, count_steps=self.counts_steps
        )
        skipped = jnp.zeros((), jnp.int32) if self.skip_nonfinite else None
        return State(running, skipped)

    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | None,
        bias: jax.Array | None,
        state: State,
        call: Call,
    ) -> tuple[jax.Array, State, Moments | None]:
        """Returns y, the next state, and in training the batch's moments."""
        self.split_axes(x)
        mask = check_where(call.mask, x, name="mask")
        if (call.ids is None) != (self.num_ids is None):
            ids = None if call.ids is None else describe(jnp.asarray(call.ids))
            raise ValueError(
                "num_ids of the layer and ids of the call go together; got "
                f"num_ids={self.num_ids} and ids={ids}."
            )
        if not self.train_affine:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        # Without scale and bias nothing is left to choose per id.
        chooses = self.scope.num_ids or scale is not None or bias is not None
        row = self._row(call.timestep)
        running = _widened(_take(state.running, row))
        options = dict(
            ids=call.ids if chooses else None,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            dtype=call.dtype,
        )
        if call.inference or self.frozen:
            plain = not call.inference
            y = self._infer(x, scale, bias, running, mask, options, plain)
            if call.inference or not call.hand_out:
                return y, state, None
            batch = self._moments(x, mask, call.ids)
            return y, state, _in_row(batch, state.running, row)
        options.update(
            where=mask,
            axis_name=self.axis_name,
            scope=self.scope,
            shift=running.mean,
        )
        if self.renorm is None:
            y, batch = normalize_batch(
                x,
                scale,
                bias,
                # Whoever asks for moments is told of one value by its count.
                one_value=call.initializing or call.hand_out,
                **options,
            )
        else:
            limits = self.renorm
            if callable(limits):
                # counts_steps has seen to it that there are some.
                steps = cast("jax.Array", state.running.steps)
                limits = limits(jnp.max(steps))
            options.update(r_max=limits[0], d_max=limits[1])
            y, batch = batch_renorm(x, scale, bias, running=running, **options)
        handed = _in_row(batch, state.running, row)
        if not self.update_stats:
            return y, state, handed
        new = update_running(
            running,
            batch,
            decay=self.momentum,
            ddof=self.ddof,
            debias=self.debias,
            skip_nonfinite=self.skip_nonfinite,
        )
        skipped = state.skipped
        if skipped is not None:
            skipped = skipped + jnp.where(is_finite(batch), 0, 1)
        stored = as_stored(_put(state.running, new, row), state.running)
        return y, State(stored, skipped), handed

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
        if self.example_weight and not plain:
            return normalize_weighted(
                x,
                running.mean,
                running.var,
                scale,
                bias,
                weight=self.example_weight,
                where=where,
                **options,
            )
        if self.prior is None or plain:
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
        # The prior counts examples, the moments their values.
        _, axes = self.split_axes(x)
        values = 1
        for axis in axes[1:]:
            values *= x.shape[axis]
        adapted = adapt(running, batch, prior=self.prior * values)
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
            ids=None if self.scope.num_ids is None else ids,
            where=where,
            axis_name=self.axis_name,
            scope=self.scope,
            epsilon=self.epsilon,
            feature_axis=self.axis,
            one_value=True,
        )
        return batch

    def _row(self, timestep: int | jax.Array | None) -> jax.Array | None:
        """Index of the running statistics of a timestep; the last one stays."""
        if (timestep is None) != (self.num_timesteps is None):
            raise ValueError(
                "num_timesteps of the layer and timestep of the call go "
                f"together; got num_timesteps={self.num_timesteps} and "
                f"timestep={timestep}."
            )
        if timestep is None or self.num_timesteps is None:
            return None
        timestep = jnp.asarray(timestep)
        if timestep.ndim or not jnp.issubdtype(timestep.dtype, jnp.integer):
            raise ValueError(
                "timestep must be one integer for the whole batch; got "
                f"{describe(timestep)}."
            )
        return jnp.clip(timestep, 0, self.num_timesteps - 1)


def _take(running: RunningStats, row: jax.Array | None) -> RunningStats:
    if row is None:
        return running
    own: RunningStats = jax.tree.map(lambda a: a[row], running)
    return own


def _widened(running: RunningStats) -> RunningStats:
    return running._replace(mean=widen(running.mean), var=widen(running.var))


def as_stored(new: RunningStats, old: RunningStats) -> RunningStats:
    """Rounds to the dtype of old where its owner has cast it below float32.

    A loop that carries the state keeps its dtypes. The layer makes no state
    that narrow itself.
    """

    def stored(new: jax.Array, old: jax.Array) -> jax.Array:
        narrow = widen(old).dtype != old.dtype and not jnp.iscomplexobj(new)
        return new.astype(old.dtype) if narrow else new

    return new._replace(
        mean=stored(new.mean, old.mean), var=stored(new.var, old.var)
    )


def _put(
    running: RunningStats, new: RunningStats, row: jax.Array | None
) -> RunningStats:
    if row is None:
        return new

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        rows = rows.astype(np.promote_types(rows.dtype, new.dtype))
        return rows.at[row].set(new)

    rows: RunningStats = jax.tree.map(put, running, new)
    return rows


def _in_row(
    batch: Moments, running: RunningStats, row: jax.Array | None
) -> Moments:
    """The moments of a timestep among those of all, where the rest is empty."""
    if row is None:
        return batch
    every = jnp.broadcast_to(batch.count, batch.mean.shape)
    rows: Moments = jax.tree.map(
        lambda a: (
            jnp.zeros((len(running.mean), *a.shape), a.dtype).at[row].set(a)
        ),
        batch._replace(count=every),
    )
    return rows


def no_moments(running: RunningStats) -> Moments:
    """Returns the moments of nothing, an entry for each running statistic."""
    mean, var, _ = jax.tree.map(jnp.zeros_like, _widened(running))
    return Moments(var, mean, var)


def record(old: Moments, batch: Moments) -> Moments:
    """Adds a batch to the moments a layer hands out, whose shapes stay."""
    count = jnp.broadcast_to(batch.count, batch.mean.shape)
    return merge(old, batch._replace(count=count))
