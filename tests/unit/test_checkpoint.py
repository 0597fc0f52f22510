"""A checkpoint is whole or it is passed over; a write that fails leaves those before it valid."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ebm_dist import checkpoint
from ebm_dist.checkpoint import latest, open_checkpoint, save
from ebm_dist.errors import UserError


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
    save(tmp_path, 1, {"a": {"t": x.t(), "h": x.bfloat16()}}, {}, keep=1)
    found = latest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors("a")["t"], x.t())
    assert torch.equal(found.tensors("a")["h"], x.bfloat16())


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

    for name in ("save_file", "_write_json", "_fsync"):
        monkeypatch.setattr(checkpoint, name, refusing(getattr(checkpoint, name)))
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
