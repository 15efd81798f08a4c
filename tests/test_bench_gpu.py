"""The benchmark for accelerators, in its quick form, on a CPU."""

import json

import pytest

from tests.bench import gpu


def test_bandwidth_is_measured_and_written(tmp_path, capsys):
    path = tmp_path / "found.json"
    gpu.main(["--quick", "--only", "copy", "--json", str(path)])
    rows = json.loads(path.read_text())["copy"]
    assert rows and all(row["copy GB/s"] > 0 for row in rows)
    assert "copy GB/s" in capsys.readouterr().out


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "norms"])
    assert "invalid choice: 'norms'" in capsys.readouterr().err
