"""What a run reports of its epochs and steps."""

import json
import time

from tests.helpers.recipes import small_config
from train import loop


def test_speed_leaves_compilation_out(tmp_path, monkeypatch):
    prepare = loop.prepare

    def slow_to_compile(*arguments, **options):
        time.sleep(3)
        prepare(*arguments, **options)

    monkeypatch.setattr(loop, "prepare", slow_to_compile)
    loop.train(small_config(epochs=1), tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 256 / json.loads(line)["images_per_second"] < 3
