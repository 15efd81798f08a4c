"""Checkpoints that are damaged, unreadable, or of other code."""

import json
import os
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train import UserError, checksums
from train.checkpoint import Checkpoints, Progress
from train.state import TrainState

STEPS = (2, 4, 6)


def state_at(step, **params):
    mesh = jax.make_mesh((8,), ("data",))
    state = TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(0),
        params={"kernel": jnp.arange(6.0) * step, **params},
        batch_stats={"mean": jnp.ones(3) * step},
        opt_state=({"trace": jnp.ones((2, 3)) * step},),
        average=None,
        slow=None,
        frozen={},
    )
    return jax.device_put(state, NamedSharding(mesh, P()))


def like(**params):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
        state_at(0, **params),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step, accuracy in zip(STEPS, (0.9, 0.5, 0.7)):
            checkpoints.save(
                state_at(step), Progress(step), test_accuracy=accuracy
            )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run" / "checkpoints")


def restored(folder, want=None, **options):
    with Checkpoints(folder, **options) as checkpoints:
        return checkpoints.restore(want or like())


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def replace(path):
    path.unlink()
    path.mkdir()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def nested(path):
    path.write_text("[" * 100_000)


def test_what_is_saved_is_what_is_restored(folder):
    state, progress = restored(folder)
    chex.assert_trees_all_equal(state, state_at(6))
    assert progress == Progress(6)
    assert not [*folder.parent.glob("damaged*")]


@pytest.mark.parametrize(
    "how", [flip, truncate, empty, replace, pipe, nested, os.remove]
)
def test_damage_to_any_file_is_seen(how, written, tmp_path):
    """Of each file in turn: the state is never another one than was saved."""
    names = [path.relative_to(written / "6") for path in files(written / "6")]
    assert len(names) > 10
    for number, name in enumerate(names):
        copy = tmp_path / str(number)
        shutil.copytree(written / "6", copy)
        how(copy / name)
        later = name.as_posix() in checksums._LATER
        if later and how not in (replace, pipe):
            checksums.verify(copy)
            continue
        with pytest.raises(checksums.CorruptCheckpoint):
            checksums.verify(copy)


def newest_data(folder, step=6):
    """The file that holds the numbers."""
    found = (folder / str(step) / "state" / "ocdbt.process_0" / "d").iterdir()
    return max(found, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("how", [flip, truncate, replace])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(how, folder):
    how(newest_data(folder))
    with pytest.warns(UserWarning, match="step 6 is damaged") as warned:
        state, progress = restored(folder)
    assert len(warned) == 1
    chex.assert_trees_all_equal(state, state_at(4))
    assert progress == Progress(4)
    assert (folder.parent / "damaged-checkpoint-6").is_dir()
    assert not (folder / "6").exists()


@pytest.mark.parametrize("name", checksums._LATER)
@pytest.mark.parametrize("how", [flip, truncate, empty, os.remove])
def test_what_orbax_writes_for_itself_does_no_harm(how, name, folder):
    how(folder / "6" / name)
    state, _ = restored(folder)
    chex.assert_trees_all_equal(state, state_at(6))


def test_the_same_step_damaged_twice(folder):
    for aside in ("damaged-checkpoint-6", "damaged-checkpoint-6-2"):
        truncate(newest_data(folder))
        with (
            pytest.warns(UserWarning, match=f"and was moved to .*{aside};"),
            Checkpoints(folder) as checkpoints,
        ):
            assert checkpoints.restore(like())[1] == Progress(4)
            checkpoints.save(state_at(6), Progress(6), test_accuracy=0.7)
        assert (folder.parent / aside).is_dir()
    assert restored(folder)[1] == Progress(6)


def test_nothing_is_moved_where_nothing_is_left(folder):
    for step in STEPS:
        flip(newest_data(folder, step))
    before = files(folder.parent)
    with pytest.raises(
        UserError, match="All checkpoints in .* are damaged"
    ) as told:
        restored(folder)
    assert "They were not moved" in str(told.value)
    assert files(folder.parent) == before


def test_no_run_begins_again_beside_damaged_checkpoints(folder):
    shutil.move(folder / "6", folder.parent / "damaged-checkpoint-6")
    assert restored(folder)[1] == Progress(4)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="would restart from"):
        restored(folder)
    shutil.rmtree(folder.parent / "damaged-checkpoint-6")
    assert restored(folder) is None


def endless(path):
    """A file that is there and cannot be read, by root either."""
    path.unlink()
    path.symlink_to(path.name)


def test_what_cannot_be_read_is_not_damaged(folder):
    endless(newest_data(folder))
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(
        UserError, match="step 6 in .* cannot be read: Too many"
    ):
        restored(folder)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_permission_denied_is_not_damage(what, folder):
    path = newest_data(folder) if what == "file" else folder / "6"
    path.chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            restored(folder)
    finally:
        path.chmod(0o755)
    assert restored(folder)[1] == Progress(6)


def test_other_code_is_not_damage(folder):
    before = sorted(folder.parent.rglob("*"))
    for want, message in (
        (like(bias=jnp.ones(2)), re.escape("it has no ['params']['bias']")),
        (
            like(kernel=jnp.ones(7)),
            re.escape("['kernel'] is float32[6] and not float32[7]"),
        ),
        (
            like(kernel=jnp.ones(6, jnp.bfloat16)),
            re.escape("is float32[6] and not bfloat16[6]"),
        ),
    ):
        with pytest.raises(
            UserError, match=f"does not match this code: .*{message}"
        ):
            restored(folder, want)
    assert sorted(folder.parent.rglob("*")) == before


def test_what_orbax_cannot_restore_is_not_damage(folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    before = sorted(folder.parent.rglob("*"))
    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        message = "is intact but cannot be restored: MemoryError"
        with pytest.raises(UserError, match=message):
            checkpoints.restore(like())
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("how", [flip, truncate, empty, replace, endless])
def test_a_damaged_record_of_one_checkpoint_stops_nothing(how, folder):
    """Of the best one, of which the others need only its accuracy."""
    how(folder / "2" / "progress" / "metadata")
    state, _ = restored(folder)
    chex.assert_trees_all_equal(state, state_at(6))
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(like(), best=True)
        assert found[1] == Progress(6)
        checkpoints.save(state_at(8), Progress(8), test_accuracy=0.6)


def test_the_newest_two_and_the_best_are_kept(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(like())
        for step, accuracy in ((8, 0.4), (10, 0.9), (12, None)):
            checkpoints.save(
                state_at(step), Progress(step), test_accuracy=accuracy
            )
        checkpoints.wait()
        assert sorted(os.listdir(folder), key=int) == ["10", "12"]
        assert checkpoints.restore(like(), best=True)[1] == Progress(10)


def test_the_best_one_damaged_is_an_error_for_those_who_want_it(folder):
    flip(newest_data(folder, 2))
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.raises(
            UserError, match="step 2: state/.* has a wrong checksum"
        ):
            checkpoints.restore(like(), best=True)
        assert checkpoints.restore(like())[1] == Progress(6)


@pytest.mark.parametrize("name", ["a[1]", "a]", "back\\slash", "a*"])
def test_names_that_orbax_reads_as_patterns(name, tmp_path):
    with pytest.raises(UserError, match="Use another --workdir"):
        Checkpoints(tmp_path / name / "checkpoints")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["a b", "ü{x}", "100%", "a#b", "$x", "(1)"])
def test_names_that_it_does_not(name, tmp_path):
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state_at(2), Progress(1), test_accuracy=0.5)
    assert json.loads((folder / "2" / checksums.NAME).read_text())
    chex.assert_trees_all_equal(restored(folder)[0], state_at(2))
