"""What the README shows runs as it stands."""

import pathlib
import re

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


def test_python_blocks_run_in_order():
    together = "\n".join(BLOCKS)
    exec(compile(together, "README.md", "exec"), {})
