"""Option groups of the batch norm layers."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax

from jaxbn._check_values import check_at_least, check_between, check_ddof
from jaxbn._checks import given_fields

PerId = Literal["statistics", "affine", "both"]
Mode = Literal["update", "keep", "frozen"]
Limits = tuple[float | jax.Array, float | jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How a layer updates its running statistics.

    Attributes:
      mode: behavior in training. "update": normalizes with the batch and
        updates the running statistics. "keep": normalizes with the batch
        without an update. "frozen": normalizes with the running statistics
        without an update, whatever use_running_average is.
      ddof: 0 stores the biased variance, 1 the unbiased one,
        m2 / (count - 1), as PyTorch. Normalization uses the biased one.
      debias: removes the bias towards the initial value; see `update_running`.
      skip_nonfinite: skips the update for batches with NaN or inf on any
        device; the variable `skipped` in batch_stats, () int32, counts them.
      num_timesteps: T, for recurrent networks. Calls take timestep, and each
        timestep has its own running statistics, (T, C); later timesteps use
        the last row.

    Raises:
      ValueError: a value is out of range.
    """

    mode: Mode = "update"
    ddof: int = 0
    debias: bool = False
    skip_nonfinite: bool = False
    num_timesteps: int | None = None

    __repr__ = given_fields

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                f"mode must be one of {get_args(Mode)}; got {self.mode!r}."
            )
        check_ddof(self.ddof)
        if self.num_timesteps is not None:
            check_at_least("num_timesteps", self.num_timesteps, 1)


@dataclasses.dataclass(frozen=True)
class Prior:
    """Blends running statistics with batch statistics in inference.

    Attributes:
      examples: weight of the running statistics, in examples; see `adapt`.

    Raises:
      ValueError: examples is negative.

    Source: Schneider et al. (2020), Improving robustness against common
    corruptions by covariate shift adaptation.
    """

    examples: float

    def __post_init__(self) -> None:
        check_at_least("examples", self.examples, 0)


@dataclasses.dataclass(frozen=True)
class ExampleWeight:
    """Includes each example in its own statistics in inference.

    Attributes:
      weight: weight of the example, in [0, 1]; see `normalize_weighted`.

    Raises:
      ValueError: weight is outside [0, 1].

    Source: Summers and Dinneen (2019), Four Things Everyone Should Know to
    Improve Batch Normalization.
    """

    weight: float

    def __post_init__(self) -> None:
        check_between("weight", self.weight, 0, 1)
