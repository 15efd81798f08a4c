"""What the package promises of itself."""

import fnmatch
import pathlib
import subprocess
import sys
import tomllib

import setuptools

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent.parent


def test_core_imports_nothing_but_jax():
    script = (
        "import sys, jax\n"
        "before = set(sys.modules)\n"
        "import jaxbn\n"
        "print(*(set(sys.modules) - before))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    packages = {name.partition(".")[0] for name in found}
    assert packages <= {"jax", "jaxbn", *sys.stdlib_module_names}
    # It takes as long as all of the core.
    assert not [name for name in found if name.startswith("jax._src.pallas")]


def test_wheel_holds_the_pages_and_not_their_settings():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = settings["tool"]["setuptools"]
    packages = setuptools.find_namespace_packages(
        ROOT, **settings["packages"]["find"]
    )
    assert "jaxbn" in packages and "jaxbn.testing" in packages
    for package in packages:
        assert (ROOT / package.replace(".", "/") / "__init__.py").exists()
    shipped = [
        path.name
        for path in (ROOT / "jaxbn" / "docs").iterdir()
        for pattern in settings["package-data"]["jaxbn"]
        if fnmatch.fnmatch(f"docs/{path.name}", pattern)
    ]
    assert "fold.md" in shipped and "conf.py" not in shipped
