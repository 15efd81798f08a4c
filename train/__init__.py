"""Training ResNets with synchronized batch statistics."""

import os

# XLA sizes its CPU thread pool by this when JAX starts. With fewer threads
# than twice the number of simulated devices, collectives deadlock.
os.environ.setdefault("NPROC", str(max(16, os.cpu_count() or 1)))

# Exit codes besides 0 (success) and 1 (error).
# Stopped, or failed through no fault of its own: rerun the same command to
# resume. EX_TEMPFAIL in sysexits.h.
RESUME = 75
INTERRUPTED = 130  # Ctrl-C: can be resumed, but not automatically


class UserError(Exception):
    """An error that the user can fix; shown without a traceback."""


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint.

    Args:
      message: which step was saved.
      code: exit code of the program.
    """

    def __init__(self, message: str, code: int = RESUME):
        super().__init__(message)
        self.code = code
