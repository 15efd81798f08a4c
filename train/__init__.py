"""Training loops: ResNets that learn with synchronized batch statistics."""

import os

# XLA sizes its CPU thread pool by this when JAX starts. With fewer threads
# than twice the simulated devices, collectives wait for each other for ever.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))

# Exit codes of a run, besides 0 when it is done and 1 when something is wrong.
# Stopped, or ended with no fault of its own: the same command goes on.
# sysexits.h calls it EX_TEMPFAIL.
RESUME = 75
INTERRUPTED = 130  # Ctrl-C: the same command goes on, but nobody is to give it


class UserError(Exception):
    """Something the user can put right; shown as its message alone."""


class Stopped(Exception):
    """The run was asked to stop and has saved; the same command goes on.

    Args:
      message: which step was saved.
      code: that the program exits with.
    """

    def __init__(self, message: str, code: int = RESUME):
        super().__init__(message)
        self.code = code
