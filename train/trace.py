"""Profiles some steps with jax.profiler, for TensorBoard and Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax

from train.files import refuse_links

FIRST, STEPS = 10, 10  # dispatches; the first ones are slower


class Trace:
    """Context manager that writes a trace of a few dispatches.

    Args:
      folder: output directory; None disables tracing.
      say: called with a line that says where the trace is.
      dispatches: number of dispatches of the run; the trace of a short run
        begins earlier.

    Raises:
      UserError: the directory is or contains a symbolic link.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        say: Callable[[str], Any],
        dispatches: int,
    ):
        self._folder, self._say = folder, say
        self._first = min(FIRST, max(dispatches - STEPS, 0))
        self._seen, self._on = 0, False
        if folder is not None:
            refuse_links(folder, below=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, wait: Callable[[], Any]) -> Iterator[None]:
        """Context of one dispatch; wait blocks until earlier ones are done."""
        if self._folder is None:
            yield
            return
        if self._seen == self._first:
            wait()
            options = jax.profiler.ProfileOptions()
            # The Python tracer has crashed while checkpoint threads started
            # and ended.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                str(self._folder),
                create_perfetto_trace=True,
                profiler_options=options,
            )
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._seen):
            yield
        self._seen += 1
        if self._on and self._seen == self._first + STEPS:
            wait()
            self._stop()

    def _stop(self) -> None:
        if not self._on:
            return
        self._on = False
        jax.profiler.stop_trace()
        self._say(
            f"a trace of {self._seen - self._first} dispatches is in "
            f"{self._folder}; tensorboard --logdir {self._folder.parent}, or "
            "perfetto_trace.json.gz there in ui.perfetto.dev"
        )
