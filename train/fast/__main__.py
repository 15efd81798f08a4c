# ruff: noqa: E402
"""Trains in seconds on one GPU: python -m train.fast [--config FILE].

Override any field of the config with --config.seeds=3. Each seed is timed from
initialization to the end of evaluation, excluding compilation.
"""

from __future__ import annotations

from train import signals

if __name__ == "__main__":
    signals.exit_on_ctrl_c(
        "train.fast"
    )  # before the imports, which take seconds

import functools

from absl import app, flags, logging
from ml_collections import ConfigDict

from configs import fast_defaults
from train import cli, output
from train import flags as command_line


def _define() -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of summary.json. Default: runs/CONFIG-TIME.",
    )


_parse = functools.partial(
    command_line.parse,
    doc=__doc__,
    fields=fast_defaults,
    default="cifar10_94.py",
    define=_define,
)


def main(config: ConfigDict) -> None:
    """Runs all seeds."""
    command_line.simulate(config.cpu_devices)
    logging.set_verbosity(logging.ERROR)
    # Not before the number of devices is set.
    from train.fast import run

    workdir = command_line.workdir()
    run.train(config, workdir)
    output.say(f"Results are in {workdir}.")


if __name__ == "__main__":
    cli.run("train.fast", lambda _: app.run(main, flags_parser=_parse))
