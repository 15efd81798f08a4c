"""Chips that programs are compiled for, none of which need be here.

TPUs are known to libtpu by name. A GPU is described to XLA's CUDA plugin by
the facts of its data sheet, as a text proto `GpuTargetConfigProto`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

_GIB = 2**30


class Target(NamedTuple):
    """A kind of chip.

    Attributes:
      platform: tpu or cuda.
      topology: of a small mesh, as `get_topology_desc` takes it.
      slice: of many chips.
      facts: of a GPU.
    """

    platform: str
    topology: str
    slice: str
    facts: dict[str, Any] = {}


def _gpu(**facts: Any) -> Target:
    return Target("cuda", "1x1x1", "1x1x8", facts)


TARGETS = {
    "v5e": Target("tpu", "v5e:2x2x1", "v5e:16x16"),
    "v5p": Target("tpu", "v5p:2x2x1", "v5p:4x4x4"),
    "v6e": Target("tpu", "v6e:2x2x1", "v6e:16x16"),
    "h100": _gpu(
        name="NVIDIA H100 80GB HBM3",
        capability=9,
        core_count=132,
        fpus_per_core=128,
        clock_rate_ghz=1.98,
        memory_bandwidth=3_352_320_000_000,
        device_memory_size=84_942_979_072,
        l2_cache_size=50 * 2**20,
        shared_memory_per_core=228 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
    ),
    "a100": _gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=8,
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        memory_bandwidth=2_039_000_000_000,
        device_memory_size=80 * _GIB,
        l2_cache_size=40 * 2**20,
        shared_memory_per_core=164 * 2**10,
        shared_memory_per_block_optin=163 * 2**10,
    ),
    "b200": _gpu(
        name="NVIDIA B200",
        capability=10,
        core_count=148,
        fpus_per_core=128,
        clock_rate_ghz=1.965,
        memory_bandwidth=8_000_000_000_000,
        device_memory_size=178 * _GIB,
        l2_cache_size=126 * 2**20,
        shared_memory_per_core=228 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
    ),
}

_EVERY_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 2**10,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
    # CUDA graphs with conditionals in them need 12.3.
    "runtime_version": '"12.9.0"',
    "driver_version": '"12.9.0"',
    "compile_time_toolkit_version": '"12.9.0"',
}

_PLUGINS = {
    "tpu": ("libtpu", "compile-tpu"),
    "cuda": ("jax_cuda12_plugin", "compile-gpu"),
}


def missing(name: str) -> str | None:
    """Returns what to install for a target, or None if it is there."""
    module, extra = _PLUGINS[TARGETS[name].platform]
    if importlib.util.find_spec(module) is not None:
        return None
    return (
        f"{name} needs {module}, which is not installed: in an environment of "
        f"its own, pip install -e '.[{extra}]'."
    )


def set_environment(names: list[str]) -> None:
    """Sets what JAX and the plugins read as they are imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    platforms = {TARGETS[name].platform for name in names}
    if "tpu" in platforms:
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            # Without it a second process fails on a lock file.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    if "cuda" in platforms:  # autotuning would run kernels
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def make_mesh(name: str, *, many: bool = False) -> Any:
    """Returns the mesh, with the axis `data`, of chips that are not here.

    Args:
      name: of a target.
      many: a slice of 64 to 256 TPUs, or 8 GPUs; else 4 TPUs or one GPU.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    target = TARGETS[name]
    shape = target.slice if many else target.topology
    if target.platform == "tpu":
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=shape
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            target_config=target_config(target),
            topology=shape,
        )
    devices = np.array(topology.devices).reshape(-1)
    return jax.sharding.Mesh(devices, ("data",))


def target_config(target: Target) -> str:
    """Returns the text proto that describes a GPU."""
    facts = dict(target.facts)
    name, major = facts.pop("name"), facts.pop("capability")
    lines = [f"{key}: {value}" for key, value in (_EVERY_GPU | facts).items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"cuda_compute_capability {{ major: {major} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{name}"',
        ]
    )
