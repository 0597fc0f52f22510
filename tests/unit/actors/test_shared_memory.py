"""The memory that parts of a run have in common: who holds it, who removes it, who may not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ebm_dist.actors.shard import open_shard
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.buffer.storage import SlotStorage, bytes_to_map
from ebm_dist.cluster import shared_memory
from ebm_dist.cluster.shared_memory import NotMapped, RunMemory, remove_abandoned
from ebm_dist.core.types import EventSpec

NODE = "0123456789abcdef"
MIB = 1 << 20

# A part of a run in a process of its own.
PART = """
import sys
from pathlib import Path
from ebm_dist.cluster import shared_memory
shared_memory.ROOT = Path(sys.argv[1])
memory = shared_memory.RunMemory(sys.argv[2], "1").hold(sys.argv[3])
path = memory.claim("shard_0000", 0)
path.mkdir(exist_ok=True)
print(memory.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shared_memory, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def parts(root: Path) -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(parts: list[subprocess.Popen], root: Path, run: str, node: str = NODE) -> Path:
    command = [sys.executable, "-c", PART, str(root), run, node]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parts.append(process)
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_it_is_for_this_user_alone_and_named_for_run_attempt_and_node(root: Path) -> None:
    path = RunMemory("r", "1").hold(NODE).path
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o700
    others = [
        RunMemory(run, attempt).hold(node).path
        for run, attempt, node in (("s", "1", NODE), ("r", "2", NODE), ("r", "1", "f" * 16))
    ]
    assert len({path, *others}) == 4
    assert RunMemory("r", "1").hold(NODE).path == path
    assert all(p is not None and p.name.startswith(f"ebm_dist-{os.geteuid()}-") for p in others)


def test_while_any_part_of_a_run_lives_nobody_removes_what_a_killed_one_left(
    root: Path, parts: list[subprocess.Popen]
) -> None:
    path = start(parts, root, "r")
    with closing(RunMemory("r", "1").hold(NODE)) as other:
        end(parts[0])
        RunMemory("s", "1").hold(NODE).close()
        assert (path / "shard_0000").is_dir()
        assert other.path == path
    remove_abandoned()
    assert not path.exists()


def test_what_a_killed_run_left_is_removed_by_whoever_starts_next(
    root: Path, parts: list[subprocess.Popen]
) -> None:
    killed, lives = start(parts, root, "killed"), start(parts, root, "lives")
    end(parts[0])
    assert killed.exists()
    memory = RunMemory("next", "1").hold(NODE)
    assert not killed.exists()
    assert lives.exists()
    end(parts[1])
    memory.remove()  # its end removes its own, and what was still held when it began
    assert list(root.iterdir()) == []


def test_what_others_own_or_links_lead_to_is_neither_used_nor_removed(root: Path) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "precious").touch()
    prefix = f"ebm_dist-{os.geteuid()}-"
    link, open_, file = (
        root / f"{prefix}{name}-1-{NODE[:12]}" for name in ("link", "open", "file")
    )
    link.symlink_to(elsewhere)
    open_.mkdir()
    open_.chmod(0o777)
    file.touch()
    for run in ("link", "open", "file"):
        memory = RunMemory(run, "1").hold(NODE)
        assert memory.path is None
        with pytest.raises(NotMapped, match=str(root)):
            memory.claim("shard_0000", 0)
    assert (elsewhere / "precious").exists()
    assert open_.exists()
    assert file.exists()
    if os.geteuid() == 0:
        foreign = root / f"{prefix}foreign-1-{NODE[:12]}"
        foreign.mkdir(mode=0o700)
        os.chown(foreign, 12345, 12345)
        assert RunMemory("foreign", "1").hold(NODE).path is None
        assert foreign.exists()


def test_one_that_is_removed_before_it_is_locked_is_made_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = shared_memory.open_private
    removed = []

    def interrupted(path: Path) -> int:
        descriptor = opened(path)
        if not removed:
            removed.append(path)
            remove_abandoned()
        return descriptor

    monkeypatch.setattr(shared_memory, "open_private", interrupted)
    memory = RunMemory("r", "1").hold(NODE)
    assert removed == [memory.path]
    assert memory.path is not None
    assert memory.path.is_dir()
    remove_abandoned()
    assert memory.path.is_dir()


def test_a_successor_waits_until_the_process_before_it_has_ended(
    root: Path, parts: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = start(parts, root, "r")
    memory = RunMemory("r", "1").hold(NODE)
    monkeypatch.setattr(shared_memory, "OWNER_S", 0.1)
    with pytest.raises(NotMapped, match="still held"):
        memory.claim("shard_0000", 0)
    monkeypatch.setattr(shared_memory, "OWNER_S", 30.0)
    timer = threading.Timer(0.2, end, parts)
    timer.start()
    began = time.monotonic()
    assert memory.claim("shard_0000", 0) == path / "shard_0000"
    assert time.monotonic() - began >= 0.1
    timer.join()


def test_it_leaves_to_rays_objects_what_they_may_need(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shared_memory.os, "statvfs", lambda path: SimpleNamespace(f_bavail=100 * 256, f_frsize=4096)
    )
    memory = RunMemory("r", "1").hold(NODE, reserve=60 * MIB)
    assert memory.claim("shard_0000", 40 * MIB) == memory.path / "shard_0000"
    with pytest.raises(NotMapped, match="no room for 41 MiB beside the 60 MiB that Ray's"):
        memory.claim("shard_0001", 41 * MIB)
    # What a predecessor has mapped is there already.
    (memory.path / "shard_0002").mkdir()
    memory.claim("shard_0002", 41 * MIB)


@pytest.mark.parametrize("num_grants", [0, 3])
def test_the_room_asked_for_is_the_room_taken(num_grants: int, tmp_path: Path) -> None:
    sizes = {"num_grants": num_grants, "dtype": np.uint8}
    SlotStorage(500, 20, (3, 8, 8), tmp_path / "shard", **sizes)
    files = list((tmp_path / "shard").glob("*.bin"))
    needed = bytes_to_map(500, 20, (3, 8, 8), **sizes)
    assert abs(sum(file.stat().st_size for file in files) - needed) <= 64
    # Nothing is left for a time when there may be no room.
    assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in files)


# --- shards ---------------------------------------------------------------------------------------


def make_shard(memory: shared_memory.NodeMemory | None, life: int = 0) -> Shard:
    config = BufferConfig(capacity=24, num_shards=2, reinit_prob=0.0)
    sizes = {"index": 1, "num_shards": 2, "capacity": 12, "max_lease": 4}
    return open_shard(
        config,
        None,
        EventSpec((3,), "real"),
        seed=1,
        num_grants=2,
        shared=memory,
        life=life,
        **sizes,
    )


def notes(shard: Shard) -> tuple[str, ...]:
    return shard._notes


def test_a_killed_shards_successor_on_the_node_has_its_chains(
    root: Path, parts: list[subprocess.Popen]
) -> None:
    memory = RunMemory("r", "1").hold(NODE)
    first = make_shard(memory)
    lease = first.checkout(0, 4, by_rows=True)
    assert lease is not None
    assert lease.grant is not None
    assert lease.grant.directory == f"{memory.path}/shard_0001-0"
    before, epoch = first.snapshot().arrays, first.epoch
    with closing(RunMemory("r", "1").hold(NODE)):
        memory.close()  # as the kernel does for a dead process
        second = make_shard(RunMemory("r", "1").hold(NODE))
        assert second.attached
        assert second.epoch > epoch
        assert all(np.array_equal(before[k], v) for k, v in second.snapshot().arrays.items())
    elsewhere = make_shard(RunMemory("r", "1").hold("f" * 16))
    assert not elsewhere.attached, "another node's memory is another's, whichever machine it is on"
    assert notes(elsewhere) == ()


@pytest.mark.parametrize("trouble", ["no memory", "too small", "full"])
def test_without_room_chains_lie_in_the_process_and_the_log_says_so(
    trouble: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no memory":
        monkeypatch.setattr(shared_memory, "ROOT", root / "none")
    elif trouble == "too small":
        monkeypatch.setattr(
            shared_memory.os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=4096)
        )
    else:

        def full(descriptor: int, offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    memory = RunMemory("r", "1").hold(NODE)
    shard = make_shard(memory)
    (note,) = notes(shard)
    assert "in the memory of their shard's process" in note
    lease = shard.checkout(0, 4, by_rows=True)
    assert lease is not None
    assert lease.grant is None
    assert shard.identities().tolist() == list(range(12, 24))
    if memory.path is not None:
        assert not (memory.path / "shard_0001-0").exists()
    assert notes(make_shard(None)) == (), "in one process there is nothing to say"


def test_a_process_of_another_life_takes_nothing_over_and_files_can_be_left_without(
    root: Path,
) -> None:
    memory = RunMemory("r", "1").hold(NODE)
    waited_in_vain = make_shard(memory)
    assert memory.path is not None
    shard = make_shard(memory, life=1)
    assert not shard.attached
    identities = shard.identities()
    shard.remove_files()
    assert not (memory.path / "shard_0001-1").exists()
    assert np.array_equal(shard.identities(), identities), "what is mapped stays until it ends"
    assert waited_in_vain.checkout(0, 4, by_rows=True).grant is not None
