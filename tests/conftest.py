"""Eight simulated devices for every test, set before JAX starts."""

import os

# With fewer threads than twice the devices, collectives can wait for ever.
os.environ.setdefault("NPROC", "16")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
