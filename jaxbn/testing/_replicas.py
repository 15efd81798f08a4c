"""Checks that devices hold the same values."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxbn.testing._leaves import path_name, widest, without_keys


def assert_synchronized(
    tree: Any, *, stacked: bool = False, rtol: float = 0.0
) -> None:
    """Asserts that all devices hold the same values: no replica has drifted.

    JAX takes a program's word for it that an array is replicated, and reads
    only one copy. Here all copies that this process can address are compared;
    if an array is also sharded, the copies of each shard.

    Args:
      tree: pytree of `jax.Array`s, including random keys. Without `stacked`,
        other leaves are ignored, since they have only one copy.
      stacked: whether axis 0 of every leaf holds the replicas, as returned by
        jax.pmap.
      rtol: largest difference allowed, relative to the largest magnitude in the
        leaf. With 0, copies must be bitwise equal.

    Raises:
      AssertionError: the copies of a leaf differ; names the first such leaf,
        the devices, and the largest difference.
      ValueError: a stacked leaf has no axis 0, or the arrays are on several
        devices, but none of them has a second copy to compare with.
    """
    sizes: list[int] = []
    devices: set[str] = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = without_keys(leaf)
        parts: dict[str, dict[str, np.ndarray]] = {}
        if stacked and not np.ndim(leaf):
            raise ValueError(f"{path_name(path)!r} is a scalar: no axis 0.")
        if stacked:
            rows = enumerate(np.asarray(leaf))
            parts[""] = {f"replica {i}": row for i, row in rows}
        elif isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                copies = parts.setdefault(str(shard.index), {})
                copies[f"device {shard.device.id}"] = np.asarray(shard.data)
        for copies in parts.values():
            sizes.append(len(copies))
            devices.update(copies)
            _compare_copies(path_name(path), copies, rtol)
    if not stacked and len(devices) > max(sizes, default=1) == 1:
        raise ValueError(
            f"Arrays on {len(devices)} devices, and no second copy of any: "
            "nothing to compare. If axis 0 counts replicas, give stacked=True."
        )


def _compare_copies(
    name: str, copies: dict[str, np.ndarray], rtol: float
) -> None:
    (first, want), *others = copies.items()
    wide, errors = widest(want), {}
    for holder, got in others:
        same = (widest(got) == wide) | (np.isnan(widest(got)) & np.isnan(wide))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0, np.abs(widest(got) - wide)).max(initial=0)
        within = rtol and error <= rtol * np.abs(wide).max(initial=0)
        if not within and got.tobytes() != want.tobytes():
            errors[holder] = np.inf if np.isnan(error) else error
    if errors:
        raise AssertionError(
            f"{name!r} has drifted: {', '.join(errors)} differ from {first} by "
            f"up to {max(errors.values()):.2g} (allowed {rtol:.1g} of its "
            "largest magnitude)."
        )
