"""Compiles the programs of a fast run.

On accelerators an epoch is one program, a `lax.scan` over its batches, which
the host only launches. On CPUs, XLA runs convolutions inside loops many times
slower, so each step is a separate call. Both compute the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.data import Dataset, Split
from train.fast.recipe import Recipe
from train.fast.step import (
    Correct,
    EpochPlan,
    State,
    init_state,
    plan_epoch,
    test_step,
    train_step,
)

_NUMBER = np.int32(0)  # placeholder of a seed or an epoch


class Programs(NamedTuple):
    """Compiled functions with the data bound. States are donated."""

    init: Callable[[int], State]  # seed -> state
    # (state, seed, epoch) -> state, losses in nats, (steps,) or a list
    epoch: Callable[[State, int, int], tuple[State, Sequence[jax.Array]]]
    evaluate: Callable[[State], Correct]


def epochs(recipe: Recipe) -> int:
    """Returns the number of epochs, rounded up."""
    return math.ceil(recipe.steps / recipe.steps_per_epoch)


def epoch_signature(recipe: Recipe, epoch: int) -> tuple[int, bool]:
    """Returns the number of steps, and whether the whitening bias is trained.

    Epochs with equal signatures share a program. Both values are static: a
    loop of known length needs no host, a frozen bias no gradient.
    """
    left = recipe.steps - epoch * recipe.steps_per_epoch
    return min(left, recipe.steps_per_epoch), epoch < recipe.bias_epochs


def compile_programs(
    recipe: Recipe, dataset: Dataset, mesh: Mesh, *, scan: bool
) -> Programs:
    """Compiles all programs ahead of time.

    The returned functions never recompile: they would raise instead.

    Args:
      recipe: recipe of the run; seeds share programs.
      dataset: replicated on all devices.
      mesh: has the axis of the recipe, or a single device without one.
      scan: compiles an epoch and the evaluation as one program each; False
        compiles one program per step.
    """
    replicated = NamedSharding(mesh, P())
    train, test = jax.device_put((dataset.train, dataset.test), replicated)
    compiled = functools.partial(_compiled, mesh)
    signatures = {
        epoch_signature(recipe, epoch) for epoch in range(epochs(recipe))
    }

    init, state = compiled(
        functools.partial(init_state, recipe), train, _NUMBER
    )
    if scan:
        scanned = {
            each: compiled(
                functools.partial(_scanned_epoch, recipe, *each),
                *(state, train, _NUMBER, _NUMBER),
                donate=0,
            )[0]
            for each in signatures
        }
        evaluate, _ = compiled(
            functools.partial(_scanned_test, recipe), state, test
        )
        return Programs(
            init=lambda seed: init(train, np.int32(seed)),
            epoch=lambda state, seed, epoch: scanned[
                epoch_signature(recipe, epoch)
            ](state, train, np.int32(seed), np.int32(epoch)),
            evaluate=lambda state: evaluate(state, test),
        )

    plan_program, whole = compiled(
        functools.partial(plan_epoch, recipe), train, _NUMBER, _NUMBER
    )
    single = {
        train_bias: compiled(
            functools.partial(_indexed_step, recipe, train_bias),
            *(state, train, whole, _NUMBER),
            donate=0,
        )[0]
        for train_bias in {train_bias for _, train_bias in signatures}
    }
    test_batch, _ = compiled(
        functools.partial(test_step, recipe), state, test, _NUMBER
    )

    def epoch_by_steps(
        state: State, seed: int, epoch: int
    ) -> tuple[State, list[jax.Array]]:
        steps, train_bias = epoch_signature(recipe, epoch)
        batches = plan_program(train, np.int32(seed), np.int32(epoch))
        losses = []
        for number in range(steps):
            state, loss = single[train_bias](
                state, train, batches, np.int32(number)
            )
            # Simulated devices that run ahead of the host can deadlock.
            losses.append(jax.block_until_ready(loss))
        return state, losses

    def evaluate_by_steps(state: State) -> Correct:
        each = [
            jax.device_get(test_batch(state, test, start))
            for start in _starts(recipe, test)
        ]
        return Correct(*map(sum, zip(*each)))

    return Programs(
        init=lambda seed: init(train, np.int32(seed)),
        epoch=epoch_by_steps,
        evaluate=evaluate_by_steps,
    )


def _compiled(
    mesh: Mesh, function: Callable[..., Any], *arguments: Any, donate: Any = ()
) -> tuple[Any, Any]:
    """Returns the compiled function and the shapes of its results."""
    jitted = _jitted(mesh, function, donate)
    lowered = jitted.lower(*arguments)
    return lowered.compile(), jax.eval_shape(jitted, *arguments)


def _jitted(mesh: Mesh, function: Callable[..., Any], donate: Any = ()) -> Any:
    """Returns the jitted function on all devices of the mesh.

    Arguments and results are replicated.
    """
    replicated = NamedSharding(mesh, P())
    if mesh.size > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=P(), out_specs=P()
        )
    return jax.jit(
        function,
        in_shardings=replicated,
        out_shardings=replicated,
        donate_argnums=donate,
    )


def _scanned_epoch(
    recipe: Recipe,
    steps: int,
    train_bias: bool,
    state: State,
    train: Split,
    seed: jax.Array,
    epoch: jax.Array,
) -> tuple[State, jax.Array]:
    batches = plan_epoch(recipe, train, seed, epoch)

    def body(state: State, batch: EpochPlan) -> tuple[State, jax.Array]:
        return train_step(recipe, state, train, batch, train_bias=train_bias)

    return jax.lax.scan(body, state, jax.tree.map(lambda a: a[:steps], batches))


def _indexed_step(
    recipe: Recipe,
    train_bias: bool,
    state: State,
    train: Split,
    batches: EpochPlan,
    number: jax.Array,
) -> tuple[State, jax.Array]:
    batch = jax.tree.map(lambda a: a[number], batches)
    return train_step(recipe, state, train, batch, train_bias=train_bias)


def _scanned_test(recipe: Recipe, state: State, test: Split) -> Correct:
    starts = jnp.array(_starts(recipe, test))
    _, each = jax.lax.scan(
        lambda _, start: (None, test_step(recipe, state, test, start)),
        None,
        starts,
    )
    return jax.tree.map(lambda counts: counts.sum(), each)


def _starts(recipe: Recipe, test: Split) -> list[np.int32]:
    size = recipe.test_batch_size
    return [np.int32(start) for start in range(0, len(test.labels), size)]
