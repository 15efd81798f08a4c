"""Converts a state dict of PyTorch to variables of flax, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import numpy as np

from jaxbn.convert._torch_fit import Skipped, fit
from jaxbn.convert._torch_kinds import (
    Name,
    Problems,
    kind_in_torch,
    module_to_flax,
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

    A module with running statistics is a batch norm. Other weights are
    classified by their number of axes: 2 is "linear", (out, in) -> (in, out); 3
    to 5 is "conv", (out, in, *window) -> (*window, in, out), grouped or not.
    Specify what this leaves open or gets wrong in kinds:

    - "conv_transpose": flax's ConvTranspose; the window is flipped.
    - "conv_transpose_kernel": the same with transpose_kernel=True.
    - "embedding": (entries, features) on both sides.
    - "norm": weight is the scale of a LayerNorm, GroupNorm or the like.
    - "batch_norm_untracked": a batch norm with track_running_stats=False;
      flax's running statistics are set to mean 0 and variance 1. With
      affine=False it is not in the state dict, and like determines its number
      of channels.
    - "same": params of the same names and layouts.

    num_batches_tracked becomes `steps` if like has it, and is dropped
    otherwise.

    Args:
      state_dict: name -> numpy array or torch tensor.
      kinds: path of a module, such as "encoder.0" -> kind.
      rename: path of a module in PyTorch -> path in flax, such as "a/b". In a
        mapping, the longest key that a path starts with is replaced, and "."
        becomes "/" in the rest; a function maps whole paths.
      values_per_batch: n, the number of values per channel in a batch, which is
        batch size times height times width; or a mapping from paths, or what
        they start with, to n. PyTorch's running variance is unbiased, n / (n -
        1) times that of flax; this removes the factor (also from what remains
        of the initial value 1). None keeps the variance, so that inference
        equals PyTorch's.
      like: variables of the flax model, or their shapes, that the result must
        match. Dtypes are those of like, or without it those of state_dict.
      skip: paths of modules or names of entries, on either side, to leave out
        with everything below them, such as the old head in fine-tuning. The
        result has the values of like instead.
      strict: False also leaves out whatever does not match, and lists it.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of new numpy arrays.
      With strict=False, a pair of that and a list with a line for each
      mismatch; the values of like replace what is missing.

    Raises:
      ValueError: something does not match; everything that does not is listed.
    """
    problems = Problems(strict)
    skipped, wanted = Skipped(skip), None if like is None else flatten(like)
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
            made[_VAR] = scaled(made[_VAR], (n[path] - 1) / n[path])
        for (collection, name), a in made.items():
            key = collection, join("/", renamed[path], name)
            if (collection, name) == _STEPS and key not in (wanted or ()):
                continue
            if key in flat:
                problems.wrong.append(
                    f"{'/'.join(key)} comes from several modules"
                )
            # A copy: PyTorch updates its tensors in place.
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
