"""A folded model as bytes that need neither the model's code nor flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

# As jax.export names them. What is lowered for one alone is kept for that one.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Saved(NamedTuple):
    """A program of `jax.export`, and how its inputs and outputs are nested."""

    program: bytes
    inputs: Any  # the structure, with a number in place of each array
    outputs: Any


class Restored:
    """(params, *inputs) -> outputs, from bytes.

    Attributes:
      saved: what it was made from.
    """

    def __init__(self, saved: Saved):
        self.saved = saved
        self._program = jax.export.deserialize(bytearray(saved.program))
        self._inputs = jax.tree.structure(saved.inputs)
        self._outputs = jax.tree.structure(saved.outputs)

    def __call__(self, params: dict[str, jax.Array], *inputs: Any) -> Any:
        structure: Any
        leaves, structure = jax.tree.flatten(inputs)
        if structure != self._inputs:
            raise ValueError(
                f"inputs must be nested as {self._inputs}; got {structure}."
            )
        try:
            outputs = self._program.call(params, leaves)
        except ValueError as error:
            raise ValueError(
                "A pickled Folded takes the shapes that it was folded for, "
                "with any number of examples where the model allows it: "
                f"{[str(aval) for aval in self._program.in_avals]}. {error}"
            ) from error
        return jax.tree.unflatten(self._outputs, outputs)


def save(apply: Callable[..., Any], params: Any, inputs: Any) -> Saved:
    """apply: (params, *inputs) -> outputs; inputs: shapes and dtypes."""
    specs, structure = jax.tree.flatten(inputs)
    outputs = jax.eval_shape(apply, params, *inputs)

    def flat(params: Any, leaves: Any) -> list[Any]:
        inputs = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(apply(params, *inputs))

    kinds = jax.eval_shape(lambda params: params, params)
    return Saved(
        _exported(jax.jit(flat), kinds, specs),
        jax.tree.unflatten(structure, range(len(specs))),
        jax.tree.map(lambda _: 0, outputs),
    )


def _exported(flat: Any, kinds: Any, specs: list[Any]) -> bytes:
    """Returns the program for any number of examples, if there is one."""
    (examples,) = jax.export.symbolic_shape("examples")
    real = [
        s for s in specs if jnp.issubdtype(s.dtype, jnp.inexact) and s.shape
    ]
    number = real[0].shape[0] if real else None

    def batched(chosen: Callable[[Any], bool]) -> list[Any]:
        return [
            jax.ShapeDtypeStruct(
                (examples, *spec.shape[1:]),
                spec.dtype,
                weak_type=spec.weak_type,
            )
            if spec.shape[:1] == (number,) and chosen(spec)
            else spec
            for spec in specs
        ]

    # Two numbers of a random key are not two examples.
    options = [
        batched(lambda spec: True),
        batched(lambda spec: spec in real),
        specs,
    ]
    attempts = [(o, p) for o in options for p in (_PLATFORMS, None)]
    for shapes, platforms in attempts:
        try:
            exported = jax.export.export(flat, platforms=platforms)
            return bytes(exported(kinds, shapes).serialize(vjp_order=1))
        except ImportError:  # jax.export asks for flatbuffers
            raise
        except Exception as error:  # whatever the model's code raises
            last = error
    raise last
