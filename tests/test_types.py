"""Types: a strict checker accepts the package, and helps who uses it."""

import pathlib
import subprocess
import sys

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent.parent

USER = """
import jax

import jaxbn
import jaxbn.nnx
from flax import nnx
from jaxbn.linen import BatchNorm

x = jax.random.normal(jax.random.key(0), (8, 4))
y, batch = jaxbn.batch_norm(x, axis_name=("data", "model"), feature_axis=-1)
running = jaxbn.update_running(jaxbn.init_running(4), batch, decay=0.9)
var: jax.Array = running.var
norm = BatchNorm(axis_name="data", sharing=jaxbn.Scope(group_size=8))
jaxbn.batch_norm(x, eps=1e-5)  # wrong
jaxbn.Scope(group_size="8")  # wrong
steps: jax.Array = running.steps  # wrong
BatchNorm(momentum="0.9")  # wrong
BatchNorm(running=jaxbn.Running(mode="freeze"))  # wrong
jaxbn.nnx.BatchNorm(4, epsilon="1", rngs=nnx.Rngs(0))  # wrong
jaxbn.nnx.BatchNorm(4, eps=1e-5, rngs=nnx.Rngs(0))  # wrong
"""


def check(*arguments, **options):
    """Runs mypy: some 12 seconds without its cache, 1 with it."""
    return subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def test_strict_checker_accepts_the_package():
    found = check()
    assert not found.returncode, found.stdout + found.stderr
    assert (ROOT / "jaxbn" / "py.typed").exists()


def test_checker_tells_right_use_from_wrong(tmp_path):
    program = tmp_path / "user.py"
    program.write_text(USER)
    found = check("--strict", str(program)).stdout
    lines = USER.split("\n")
    want = {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}
    got = {
        int(line.split(":")[1])
        for line in found.splitlines()
        if ": error:" in line
    }
    assert got == want, found
