"""What the package promises of itself."""

import inspect
import subprocess
import sys

import jaxbn


def test_core_imports_without_flax():
    script = (
        "import sys, jaxbn\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'flax']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_all_names_what_is_there():
    public = {
        name
        for name, value in vars(jaxbn).items()
        # Modules are there where a test has imported them.
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(jaxbn.__all__)
