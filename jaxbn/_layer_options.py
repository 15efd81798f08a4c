"""The options of a layer and their validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence, Sized
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp

from jaxbn._axis_names import AxisName
from jaxbn._check_values import (
    check_between,
    check_epsilon,
    check_limits,
    is_known,
)
from jaxbn._checks import split_axes
from jaxbn._options import ExampleWeight, Limits, PerId, Prior, Running
from jaxbn._running import init_running
from jaxbn._scope import Scope
from jaxbn._state import State


@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """The options of a layer; `jaxbn.linen.BatchNorm` documents each."""

    axis: int | tuple[int, ...]
    momentum: float | None
    epsilon: float
    axis_name: AxisName
    axis_index_groups: Sequence[Sequence[int]] | None
    sharing: Scope
    per_id: PerId
    running: Running
    renorm: Limits | Callable[[jax.Array], Limits] | None
    inference: Prior | ExampleWeight | None
    train_affine: bool

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        for name, kinds in (
            ("sharing", (Scope,)),
            ("running", (Running,)),
            ("inference", (Prior, ExampleWeight, type(None))),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                known = " or ".join(
                    "None" if kind is type(None) else f"jaxbn.{kind.__name__}"
                    for kind in kinds
                )
                raise ValueError(f"{name} must be {known}; got {value!r}.")
        if self.momentum is not None:
            check_between("momentum", self.momentum, 0, 1)
            debias = self.running.debias
            if debias and is_known(self.momentum) and self.momentum >= 1:
                raise ValueError(
                    f"debias=True needs momentum < 1; got {self.momentum}."
                )
        if self.renorm is not None and not callable(self.renorm):
            if not isinstance(self.renorm, Sized) or len(self.renorm) != 2:
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
                f"per_id={self.per_id!r} needs sharing.num_ids, the rows of "
                "scale and bias; got num_ids=None."
            )
        shared = self.shared_by  # raises ValueError if invalid
        timesteps = self.running.num_timesteps
        if timesteps is not None and shared.num_ids is not None:
            raise ValueError(
                f"num_timesteps={timesteps} and num_ids={self.num_ids} both "
                "add rows to the running statistics; set only one of them, or "
                "per_id='affine'."
            )

    @classmethod
    def of(cls, owner: Any) -> Self:
        """Returns the layer whose options are attributes of owner."""
        fields = dataclasses.fields(cls)
        return cls(
            **{field.name: getattr(owner, field.name) for field in fields}
        )

    def unsynchronized(self) -> Self:
        """Returns the layer for a batch on a single device."""
        return dataclasses.replace(
            self,
            axis_name=None,
            axis_index_groups=None,
            sharing=Scope(num_ids=self.num_ids),
        )

    @property
    def num_ids(self) -> int | None:
        return self.sharing.num_ids

    @property
    def shared_by(self) -> Scope:
        """Which examples share statistics, with flax's axis_index_groups."""
        scope = self.sharing
        if self.per_id == "affine":
            scope = dataclasses.replace(scope, num_ids=None)
        if self.axis_index_groups is None:
            return scope
        if scope.axis_index_groups is not None:
            raise ValueError(
                "axis_index_groups is set twice, on the layer and in sharing; "
                "set it once."
            )
        return dataclasses.replace(
            scope, axis_index_groups=self.axis_index_groups
        )

    @property
    def is_frozen(self) -> bool:
        return self.running.mode == "frozen"

    def split_axes(
        self, x: jax.Array
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (feature axes, reduced axes) of x."""
        return split_axes(x, self.axis, name="axis")

    def affine_shape(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of scale and bias, for features of shape size."""
        if self.num_ids is None or self.per_id == "statistics":
            return size
        return (self.num_ids, *size)

    @property
    def counts_steps(self) -> bool:
        """Whether running statistics include the number of batches."""
        scheduled = callable(self.renorm)
        return self.momentum is None or self.running.debias or scheduled

    def init(self, size: tuple[int, ...], dtype: Any) -> State:
        """Returns the initial state, for features of shape size."""
        rows = self.shared_by.num_ids or self.running.num_timesteps
        shape = size if rows is None else (rows, *size)
        running = init_running(
            shape, dtype=dtype, count_steps=self.counts_steps
        )
        counts = self.running.skip_nonfinite
        return State(running, jnp.zeros((), jnp.int32) if counts else None)
