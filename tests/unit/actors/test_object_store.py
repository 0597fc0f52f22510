"""Memory for a run's objects follows what is sent: stored chains, and weights by their versions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.rows import ROW
from ebm_dist.config.sections import FlowConfig
from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.run import object_store
from ebm_dist.run.object_store import StoreNeed, check_shared_memory, store_need

GIB = 2**30
PHOTO = EventSpec((3, 32, 32), "image")


def need(storage: str = "float32", num_weights: int = 0, **changes) -> StoreNeed:
    buffer = BufferConfig(capacity=1_000_000, num_shards=4, storage=storage)  # type: ignore[arg-type]
    options = {"num_workers": 8, "num_negatives": 128, "wire": "float32"} | changes
    return store_need(PHOTO, buffer, FlowConfig(max_lag=8), num_weights=num_weights, **options)


def test_a_million_chains_of_bytes_are_reckoned_as_bytes() -> None:
    stored = 1_000_000 * 3 * 32 * 32
    for storage, item in (("uint8", 1), ("bfloat16", 2), ("float32", 4)):
        got = need(storage)
        assert got.chains == pytest.approx(1.25 * (stored * item + 1_000_000 * ROW.itemsize))
    assert need("uint8").total < 4.5 * GIB


def test_weights_have_room_for_each_version_in_flight_and_for_a_checkpoint() -> None:
    million = 100_000_000
    assert need(num_weights=million).weights == million * (10 * 4 + 16)
    assert need(num_weights=million, wire="bfloat16").weights == million * (10 * 2 + 16)
    assert need(num_weights=million, num_workers=1).weights == million * (4 * 4 + 16)


def test_a_run_without_chains_needs_memory_for_weights_alone() -> None:
    got = need(num_weights=10, needs_negatives=False)
    assert (got.chains, got.rounds) == (0, 0)
    assert got.weights > 0


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        (StoreNeed(3 * GIB, 1, 1), "buffer.capacity"),
        (StoreNeed(1, 3 * GIB, 1), "flow.max_lag"),
        (StoreNeed(1, 1, 3 * GIB), "energy"),
        (StoreNeed(1, 1, 1, 3 * GIB), "data"),
    ],
)
def test_memory_that_is_not_there_is_said_with_the_key_that_asks_for_it_and_works(
    wanted: StoreNeed, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        object_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GIB)
    )
    with pytest.raises(UserError) as caught:
        check_shared_memory(wanted.total, wanted, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{key}: Ray's objects may take ")
    assert "\n" not in line
    advised = int(line.split("runtime.object_store_mb=")[1].split()[0])
    check_shared_memory(advised << 20, wanted, tmp_path)
    with pytest.raises(UserError, match=r"^runtime\.object_store_mb: .* or lower it$"):
        check_shared_memory(3 * GIB, wanted, tmp_path)
    check_shared_memory(wanted.total, wanted, tmp_path / "absent")  # a system without /dev/shm


def test_the_memory_of_this_machine_does_not_limit_a_run_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from small_runs import SMALL

    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe
    from ebm_dist.run import train as run

    asked: list[int] = []
    monkeypatch.setattr(run, "check_shared_memory", lambda size, need: asked.append(size))
    monkeypatch.setattr(run, "RayBackend", lambda *args, **options: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in ("local", "10.0.0.1:6379", "auto"):
        config = load(SMALL, ["runtime.backend=ray", f"runtime.address={address}"])
        spec = describe(config.data)
        run._backend(run.bind(config, spec), spec, tmp_path, lambda: False)
        assert len(asked) == 1, address


def test_given_data_has_room_for_each_part_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from small_runs import SMALL

    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe, given
    from ebm_dist.run import train as run

    sizes = []
    monkeypatch.setattr(
        run, "RayBackend", lambda *args, object_store_bytes, **_: sizes.append(object_store_bytes)
    )
    for rows in (1000, 2000):
        config = load(SMALL, ["runtime.backend=ray", "runtime.address=10.0.0.1:6379"])
        config = config.model_copy(update={"data": given(torch.zeros(rows, 1), config.data)})
        spec = describe(config.data)
        run._backend(run.bind(config, spec), spec, tmp_path, lambda: False)
    shards = config.buffer.num_shards if config.buffer.init == "data" else 0
    assert sizes[1] - sizes[0] == 1000 * 4 * (config.learner.num_ranks + 2 + shards)
