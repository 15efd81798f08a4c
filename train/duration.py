"""The duration of a run, in epochs and steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train import UserError, data


def num_epochs(epochs: float) -> int:
    """Returns the number of epochs, of which the last may be a part."""
    return math.ceil(round(epochs, 6))


def tested_epochs(config: Any) -> list[int]:
    """Returns the epochs, from 1, after which a run is tested and recorded.

    Args:
      config: config of the run, or the contents of its config.json.
    """
    last, every = num_epochs(config["epochs"]), config.get("test_every", 1)
    tested = range(every, last, every) if every else ()
    return [*tested, last]


class Steps(NamedTuple):
    """Numbers of steps, one for each batch."""

    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        """Number of epochs, of which the last may be a part."""
        return -(-self.total // self.per_epoch)

    def of(self, epoch: int) -> int:
        """Returns the steps of an epoch; the last may have fewer."""
        return min(self.total - epoch * self.per_epoch, self.per_epoch)

    def before(self, epoch: int, batch: int) -> int:
        """Returns the number of steps before a batch of an epoch."""
        return min(epoch * self.per_epoch + batch, self.total)

    def left(self, epoch: int, batch: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, steps left in it) from a position to the end."""
        for each in range(epoch, self.epochs):
            yield each, self.of(each) - (batch if each == epoch else 0)


def count_steps(config: ConfigDict, dataset: data.Dataset) -> Steps:
    """Returns the numbers of steps, with full batches of the training split.

    Raises:
      UserError: there is none, or the total number of steps overflows int32.
    """
    examples = len(dataset.train.labels)
    steps = examples // config.batch_size
    if not steps:
        raise UserError(
            f"batch_size={config.batch_size} exceeds the {examples} "
            f"examples of {config.dataset} {config.train_split!r}."
        )
    # 9.9 x 48 is rounded up in floating point.
    total = math.ceil(round(config.epochs * steps, 6))
    if total >= 2**31:
        raise UserError(
            f"epochs={config.epochs:g} of {steps} steps exceed the limit of "
            "2^31 steps."
        )
    return Steps(steps, min(total, num_epochs(config.epochs) * steps))
