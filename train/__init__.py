"""Training loops: ResNets that learn with synchronized batch statistics."""

import os

# XLA sizes its CPU thread pool by this when JAX starts. With fewer threads
# than twice the simulated devices, collectives wait for each other for ever.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))

# What a run exits with when the same command is to be given again. sysexits.h
# calls it EX_TEMPFAIL.
RESUME = 75


class UserError(Exception):
    """Something the user can put right; shown as its message alone."""


class Stopped(Exception):
    """The run was asked to stop and has saved; the same command goes on."""
