"""Eight simulated devices for every test, set before JAX starts."""

import os
import tempfile

# With fewer threads than twice the devices, collectives can wait for ever.
os.environ.setdefault("NPROC", "16")

# A program that several tests compile is compiled once, in whatever process
# they run: those that pytest starts for a part of the tests, and the tests
# themselves, inherit it. It goes with the process that came first.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxbn-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
    """Turns LLVM's optimizations off; most of the time goes into compilation.

    What XLA makes of a program, fusions and collectives among it, is the same.
    Files marked `optimized` hold the tests of numerics: they compile as users
    do.
    """
    quick = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick)
