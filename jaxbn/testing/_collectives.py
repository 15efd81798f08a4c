"""Counts the collectives of a compiled program, such as for a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

#: Kinds of collectives, as named in HLO.
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_OPERATION = re.compile(
    rf"^\s*(?:ROOT )?\S+ = ([^=\n]*?) ({'|'.join(KINDS)})(-start)?\(", re.M
)
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S
)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}"
    r"|(?:true|false)_computation=(%?[\w.-]+))"
)
_ELEMENT = re.compile(r"\([^()]*\)|\w+\[[\d,]*\]")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Collectives of one kind.

    Attributes:
      count: number of operations in the program, however often each one runs.
      bytes: total size of their results on one device.
    """

    count: int  # type: ignore[assignment]
    bytes: int


class Collectives(dict[str, Traffic]):
    """`Traffic` by kind; kinds of KINDS that do not occur read as (0, 0).

    Attributes:
      conditional: Collectives in branches of conditionals, which may not run.

    Raises:
      KeyError: a key is not in KINDS.
    """

    conditional: Collectives

    def __missing__(self, kind: str) -> Traffic:
        if kind not in KINDS:
            raise KeyError(f"{kind!r} is no collective; take one of {KINDS}.")
        return Traffic(0, 0)


def collectives(
    fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Collectives:
    """Counts the collectives in the compiled program of fn, without running it.

    Counts the operations of the optimized HLO, after XLA has merged and removed
    some, which may differ between backends. An operation counts once, however
    often it runs, even in the body of a loop; so does a pair of -start and
    -done. Branches of conditionals are counted in `.conditional`: there batch
    norm has the second reduction, for batches whose mean is far from the
    running mean, which an ordinary step does not run. A budget of a test reads
    `collectives(step, state, batch)["all-reduce"].count == 3`.

    Args:
      fn: a function, or the result of `jax.jit`.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: likewise.

    Returns:
      Collectives, with the count and bytes of each kind that occurs. Bytes are
      the size of the results on one device, summed over tuples: for an
      all-reduce the size of its input, for an all-gather that of the gathered
      array, for a reduce-scatter that of the device's part. They are not the
      bytes sent.

    Raises:
      KeyError: the result is indexed by a kind that does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> found = collectives(jnp.sum, jnp.ones(8))  # on one device
      >>> found["all-reduce"]
      Traffic(count=0, bytes=0)
    """
    return read_program(compiled_text(fn, *args, **kwargs))


def compiled_text(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Returns the optimized HLO of a function, or the result of `jax.jit`."""
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    text: str = jitted.lower(*args, **kwargs).compile().as_text()
    return text


def read_program(hlo: str) -> Collectives:
    """Returns the collectives in the HLO text of a module."""
    always, seldom = split_conditional(hlo)
    found = parse(always)
    found.conditional = parse(seldom)
    return found


def split_conditional(hlo: str) -> tuple[str, str]:
    """Returns the text of what always runs, and that of branches."""
    texts, bodies, entry = {}, {}, ""
    for found in _COMPUTATION.finditer(hlo):
        is_entry, name, bodies[found[2]] = found.groups()
        texts[name] = found[0]
        entry = name if is_entry else entry
    branches: set[str] = set()
    always = _reachable(entry, bodies, branches)
    seldom: set[str] = set()
    for name in branches:
        seldom |= _reachable(name, bodies, None)

    def text(names: set[str]) -> str:
        return "\n".join(texts[name] for name in texts if name in names)

    return text(always), text(seldom - always)


def _reachable(
    start: str, bodies: dict[str, str], branches: set[str] | None
) -> set[str]:
    """Returns the computations that start calls; adds branches to branches."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in seen or name not in bodies:
            continue
        seen.add(name)
        todo += _CALLED.findall(bodies[name])
        for listed, single in _BRANCHES.findall(bodies[name]):
            found = [n.strip(" %") for n in (listed or single).split(",")]
            if branches is None:
                todo += found
            else:
                branches.update(found)
    return seen


def parse(hlo: str) -> Collectives:
    """Returns the traffic by kind in lines of HLO."""
    found = Collectives()
    hlo = re.sub(r"/\*.*?\*/", "", hlo).replace("<=", "")
    for shape, kind, start in _OPERATION.findall(hlo):
        shape = re.sub(r"\{[^{}]*\}", "", shape)  # layouts
        # The others return (operands, results, state...) from their -start.
        if start and kind != "all-reduce":
            shape = _ELEMENT.findall(shape[1:-1])[1]
        count, size = found[kind]
        for bits, dims in _ARRAY.findall(shape):
            length = math.prod(int(n) for n in dims.split(",") if n)
            size += math.ceil(length * int(bits or 8) / 8)
        found[kind] = Traffic(count + 1, size)
    return found
