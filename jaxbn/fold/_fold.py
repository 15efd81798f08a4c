"""Folds batch normalization of inference into the layer next to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._compat import dtype_of, is_weakly_typed
from jaxbn.fold._model import FoldedModel, Model
from jaxbn.fold._report import Layer, report
from jaxbn.fold._rewrite import Rewritten
from jaxbn.fold._saved import Restored, Saved, save
from jaxbn.fold._trace import Program


class Difference(NamedTuple):
    """How far the folded function is from the original.

    Attributes:
      absolute: largest |folded - original| of any value, in its unit.
      relative: largest |folded - original| / |original| of any output, in the
        Euclidean norm.
    """

    absolute: float
    relative: float


class Folded(NamedTuple):
    """A model in inference mode, without its batch normalization.

    Attributes:
      apply: (params, *inputs) -> the outputs of the original model, under
        `jax.jit`. Inputs with the shapes of the examples run the program that
        was verified; for other shapes the model is traced and folded again.
      params: arrays by the path of the leaf that they replace: folded kernels,
        their biases, and all other leaves that are still needed.
      layers: a `Layer` for each use of a normalization.
      max_difference: `Difference` from the original, measured on random inputs
        with the shapes of the examples.

    Can be pickled if `flatbuffers` is installed. Unpickling does not need the
    model: apply is a program of `jax.export`, for any number of examples if the
    model can be traced with a symbolic one, otherwise for the shapes of the
    examples.
    """

    apply: Callable[..., Any]
    params: dict[str, jax.Array]
    layers: tuple[Layer, ...]
    max_difference: Difference

    def __reduce__(self) -> Any:
        run: Any = inspect.unwrap(self.apply)
        if isinstance(run, FoldedModel):
            saved = save(self.apply, self.params, run.inputs)
        else:
            saved = run.saved
        return _restore, (saved, *self[1:])


def _restore(saved: Saved, *fields: Any) -> Folded:
    return Folded(jax.jit(Restored(saved)), *fields)


def fold(
    apply: Callable[..., Any],
    variables: Any,
    *examples: Any,
    is_statistic: Callable[[str], bool] | None = None,
    on_unfoldable: Literal["raise", "keep"] = "raise",
    tolerance: float | None = None,
) -> Folded:
    """Folds each batch normalization into the kernel of an adjacent layer.

    With slope = scale / sqrt(var + epsilon), a convolution or dense layer
    followed by its normalization, (x * k + b - mean) * slope + shift, equals
    the layer with kernel k * slope, feature by feature, and bias (b - mean) *
    slope + shift. Layers that share a kernel are folded if the same
    normalization follows each of them.

    A normalization that does not follow such a layer is folded into the next
    layer, if that is a dense layer or a convolution without padding: with
    offset = shift - mean * slope, (x * slope + offset) k + b equals x (slope *
    k) + offset k + b.

    Layers are found in the traced program, not by names or modules; any other
    scaling or shifting of features in between is folded as well. Computed in
    float32 or wider; a kernel is rounded once, to its own dtype.

    The result is compared with the original on normally distributed inputs,
    with exact products (`jax.default_matmul_precision("highest")`). Integer,
    boolean and key inputs are those of the examples.

    Args:
      apply: (variables, *inputs) -> outputs, pure and in inference mode, such
        as lambda v, x: model.apply(v, x, train=False).
      variables: pytree of arrays.
      examples: one for each input: pytrees of arrays or jax.ShapeDtypeStruct. A
        few examples are enough.
      is_statistic: path, such as "bn/mean" -> whether that leaf is a running
        statistic. None selects all leaves in a top-level "batch_stats", except
        counters and state that kernels are computed from; without such a
        collection, leaves named mean and var next to each other.
      on_unfoldable: "raise", or "keep" to leave normalizations that cannot be
        folded as they are.
      tolerance: largest relative difference allowed. None is sqrt(eps) of the
        narrowest float in the program: 3e-4 for float32, 9e-2 for bfloat16.
        Rounding in a deep network stays below it, the error of a wrongly scaled
        kernel does not.

    Returns:
      Folded.

    Raises:
      ValueError: some normalizations cannot be folded, all of which are listed
        with the reason; there is no normalization; the folded function differs
        by more than the tolerance; or an argument is invalid.

    Source: Jacob et al. (2018), Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference, section 3.2.
    """
    if on_unfoldable not in ("raise", "keep"):
        raise ValueError(
            f'on_unfoldable must be "raise" or "keep"; got {on_unfoldable!r}.'
        )
    if not examples:
        raise ValueError("Give fold an example of every input of apply.")
    leaves = jax.tree.leaves(variables)
    model = Model(apply, variables, is_statistic)
    inputs = jax.tree.map(_random(np.random.default_rng(0)), examples)
    traced = model.trace(leaves, inputs)
    layers = report(traced.analysis)
    if not layers:
        raise ValueError(
            "apply calls none of the normalizations that variables hold."
        )
    complete = all(layer.kernel for layer in layers)
    if on_unfoldable == "raise" and not complete:
        raise ValueError(_refusal(layers))
    rewritten = Rewritten(traced.analysis)
    params = {name: leaves[i] for i, name in rewritten.kept.items()}
    params = jax.tree.map(jnp.asarray, params)
    params |= jax.jit(rewritten.parameters)(leaves)
    program = FoldedModel(model, params, rewritten, inputs)
    program.keep(inputs, traced)
    folded = jax.jit(program)
    # What is checked is the algebra, not the hardware's fast products.
    with jax.default_matmul_precision("highest"):
        want = jax.jit(model.original)(leaves, inputs)
        got = folded(params, *inputs)
    difference = _difference(got, want)
    if tolerance is None:
        tolerance = _half_the_digits(traced.analysis.program)
    if not difference.relative <= tolerance:  # so that a NaN fails
        raise ValueError(
            f"The folded function differs from the original by "
            f"{difference.relative:.1e}, relative, on random inputs, with a "
            f"tolerance of {tolerance:.1e}. Running means many times their "
            "standard deviation can do that. Give a larger tolerance, or fold "
            "in a wider dtype."
        )
    return Folded(folded, params, layers, difference)


def _refusal(layers: Sequence[Layer]) -> str:
    failed = [layer for layer in layers if layer.reason]
    lines = [f"BatchNorm {layer.norm!r} {layer.reason}." for layer in failed]
    return "\n".join(
        [
            f"{len(failed)} of {len(layers)} normalizations cannot be folded:",
            *lines,
            'on_unfoldable="keep" leaves them as they are.',
        ]
    )


def _random(rng: np.random.Generator) -> Callable[[Any], jax.Array]:
    def draw(example: Any) -> jax.Array:
        if not hasattr(example, "dtype"):
            example = jnp.asarray(example)
        if not jnp.issubdtype(example.dtype, jnp.inexact):
            if isinstance(example, jax.ShapeDtypeStruct):
                return jnp.zeros(example.shape, example.dtype)
            return jnp.asarray(example)
        drawn = rng.normal(size=example.shape)
        if is_weakly_typed(example) and not example.shape:
            return jnp.asarray(float(drawn))  # as a Python number is
        return jnp.asarray(drawn, example.dtype)

    return draw


def _difference(got: Any, want: Any) -> Difference:
    absolute: list[float] = []
    relative: list[float] = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            continue
        wide = complex if jnp.iscomplexobj(b) else float
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        if not np.isfinite(b).all():
            raise ValueError(
                "apply is not finite on normally distributed inputs."
            )
        absolute.append(float(np.abs(a - b).max(initial=0)))
        size, off = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
        relative.append(off / size if size else off and np.inf)
    if not absolute:
        raise ValueError(
            "apply returns nothing floating that could be compared; let it "
            "return logits in place of classes."
        )
    return Difference(float(np.max(absolute)), float(np.max(relative)))


def _half_the_digits(program: Program) -> float:
    dtypes = {dtype_of(value.aval) for value in program.values}
    floats = [d for d in dtypes if d and jnp.issubdtype(d, jnp.inexact)]
    return math.sqrt(max(float(jnp.finfo(d).eps) for d in floats))
