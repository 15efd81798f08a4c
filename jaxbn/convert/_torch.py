"""State dicts of PyTorch as variables of flax, and back, without torch."""

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
    kind_in_torch,
    module_to_flax,
    module_to_torch,
    to_array,
)
from jaxbn.convert._torch_names import (
    Rename,
    Values,
    join,
    kinds_of,
    new_paths,
    values_of,
    without_entries,
)

_COUNTER = "num_batches_tracked"
_STEPS = "batch_stats", "steps"
_VAR = "batch_stats", "var"


@overload
def from_torch(
    state_dict: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Any = None,
    skip: Iterable[str] = (),
    strict: Literal[True] = True,
) -> dict[str, dict[str, Any]]: ...


@overload
def from_torch(
    state_dict: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Any = None,
    skip: Iterable[str] = (),
    strict: Literal[False],
) -> tuple[dict[str, dict[str, Any]], list[str]]: ...


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Any = None,
    skip: Iterable[str] = (),
    strict: bool = True,
) -> Any:
    """Returns the variables of a flax model from a state dict of PyTorch.

    A module with running statistics is a batch norm. Other weights go by their
    number of axes: 2 is "linear", (out, in) -> (in, out); 3 to 5 is "conv",
    (out, in, *window) -> (*window, in, out), with groups or without. What
    that leaves open or gets wrong has to be said in kinds:

    - "conv_transpose": flax's ConvTranspose; the window is mirrored.
    - "conv_transpose_kernel": the same with transpose_kernel=True.
    - "embedding": (entries, features) on both sides.
    - "norm": the weight is the scale of a LayerNorm, GroupNorm or the like.
    - "batch_norm_untracked": a batch norm with track_running_stats=False; the
      running statistics that flax has start at 0 and 1. With affine=False it
      has no entry in the state dict, and like says how many channels it has.
    - "same": params of the same names and layouts.

    num_batches_tracked becomes `steps` where like has that; else it is left
    out.

    Args:
      state_dict: name -> numpy array or torch tensor.
      kinds: path of a module, such as "encoder.0" -> kind.
      rename: path of a module in PyTorch -> path in flax, such as "a/b". Of
        a mapping the longest key that a path begins with is replaced; a
        function takes the whole path. What is not renamed turns "." into "/".
      values_per_batch: n, how many values a channel had in a batch, the batch
        times height times width; or a mapping from paths, or what they begin
        with, to n. PyTorch's running variance is unbiased, n / (n - 1) times
        what flax holds; this takes the factor out. (What is left of the 1 it
        started from is divided too.) None leaves the number as it is, and
        inference then is that of PyTorch.
      like: variables of the flax model, or shapes, which the result must have.
        The dtypes are those of like too; without it those of state_dict.
      skip: paths of modules or names of entries, on either side, to leave out
        with all below them, such as the old head in fine-tuning. What like
        has for them is in the result.
      strict: False leaves out whatever does not fit, too, and says so.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of new numpy arrays.
      With strict=False a pair of that and a list that has a line for
      everything that does not fit; what is missing is that of like.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    problems = Problems(strict)
    skipped, wanted = Skipped(skip), None if like is None else _flat(like)
    skipped.check([*state_dict, *(name for _, name in wanted or ())], problems)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        leaves = modules.setdefault(path, {})
        if name not in skipped:
            leaves[leaf] = to_array(name, value)
    no_arrays = without_entries(kinds, modules)
    renamed = new_paths([*modules, *no_arrays], rename, (".", "/"), problems)
    skipped.drop(modules, renamed)
    modules.update(no_arrays)
    kinds = kinds_of(kinds, modules, kind_in_torch, problems)
    n = values_of(values_per_batch, modules, "running_var", ".", problems)

    flat: dict[Name, np.ndarray] = {}
    for path, kind in kinds.items():
        where = path or "the top level"
        mean = ("batch_stats", join("/", renamed[path], "mean"))
        size = (
            np.shape((wanted or {})[mean]) if mean in (wanted or ()) else None
        )
        made = module_to_flax(kind, modules[path], size, problems, where)
        if path in n and _VAR in made:
            made[_VAR] = _scaled(made[_VAR], (n[path] - 1) / n[path])
        for (collection, name), a in made.items():
            key = collection, join("/", renamed[path], name)
            if (collection, name) == _STEPS and key not in (wanted or ()):
                continue
            if key in flat:
                problems.wrong.append(
                    f"{'/'.join(key)} comes from several modules"
                )
            # A copy: a module that trains on moves its own tensors.
            flat[key] = np.array(a)
    flat = fit(wanted, flat, skipped, problems)
    left_out = problems.report()
    tree: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for (collection, path), a in flat.items():
        *parents, name = path.split("/")
        node = tree[collection]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = a
    return tree if strict else (tree, left_out)


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
    batch norm, other scales are "norm", "embedding" is told by its name, and a
    kernel of 2 axes is "linear", of 3 to 5 "conv". num_batches_tracked is what
    `steps` says, else 0; only momentum=None reads it. It is left out where
    like lacks it.

    Args:
      variables: {"params": ..., "batch_stats": ...}, nested mappings.
      kinds: path of a module, such as "encoder/0" -> kind.
      rename: path of a module in flax -> path in PyTorch, such as "a.b"; see
        `from_torch`. What is not renamed turns "/" into ".".
      values_per_batch: see `from_torch`; puts the factor n / (n - 1) in.
      like: state dict of the PyTorch model, whose names, shapes and dtypes the
        result must have.
      skip: see `from_torch`.
      strict: see `from_torch`.

    Returns:
      dict of new numpy arrays, which torch.from_numpy takes; bfloat16 as
      float32. With strict=False a pair of that and a list; see `from_torch`.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    problems = Problems(strict)
    skipped, given = Skipped(skip), _flat(variables)
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
            made["running_var"] = _scaled(made["running_var"], factor)
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


def _flat(variables: Any, path: tuple[str, ...] = ()) -> dict[Name, Any]:
    """(collection, path) -> leaf, of params and batch_stats."""
    found: dict[Name, Any] = {}
    for key, value in variables.items():
        at = (*path, str(key))
        if isinstance(value, Mapping):
            found |= _flat(value, at)
        elif at[0] in ("params", "batch_stats"):
            found[at[0], "/".join(at[1:])] = value
    return found


def _scaled(a: np.ndarray, factor: float) -> np.ndarray:
    return (a.astype(np.float64) * factor).astype(a.dtype)
