"""A checkpoint is whole or it is passed over; a write that fails leaves those before it valid."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.checkpoint.files import latest, open_checkpoint, save
from ebm_dist.core.errors import UserError
from ebm_dist.files import durable


def write(run_dir: Path, step: int, *, keep: int = 5) -> Path:
    tensors = {
        "learner": {"w": torch.full((300,), float(step)), "n": torch.tensor(step)},
        "shard_0000": {"position": np.full((50, 2), step, np.float32)},
    }
    return save(run_dir, step, tensors, {"name": "x", "list": [1, {"a": None}]}, keep=keep)


def test_what_was_saved_is_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, 4)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert found.skipped == ()
    assert found.names == ["learner", "shard_0000"]
    assert torch.equal(found.tensors("learner")["w"], torch.full((300,), 4.0))
    assert found.tensors("learner")["n"] == 4
    assert found.arrays("shard_0000")["position"].dtype == np.float32
    assert found.meta["list"] == [1, {"a": None}]


def test_a_run_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    for step in (2, 10, 100, 20):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000020",
        "step_00000100",
    ]


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 4)
    save(tmp_path, 4, {"learner": {"w": torch.zeros(3)}}, {}, keep=2)
    found = latest(tmp_path)
    assert found is not None
    assert found.names == ["learner"]
    assert found.tensors("learner")["w"].tolist() == [0, 0, 0]


def test_non_contiguous_and_half_precision_tensors_survive(tmp_path: Path) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    save(tmp_path, 1, {"learner": {"t": x.t(), "h": x.bfloat16()}}, {}, keep=1)
    found = latest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors("learner")["t"], x.t())
    assert torch.equal(found.tensors("learner")["h"], x.bfloat16())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = ("learner.safetensors", "shard_0000.safetensors", "meta.json", "checksums.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_with_a_line_and_the_one_before_is_used(
    damage, file: str, tmp_path: Path
) -> None:
    write(tmp_path, 4)
    damage(write(tmp_path, 8) / file)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert len(found.skipped) == 1
    assert "step_00000008" in found.skipped[0]
    assert "\n" not in found.skipped[0]


@pytest.mark.parametrize("file", FILES)
def test_every_single_bit_flip_is_found(file: str, tmp_path: Path) -> None:
    path = write(tmp_path, 8) / file
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(8 * len(content), size=40):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="step_00000008"):
            open_checkpoint(path.parent)
    path.write_bytes(content)
    assert open_checkpoint(path.parent).step == 8


def test_damage_to_every_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for step in (4, 8):
        truncate(write(tmp_path, step) / "learner.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint is whole.*--resume never"):
        latest(tmp_path)


def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    path = write(tmp_path, 4)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 9, this version reads up to 2"):
        open_checkpoint(path)


def test_a_half_written_directory_of_a_killed_process_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "checkpoints" / ".tmp-step_00000008-1").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 4
    assert found.skipped == ()


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_a_full_disk_leaves_the_checkpoints_before_valid(after: int, tmp_path, monkeypatch) -> None:
    """The disk refuses the write after `after` files or flushes of files."""
    write(tmp_path, 4)
    calls = 0

    def refusing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call

    for module, name in (
        (checkpoint, "save_tensors"),
        (checkpoint, "_write_json"),
        (durable, "sync"),
    ):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 8)
    monkeypatch.undo()
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, found.skipped) == (4, ())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000004"]
    write(tmp_path, 8)
    assert latest(tmp_path).step == 8  # type: ignore[union-attr]


def test_a_really_full_disk_is_an_os_error_too(tmp_path: Path) -> None:
    """safetensors raises a type of its own for it; a caller that goes on catches OSError."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        write(disk, 4)
        with pytest.raises(OSError, match="No space left") as raised:
            save(disk, 8, {"learner": {"w": torch.zeros(100_000)}}, {}, keep=2)
        assert raised.value.errno == errno.ENOSPC
        assert latest(disk).step == 4  # type: ignore[union-attr]
        write(disk, 8)
        assert latest(disk).step == 8  # type: ignore[union-attr]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_checksums_cannot_name_files_outside(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    (path / "checksums.json").write_text('{"../../secret": ""}')
    with pytest.raises(UserError, match="outside"):
        open_checkpoint(path)


# --- differences --------------------------------------------------------------------------------


def write_whole(run_dir: Path, step: int, *, keep: int = 5) -> checkpoint.Base:
    path = write(run_dir, step, keep=keep)
    return checkpoint.Base(path.name, checkpoint.checksum(path, "shard_0000"))


def write_difference(run_dir: Path, step: int, base: checkpoint.Base, *, keep: int = 5) -> Path:
    """Rows 3 and 7 of the shard are `step`; the others are as in `base`."""
    tensors = {
        "learner": {"w": torch.full((300,), float(step))},
        "shard_0000": {
            "position": np.full((2, 2), step, np.float32),
            "row": np.array([7, 3]),
        },
    }
    return save(run_dir, step, tensors, {"name": "x"}, keep=keep, bases={"shard_0000": base})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_difference_is_read_as_the_whole_it_stands_for(tmp_path: Path) -> None:
    base = write_whole(tmp_path, 4)
    write_difference(tmp_path, 8, base)
    write_difference(tmp_path, 12, base)
    found = latest(tmp_path)
    assert found is not None
    arrays = found.arrays("shard_0000")
    assert arrays.keys() == {"position"}
    expected = np.full((50, 2), 4, np.float32)
    expected[[3, 7]] = 12
    assert np.array_equal(arrays["position"], expected)


def test_what_a_kept_difference_refers_to_is_kept(tmp_path: Path) -> None:
    base = write_whole(tmp_path, 4, keep=1)
    for step in (8, 12, 16):
        write_difference(tmp_path, step, base, keep=1)
    assert names(tmp_path) == ["step_00000004", "step_00000016"]
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step_00000020"]


def test_with_two_or_more_kept_one_shares_no_file_with_the_newest(tmp_path: Path) -> None:
    first = write_whole(tmp_path, 4)
    write_difference(tmp_path, 8, first)
    second = write_whole(tmp_path, 12)
    for step in (16, 20, 24, 28):
        write_difference(tmp_path, step, second, keep=2)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (4, 8, 12, 24, 28)]
    # Whatever is damaged, something is left.
    flip_a_bit(tmp_path / "checkpoints" / "step_00000012" / "shard_0000.safetensors")
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 8
    assert len(found.skipped) == 3
    assert all("\n" not in line for line in found.skipped)
    assert "step_00000012/shard_0000.safetensors, to which it refers" in found.skipped[0]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_a_damaged_difference_is_passed_over_and_the_one_before_is_used(
    damage, file: str, tmp_path: Path
) -> None:
    base = write_whole(tmp_path, 4)
    write_difference(tmp_path, 8, base)
    damage(write_difference(tmp_path, 12, base) / file)
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, len(found.skipped)) == (8, 1)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
def test_damage_to_the_file_that_differences_refer_to_is_found_from_each_of_them(
    damage, tmp_path: Path
) -> None:
    write(tmp_path, 2)
    base = write_whole(tmp_path, 4)
    write_difference(tmp_path, 8, base)
    damage(tmp_path / "checkpoints" / "step_00000004" / "shard_0000.safetensors")
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, len(found.skipped)) == (2, 2)


def test_a_whole_copy_of_an_incremental_checkpoint_needs_no_other_one(tmp_path: Path) -> None:
    opened = open_checkpoint(write_difference(tmp_path, 8, write_whole(tmp_path, 4)))
    expected = {name: opened.arrays(name) for name in opened.names}
    (tmp_path / "copy").mkdir()
    checkpoint.write_whole(opened, tmp_path / "copy")
    shutil.rmtree(tmp_path / "checkpoints")
    copy = open_checkpoint(tmp_path / "copy")
    assert (copy.step, copy.names) == (8, sorted(expected))
    for name, arrays in expected.items():
        found = copy.arrays(name)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[key], value) for key, value in arrays.items())


def test_damage_to_another_file_of_the_base_costs_the_base_alone(tmp_path: Path) -> None:
    base = write_whole(tmp_path, 4)
    write_difference(tmp_path, 8, base)
    truncate(tmp_path / "checkpoints" / "step_00000004" / "learner.safetensors")
    assert latest(tmp_path).step == 8  # type: ignore[union-attr]


def test_a_base_that_was_written_again_is_not_the_base_any_more(tmp_path: Path) -> None:
    base = write_whole(tmp_path, 4)
    path = write_difference(tmp_path, 8, base)
    save(tmp_path, 4, {"shard_0000": {"position": np.zeros((50, 2), np.float32)}}, {}, keep=5)
    with pytest.raises(UserError, match="does not match its checksum"):
        open_checkpoint(path)


def test_a_base_cannot_lie_outside_the_checkpoints(tmp_path: Path) -> None:
    write_whole(tmp_path, 4)
    path = write_difference(tmp_path, 8, checkpoint.Base("../../etc", "0"))
    with pytest.raises(UserError, match="outside"):
        open_checkpoint(path)


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write(tmp_path, 4)
    for name in (".tmp-step_00000008-1", ".step_00000012.0123abcd.part"):
        left = tmp_path / "checkpoints" / name
        left.mkdir()
        (left / ".lock").touch()
        (left / "learner.safetensors").write_bytes(b"half")
    write(tmp_path, 8)
    assert names(tmp_path) == ["step_00000004", "step_00000008"]


def test_what_the_program_did_not_write_under_its_own_names_is_neither_read_nor_removed(
    tmp_path: Path,
) -> None:
    write(tmp_path, 4)
    root = tmp_path / "checkpoints"
    others = ["step_best", "step_99", "step_00000099.old", ".tmp-notes", ".step_best.part"]
    for name in others:
        shutil.copytree(root / "step_00000004", root / name)
    (root / "step_00000050").symlink_to(root / "step_best")
    for step in (8, 12):
        write(tmp_path, step, keep=2)
    assert latest(tmp_path).step == 12  # type: ignore[union-attr]
    own = ["step_00000008", "step_00000012"]
    assert names(tmp_path) == sorted([*others, "step_00000050", *own])
    # Beside the files that the checksums name as well.
    shutil.copy(root / own[1] / "shard_0000.safetensors", root / own[1] / "shard_0001.safetensors")
    assert latest(tmp_path).names == ["learner", "shard_0000"]  # type: ignore[union-attr]


def test_a_copy_under_the_name_of_another_update_is_not_resumed_from(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    shutil.copytree(path, path.parent / "step_00000900")
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, len(found.skipped)) == (4, 1)
    assert "it was renamed" in found.skipped[0]


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step_100000000"]


def test_a_file_system_that_cannot_sync_a_directory_keeps_checkpoints(
    tmp_path: Path, monkeypatch
) -> None:
    fsync = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    write(tmp_path, 4)
    assert latest(tmp_path).step == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("file", FILES)
def test_a_fifo_or_a_link_in_a_checkpoint_is_passed_over_at_once(file, tmp_path: Path) -> None:
    for step, put in (
        (8, os.mkfifo),
        (12, lambda path: path.symlink_to(tmp_path / "checkpoints" / "step_00000004" / file)),
    ):
        write(tmp_path, 4)
        path = write(tmp_path, step) / file
        path.unlink()
        put(path)
    found = latest(tmp_path)
    assert found is not None
    assert (found.step, len(found.skipped)) == (4, 2)
