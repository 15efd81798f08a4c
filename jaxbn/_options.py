"""The options of a layer that belong together, a class for each group."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax

from jaxbn._checks import (
    check_at_least,
    check_between,
    check_ddof,
    given_fields,
)

PerId = Literal["statistics", "affine", "both"]
Mode = Literal["update", "keep", "frozen"]
Limits = tuple[float | jax.Array, float | jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How a layer keeps its running statistics.

    Attributes:
      mode: what they do in training. "update": the batch normalizes, and they
        take it in. "keep": the batch normalizes, and they stay as they are.
        "frozen": they normalize in training too and stay as they are, whatever
        use_running_average says.
      ddof: 0 stores the biased variance, 1 the unbiased one,
        m2 / (count - 1), as PyTorch does. Normalization takes the biased one.
      debias: what they start from counts nothing; see `update_running`.
      skip_nonfinite: a batch with a NaN or inf on any device changes none of
        them; the variable `skipped` in batch_stats, () int32, counts these
        batches.
      num_timesteps: T; the call takes timestep, each has running statistics
        of its own, (T, C), and those of the last serve any later one. For
        recurrent nets.

    Raises:
      ValueError: a value is out of its range.
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
    """In inference running statistics are blended with those of the batch.

    Attributes:
      examples: the running statistics count as that many; see `adapt`.

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
    """In inference an example counts in the statistics that normalize it.

    Attributes:
      weight: share of its own statistics, in [0, 1]; see `normalize_weighted`.

    Raises:
      ValueError: weight is outside [0, 1].

    Source: Summers and Dinneen (2019), Four Things Everyone Should Know to
    Improve Batch Normalization.
    """

    weight: float

    def __post_init__(self) -> None:
        check_between("weight", self.weight, 0, 1)
