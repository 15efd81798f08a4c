"""Configs that cannot be trained, and what the error says."""

import re

import pytest

from tests.helpers.recipes import small_config
from train import UserError, loop
from train.norms import make_norm
from train.topology import make_topology
from train.workdir import open_workdir


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 60}, "devices, such as 56 or 64"),
        ({"batch_size": 4}, "devices, such as 8."),
        ({"batch_size": 512}, "batch_size=512 exceeds the 256 examples"),
        ({"epochs": 0}, "epochs must be in [1e-6, 1e6]; got 0."),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"dtype": "float8"}, "dtype='float8' is unknown"),
        ({"norm": "group"}, "norm='group' is unknown; choose from debiased, "),
        ({"mesh": "rows"}, "write the axes replica and data once each"),
        ({"mesh": "replica=3,data=2"}, "does not match 8 devices"),
        ({"mesh": "replica=3,data"}, "does not match 8 devices"),
        ({"norm_axes": "replica"}, "must be one of all, none, data"),
        ({"norm": "flax", "norm_axes": "none"}, "requires 'all'"),
        (
            {"norm_options": {"normalize_over": 7}},
            "norm='jaxbn': normalize_over=7 neither divides the 8 examples per "
            "device nor is a multiple that divides 8 devices; the nearest "
            "valid value is 8.",
        ),
        (
            {"norm": "ghost", "batch_size": 40},
            "norm='ghost': normalize_over=32 neither divides the 5 examples",
        ),
        (
            {"norm_options": {"normalize_over": 3}, "microbatches": 4},
            "normalize_over=3 neither divides the 2 examples per device nor "
            "is a multiple that divides 32 devices",
        ),
        (
            {"norm_options": {"normalize_over": 8}, "norm_axes": "none"},
            "norm_axes='none' and normalize_over=8 both choose the examples",
        ),
        (
            {"norm_options": {"ddof": 2}},
            "norm_options.ddof must be in [0, 1]; got 2.",
        ),
        ({"norm_momentum": 2.0}, "momentum must be in [0, 1]; got 2.0."),
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1)"),
        ({"on_nonfinite": "warn"}, "on_nonfinite='warn' is unknown"),
        ({"checkpoint_every": -1}, "checkpoint_every must be in [0, "),
        ({"microbatches": 3}, "microbatches=3 does not divide the 8 examples"),
        ({"num_seeds": 0}, "num_seeds must be in [1, 10000]; got 0."),
        ({"steps_per_dispatch": -1}, "steps_per_dispatch must be in [0, "),
        ({"model": "resnext"}, "model='resnext' is unknown"),
    ],
)
def test_config_that_cannot_run(changes, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("over", [1, 2, 4, 16, 64])
def test_normalize_over_that_fits_the_microbatches(over):
    config = small_config(norm_options={"normalize_over": over}, microbatches=4)
    topology = make_topology("data", config.batch_size, config.microbatches)
    for microbatches in (1, 4):
        norm = make_norm(config, topology, microbatches=microbatches)
        assert norm().sharing.normalize_over == over


@pytest.mark.parametrize(
    "name, value",
    [
        ("normalize_over", 8),
        ("debias", True),
        ("ddof", 1),
        ("mode", "frozen"),
        ("skip_nonfinite", True),
        ("train_affine", False),
    ],
)
def test_every_documented_option_of_the_layer(name, value):
    known = [*small_config().norm_options]
    assert name in known and len(known) == 6
    config = small_config(norm_options={name: value})
    layer = make_norm(config, make_topology("data", config.batch_size))()
    places = (layer, layer.sharing, layer.running)
    found = [getattr(p, name) for p in places if hasattr(p, name)]
    assert value in found


@pytest.mark.parametrize(
    "changes", [{"norm": "none"}, {"model": "preact"}, {"model": "wide"}]
)
def test_muon_needs_norms(changes, tmp_path):
    config = small_config(optimizer="muon", **changes)
    with pytest.raises(UserError, match="a norm layer must follow each conv"):
        loop.train(config, tmp_path / "run")


def test_an_axis_of_statistics_fixes_the_mesh(tmp_path):
    def opened(mesh, axes):
        config = small_config(mesh=mesh, norm_axes=axes)
        open_workdir(tmp_path / axes, config)
        (tmp_path / axes / "metrics.jsonl").write_text("{}")

    opened("replica=2,data=4", "all")
    opened("replica=4,data=2", "all")
    opened("replica=2,data=4", "data")
    with pytest.raises(UserError, match="another run, with mesh="):
        opened("replica=4,data=2", "data")
