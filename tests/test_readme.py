"""What the README and the pages of the documentation show runs as it stands."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.sample(3)

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "train" / "why.md",
    *sorted((ROOT / "jaxbn" / "docs").glob("*.md")),
]

WITHOUT_CODE = ("design.md", "comparison.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks or page.name in WITHOUT_CODE
    exec(compile("\n".join(blocks), page.name, "exec"), {})
