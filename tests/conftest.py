"""Eight simulated devices for every test, set before JAX starts."""

import os
import re
import tempfile
import zlib

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


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their markers
def pytest_collection_modifyitems(items):
    """Marks all but a sample of the cases of a test as slow.

    In files marked `sample(n)`, a case of a test with several runs in the fast
    suite if it is the first, or by a hash of its name one of n.
    """
    seen = set()
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is None:
            continue
        # Cases of pytest end in [...], those of absl in a number.
        test = re.sub(r"(\[.*|\d+)$", "", item.nodeid)
        chosen = zlib.crc32(item.nodeid.encode()) % marker.args[0] == 0
        if test in seen and not chosen:
            item.add_marker("slow")
        seen.add(test)
