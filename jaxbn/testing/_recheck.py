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
        floor = 0 if a.role == "layer" else largest[a.role] / 10
        off = error(a.copies, true.copies[0], floor)
        if off > rtol:
            found[i] = off
    return found


def matters(got: Sequence[Array], wrong: dict[int, float]) -> bool:
    """Whether more differs than what layers return on the way."""
    return any(got[i].role != "layer" for i in wrong)


def _largest(arrays: Sequence[Array]) -> dict[str, float]:
    found: dict[str, float] = {}
    for a in arrays:
        size = float(np.linalg.norm(a.copies))
        found[a.role] = max(found.get(a.role, 0), size)
    return found


class Verdict(NamedTuple):
    """What float64 says of a difference.

    Attributes:
      wrong: the errors that remain, by the index of the array.
      note: why it is none; None where it is one.
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
        """Where a program cannot run in float64, a difference stands."""
        run = in_float64(got.program)
        try:
            exact = self._differences(got, run, 0)
            if not matters(got.arrays, exact):
                return Verdict({}, self._note(got, wrong))
            moved = self._differences(got, run, 1)
        except Exception:  # primitives without float64, too few such devices
            return Verdict(wrong, None)
        if not matters(got.arrays, moved):
            return Verdict({}, _kink(got, wrong))
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

    def _note(self, got: Results, wrong: dict[int, float]) -> str:
        want = self._want[0]
        largest = _largest(want)
        sizes = {
            i: float(np.linalg.norm(want[i].copies))
            / (largest[want[i].role] or 1)
            for i in wrong
            if want[i].role in ROLES
        }
        if max(sizes.values()) < self._rtol:
            return f"{_worst(got, wrong)}: rounding, of what is zero otherwise."
        gradients = all(want[i].role in ROLES[2:] for i in sizes)
        if gradients and max(wrong.values()) > 10 * self._rtol:
            return _kink(got, wrong)
        return f"{_worst(got, wrong)}: rounding."


def _moved(inputs: Any) -> list[np.ndarray]:
    """Returns leaves without special values; masks and classes stay."""
    rng = np.random.default_rng(0)
    variables, batch = map(jax.tree.leaves, inputs)
    found = []
    for i, leaf in enumerate([*variables, *batch]):
        leaf = np.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
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
