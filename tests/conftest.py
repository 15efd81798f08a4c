"""Eight simulated devices for every test, set before JAX starts."""

import os
import tempfile

# With fewer threads than twice the devices, collectives can wait for ever.
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# A program that several tests compile is compiled once.
_compiled = tempfile.TemporaryDirectory(prefix="jaxbn-compiled-")
jax.config.update("jax_compilation_cache_dir", _compiled.name)
