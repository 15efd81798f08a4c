"""Training loops: ResNets that learn with synchronized batch statistics."""

import os

# XLA sizes its CPU thread pool by this when JAX starts. With fewer threads
# than twice the simulated devices, collectives wait for each other for ever.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))


class UserError(Exception):
    """Something the user can put right; shown as its message alone."""
