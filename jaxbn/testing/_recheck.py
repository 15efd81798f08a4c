"""Whether a difference is more than rounding: the same program in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.testing._evaluate import ROLES, Array, Results, error
from jaxbn.testing._float64 import in_float64

# Of the allowed error: float64 has twice the digits of float32.
_AGREES = 1e-2


def differences(
    got: Sequence[Array], want: Sequence[Array], rtol: float
) -> dict[int, float]:
    """Returns the errors above rtol, by the index of the array."""
    largest = _largest(want)
    found = {}
    for i, (a, true) in enumerate(zip(got, want)):
        floor = largest[a.role] / 10 if a.role in ROLES and a.is_real else 0
        off = error(a.copies, true.copies[0], floor)
        if off > rtol:
            found[i] = off
    return found


def matters(got: Sequence[Array], wrong: dict[int, float]) -> bool:
    """Whether more differs than what layers return on the way."""
    return any(got[i].role != "layer" for i in wrong)


def _largest(arrays: Sequence[Array]) -> dict[str, float]:
    found = dict.fromkeys(ROLES, 0.0)
    for a in arrays:
        if a.role in ROLES and a.is_real:
            size = float(np.linalg.norm(a.copies))
            found[a.role] = max(found[a.role], size)
    return found


class Verdict(NamedTuple):
    """What float64 says of a difference.

    Attributes:
      wrong: the errors that remain, by the index of the array.
      note: why what differs does not in float64; None where it does there too.
    """

    wrong: dict[int, float]
    note: str | None


class Recheck:
    """Compares in float64: on the inputs, and close to them.

    Close to them, because a value that is zero but for rounding, in front of a
    ReLU, is so in float64 too.
    """

    def __init__(self, one: Results, inputs: Any, rtol: float):
        self._one, self._rtol = one, rtol
        self._run = in_float64(one.program)
        self._points = [jax.tree.leaves(inputs), _moved(inputs)]
        self._want: dict[int, list[Array]] = {}

    def __call__(self, got: Results, wrong: dict[int, float]) -> Verdict:
        """Reports the difference if the program cannot run in float64."""
        state = [got.arrays[i] for i in wrong if got.arrays[i].role == ROLES[0]]
        if any(error(a.copies, a.copies[0]) > self._rtol for a in state):
            return Verdict(wrong, None)  # no rounding tells devices apart
        run = in_float64(got.program)
        try:
            exact = self._differences(got, run, 0)
            if not matters(got.arrays, exact):
                return self._rounding(got, wrong)
            moved = self._differences(got, run, 1)
        except Exception:  # primitives without float64, too few such devices
            return Verdict(wrong, None)
        if not matters(got.arrays, moved):
            gradients = all(got.arrays[i].role not in ROLES[:2] for i in wrong)
            if gradients:
                return Verdict({}, _kink(got, wrong))
            return Verdict(
                wrong,
                "Close to these inputs it does not, in float64: it is a step, "
                "such as that of argmax where two values are equal.",
            )
        both = {i: off for i, off in wrong.items() if i in exact}
        return Verdict(both if matters(got.arrays, both) else exact, None)

    def _differences(
        self, got: Results, run: Any, point: int
    ) -> dict[int, float]:
        leaves = self._points[point]
        if point not in self._want:
            self._want[point] = self._one.replaced(self._run(leaves))
        want = self._want[point]
        if not all(
            np.isfinite(a.copies).all() for a in want if a.role in ROLES
        ):
            raise ValueError("There is nothing to compare with.")
        return differences(
            got.replaced(run(leaves)), want, self._rtol * _AGREES
        )

    def _rounding(self, got: Results, wrong: dict[int, float]) -> Verdict:
        """Of what agrees in float64: errors remain if values suffer from it."""
        want = self._want[0]
        largest = _largest(want)
        full = {
            i
            for i in wrong
            if want[i].role in ROLES
            and np.linalg.norm(want[i].copies)
            >= self._rtol * largest[want[i].role]
        }
        if not full:
            worst = _worst(got, wrong)
            return Verdict({}, f"{worst}: rounding, of what is zero otherwise.")
        if not any(want[i].role in ROLES[:2] for i in full):
            if max(wrong.values()) > 10 * self._rtol:
                return Verdict({}, _kink(got, wrong))
            return Verdict({}, f"{_worst(got, wrong)}: rounding.")
        return Verdict(
            wrong,
            "In float64 it does not: it is rounding, such as that of a "
            "variance taken as E[x^2] - E[x]^2 where the mean is large.",
        )


def _moved(inputs: Any) -> list[Any]:
    """Returns leaves without special values; masks and classes stay."""
    rng = np.random.default_rng(0)
    variables, batch = map(jax.tree.leaves, inputs)
    found: list[Any] = []
    for i, leaf in enumerate([*variables, *batch]):
        if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact):
            leaf = np.asarray(leaf)
            wide = leaf.astype(np.result_type(leaf.dtype, np.float64))
            if i < len(variables) or (wide != np.round(wide)).any():
                leaf = wide + 1e-3 * (1 + abs(wide)) * rng.random(wide.shape)
        found.append(leaf)
    return found


def _kink(got: Results, wrong: dict[int, float]) -> str:
    return (
        f"{_worst(got, wrong)}: a kink. At a zero in front of a ReLU, for "
        "instance, a rounding difference can flip a gradient."
    )


def _worst(got: Results, wrong: dict[int, float]) -> str:
    own = {i: off for i, off in wrong.items() if got.arrays[i].role in ROLES}
    i = max(own, key=own.__getitem__)
    return f"{got.arrays[i]} differs by {own[i]:.2g}, and not in float64"
