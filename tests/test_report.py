"""What a run reports of its epochs and steps."""

import json
import time

from tests.helpers.recipes import small_config
from train import epoch, loop


def test_speed_leaves_compilation_out(tmp_path, monkeypatch):
    make = epoch.make_train_step

    def slow_to_compile(*arguments, **options):
        step, calls = make(*arguments, **options), []

        def first_slow(*arguments):
            if not calls:
                time.sleep(3)
            calls.append(None)
            return step(*arguments)

        return first_slow

    monkeypatch.setattr(epoch, "make_train_step", slow_to_compile)
    loop.train(small_config(epochs=1), tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 256 / json.loads(line)["images_per_second"] < 3
