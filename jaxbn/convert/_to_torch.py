"""Converts variables of flax to a state dict for PyTorch, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import numpy as np

from jaxbn.convert._torch_fit import Skipped, fit
from jaxbn.convert._torch_kinds import (
    Name,
    Problems,
    for_torch,
    kind_in_flax,
    module_to_torch,
    scaled,
    to_array,
)
from jaxbn.convert._torch_names import (
    Rename,
    Values,
    flatten,
    join,
    kinds_of,
    new_paths,
    values_of,
    without_entries,
)

_COUNTER = "num_batches_tracked"
_VAR = "batch_stats", "var"


@overload
def to_torch(
    variables: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
    strict: Literal[True] = True,
) -> dict[str, np.ndarray]: ...


@overload
def to_torch(
    variables: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
    strict: Literal[False],
) -> tuple[dict[str, np.ndarray], list[str]]: ...


def to_torch(
    variables: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
    strict: bool = True,
) -> Any:
    """Returns a state dict for PyTorch from the variables of a flax model.

    The inverse of `from_torch`. A module with mean and var in batch_stats is a
    batch norm, one with another scale "norm", and one with an embedding
    "embedding"; a kernel of 2 axes is "linear", of 3 to 5 "conv".
    num_batches_tracked is the value of `steps`, or 0 without it; PyTorch only
    uses it for momentum=None. It is dropped if like does not have it.

    Args:
      variables: {"params": ..., "batch_stats": ...}, nested mappings.
      kinds: path of a module, such as "encoder/0" -> kind.
      rename: path of a module in flax -> path in PyTorch, such as "a.b"; see
        `from_torch`. Otherwise "/" becomes ".".
      values_per_batch: see `from_torch`; multiplies by n / (n - 1).
      like: state dict of the PyTorch model, whose names, shapes and dtypes the
        result must have.
      skip: see `from_torch`.
      strict: see `from_torch`.

    Returns:
      dict of new numpy arrays, for torch.from_numpy; bfloat16 becomes float32.
      With strict=False, a pair of that and a list; see `from_torch`.

    Raises:
      ValueError: something does not match; everything that does not is listed.
    """
    problems = Problems(strict)
    skipped, given = Skipped(skip), flatten(variables)
    skipped.check([*(name for _, name in given), *(like or ())], problems)
    modules: dict[str, dict[Name, np.ndarray]] = {}
    for (collection, name), value in given.items():
        path, _, leaf = name.rpartition("/")
        leaves = modules.setdefault(path, {})
        if name not in skipped:
            array = to_array(f"{collection}/{name}", value)
            leaves[collection, leaf] = array
    problems.wrong += [
        f"collection {name!r} is neither params nor batch_stats"
        for name in variables
        if name not in ("params", "batch_stats")
    ]
    no_arrays = without_entries(kinds, modules)
    renamed = new_paths([*modules, *no_arrays], rename, ("/", "."), problems)
    skipped.drop(modules, renamed)
    modules.update(no_arrays)
    kinds = kinds_of(kinds, modules, kind_in_flax, problems)
    n = values_of(values_per_batch, modules, _VAR, "/", problems)

    flat: dict[str, np.ndarray] = {}
    for path, kind in kinds.items():
        where = path or "the top level"
        made = module_to_torch(kind, modules[path], problems, where)
        if path in n and "running_var" in made:
            factor = n[path] / (n[path] - 1)
            made["running_var"] = scaled(made["running_var"], factor)
        for name, a in made.items():
            key = join(".", renamed[path], name)
            if name == _COUNTER and like is not None and key not in like:
                continue
            if key in flat:
                problems.wrong.append(f"{key} comes from several modules")
            flat[key] = np.array(a)
    flat = fit(like, flat, skipped, problems)
    left_out = problems.report()
    state = {name: for_torch(a) for name, a in flat.items()}
    return state if strict else (state, left_out)
