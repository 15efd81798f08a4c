"""State dicts of PyTorch as variables of flax, and back, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn.convert._torch_kinds import (
    Name,
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
    compare,
    join,
    kinds_of,
    new_paths,
    raise_all,
    values_of,
)

_STEPS = "batch_stats", "steps"
_VAR = "batch_stats", "var"


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Any = None,
) -> dict[str, dict[str, Any]]:
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
      running statistics that flax has start at 0 and 1.
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

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts of new numpy arrays.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = to_array(name, value)
    wrong: list[str] = []
    renamed = new_paths(modules, rename, (".", "/"), wrong)
    kinds = kinds_of(kinds, modules, kind_in_torch, wrong)
    n = values_of(values_per_batch, modules, "running_var", ".", wrong)
    wanted = None if like is None else _flat(like)

    flat: dict[Name, np.ndarray] = {}
    for path, kind in kinds.items():
        leaves, problems = module_to_flax(kind, modules[path])
        wrong += [f"{path or 'the top level'}: {text}" for text in problems]
        if path in n and _VAR in leaves:
            leaves[_VAR] = _scaled(leaves[_VAR], (n[path] - 1) / n[path])
        for (collection, name), a in leaves.items():
            key = collection, join("/", renamed[path], name)
            if (collection, name) == _STEPS and key not in (wanted or ()):
                continue
            if key in flat:
                wrong.append(f"{'/'.join(key)} comes from several modules")
            # A copy: a module that trains on moves its own tensors.
            flat[key] = np.array(a)
    compare(wanted, flat, wrong)
    raise_all(wrong)
    tree: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for (collection, path), a in flat.items():
        *parents, name = path.split("/")
        node = tree[collection]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = a
    return tree


def to_torch(
    variables: Mapping[str, Any],
    *,
    kinds: Mapping[str, str] | None = None,
    rename: Rename = None,
    values_per_batch: Values = None,
    like: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Returns a state dict for PyTorch from the variables of a flax model.

    The inverse of `from_torch`. A module with mean and var in batch_stats is a
    batch norm, other scales are "norm", "embedding" is told by its name, and a
    kernel of 2 axes is "linear", of 3 to 5 "conv". num_batches_tracked is what
    `steps` says, else 0; only momentum=None reads it.

    Args:
      variables: {"params": ..., "batch_stats": ...}, nested mappings.
      kinds: path of a module, such as "encoder/0" -> kind.
      rename: path of a module in flax -> path in PyTorch, such as "a.b"; see
        `from_torch`. What is not renamed turns "/" into ".".
      values_per_batch: see `from_torch`; puts the factor n / (n - 1) in.
      like: state dict of the PyTorch model, whose names and shapes the result
        must have.

    Returns:
      dict of new numpy arrays, which torch.from_numpy takes; bfloat16 as
      float32.

    Raises:
      ValueError: something does not fit; all of it is listed.
    """
    modules: dict[str, dict[Name, np.ndarray]] = {}
    for (collection, name), value in _flat(variables).items():
        path, _, leaf = name.rpartition("/")
        array = to_array(f"{collection}/{name}", value)
        modules.setdefault(path, {})[collection, leaf] = array
    wrong = [
        f"collection {name!r} is neither params nor batch_stats"
        for name in variables
        if name not in ("params", "batch_stats")
    ]
    renamed = new_paths(modules, rename, ("/", "."), wrong)
    kinds = kinds_of(kinds, modules, kind_in_flax, wrong)
    n = values_of(values_per_batch, modules, _VAR, "/", wrong)

    flat: dict[str, np.ndarray] = {}
    for path, kind in kinds.items():
        leaves, problems = module_to_torch(kind, modules[path])
        wrong += [f"{path or 'the top level'}: {text}" for text in problems]
        if path in n and "running_var" in leaves:
            factor = n[path] / (n[path] - 1)
            leaves["running_var"] = _scaled(leaves["running_var"], factor)
        for name, a in leaves.items():
            key = join(".", renamed[path], name)
            if key in flat:
                wrong.append(f"{key} comes from several modules")
            flat[key] = for_torch(a)
    compare(like, flat, wrong)
    raise_all(wrong)
    return flat


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
