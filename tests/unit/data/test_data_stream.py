"""The stream's promises: who sees what, in which order, and that a cursor brings it back."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from data_shards import numbered_config, numbered_shards, take

from ebm_dist.core.errors import UserError
from ebm_dist.data import DataConfig, DataStream, describe, load_split
from ebm_dist.data.stream.reader import Reader

IMAGE_AUGMENTATION = {"flip": True, "crop_padding": 1, "dequantize": True, "noise_std": 0.05}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def digits(cache_dir: str, **changes: object) -> DataConfig:
    return DataConfig.model_validate({"source": "digits", "cache_dir": cache_dir, **changes})


def same(left: DataStream, right: DataStream, num_batches: int, num: int) -> bool:
    for _ in range(num_batches):
        a, b = left.next_batch(num), right.next_batch(num)
        if not torch.equal(a.x, b.x) or not torch.equal(a.label, b.label):  # type: ignore[arg-type]
            return False
    return True


# -- who sees what


@pytest.mark.parametrize("rank_split", ["auto", "sample"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_visit_disjoint_samples_and_together_all_of_them_in_every_epoch(
    tmp_path: Path, rank_split: str, world_size: int
):
    source = numbered_shards(tmp_path, [6] * 12)
    streams = [
        DataStream(numbered_config(source, rank_split=rank_split), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(3):
        seen = [take(stream, 72 // world_size // 2, 2) for stream in streams]
        assert sorted(itertools.chain(*seen)) == list(range(72))
        assert sum(len(set(part)) for part in seen) == 72


def test_ranks_split_by_shard_read_no_shard_of_another(tmp_path: Path):
    source = numbered_shards(tmp_path, [5] * 8)
    seen = [
        {
            value // 5
            for value in take(DataStream(numbered_config(source), rank=r, world_size=4), 5, 2)
        }
        for r in range(4)
    ]
    assert all(len(shards) == 2 for shards in seen)
    assert set.union(*seen) == set(range(8))


def test_no_rank_starves_with_one_shard_and_four_ranks(tmp_path: Path):
    source = numbered_shards(tmp_path, [30])  # and 4 does not divide 30
    streams = [DataStream(numbered_config(source), rank=r, world_size=4) for r in range(4)]
    steps = [[take(stream, 1, 3) for stream in streams] for _ in range(10)]
    assert all(len(part) == 3 for step in steps for part in step)
    order = [value for step in steps for row in zip(*step) for value in row]
    for epoch in range(4):
        assert sorted(order[30 * epoch : 30 * epoch + 30]) == list(range(30))


def test_more_ranks_than_samples_still_get_batches(tmp_path: Path):
    source = numbered_shards(tmp_path, [4])
    streams = [DataStream(numbered_config(source), rank=r, world_size=9) for r in range(9)]
    seen = [take(stream, 4, 1) for stream in streams]
    for step in range(4):
        order = [part[k] for k in range(step + 1) for part in seen]
        whole = len(order) // 4
        for epoch in range(whole):
            assert sorted(order[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [2, 3])
def test_batches_of_all_ranks_are_the_batch_of_one_rank_bit_for_bit(
    cache_dir: str, world_size: int
):
    config = digits(cache_dir, batch_size=12, **IMAGE_AUGMENTATION)
    alone = DataStream(config)
    ranks = [DataStream(config, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(150):  # over the end of an epoch of 1442
        whole = alone.next_batch(12)
        for rank, stream in enumerate(ranks):
            part = stream.next_batch(12 // world_size)
            assert torch.equal(part.x, whole.x[rank::world_size])
            assert torch.equal(part.label, whole.label[rank::world_size])  # type: ignore[index]


def test_labels_stay_with_their_samples(tmp_path: Path):
    stream = DataStream(numbered_config(numbered_shards(tmp_path, [20, 20])))
    for _ in range(12):
        batch = stream.next_batch(7)
        assert batch.label is not None
        assert batch.label.dtype == torch.int64
        assert torch.equal(batch.label, batch.x[:, 0].long() % 3)


# -- in which order


def test_epochs_and_seeds_have_different_orders(tmp_path: Path):
    source = numbered_shards(tmp_path, [10] * 6)
    stream = DataStream(numbered_config(source), seed=0)
    first, second = take(stream, 10, 6), take(stream, 10, 6)
    other = take(DataStream(numbered_config(source), seed=1), 10, 6)
    again = take(DataStream(numbered_config(source), seed=0), 10, 6)
    assert first == again
    assert first != second
    assert first != other
    assert sorted(first) == sorted(second) == sorted(other)


def test_shuffle_zero_keeps_the_order_of_the_shards(tmp_path: Path):
    source = numbered_shards(tmp_path, [3, 4, 5])
    stream = DataStream(numbered_config(source, shuffle=0))
    assert take(stream, 8, 3) == [*range(12), *range(12)]


def test_buffer_mixes_every_position_evenly():
    from ebm_dist.data.stream.order import shuffled

    # with chance 1/N, and the chi-square of N cells has mean N - 1 and variance 2 (N - 1).
    num, runs = 12, 6000
    counts = torch.zeros(num)
    for seed in range(runs):
        counts[list(shuffled(range(num), num, seed)).index(0)] += 1
    chi_square = float(((counts - runs / num) ** 2 / (runs / num)).sum())
    assert abs(chi_square - (num - 1)) < 4 * (2 * (num - 1)) ** 0.5


@pytest.mark.parametrize("size", [1, 7, 64, 2000])
def test_buffer_loses_and_repeats_nothing(size: int):
    from ebm_dist.data.stream.order import shuffled

    assert sorted(shuffled(range(1500), size, seed=5)) == list(range(1500))


@pytest.mark.parametrize("world_size", [1, 2])
def test_cache_does_not_change_what_comes(tmp_path: Path, world_size: int):
    source = numbered_shards(tmp_path, [9, 8, 7, 6, 5])
    config = numbered_config(source, noise_std=0.1)
    streams = [
        DataStream(config.model_copy(update={"cache": mode}), rank=0, world_size=world_size)
        for mode in ("never", "auto", "always")
    ]
    for _ in range(60):
        batches = [stream.next_batch(3).x for stream in streams]
        assert torch.equal(batches[0], batches[1])
        assert torch.equal(batches[0], batches[2])


def test_cache_stays_inside_its_limit(tmp_path: Path):
    source = numbered_shards(tmp_path, [40] * 4, event=4096)  # 16 KiB each, 640 KiB a shard
    stream = DataStream(numbered_config(source, cache_mib=1))
    take(stream, 60, 8)
    kept = [number for number in range(4) if number in stream._reader._epochs._kept]
    assert len(kept) == 1
    assert len(list(stream._reader._epochs._kept.samples(kept[0]))) == 40


def test_cached_epochs_do_not_open_the_shards_again(tmp_path: Path):
    source = numbered_shards(tmp_path, [10, 10])
    stream = DataStream(numbered_config(source))
    take(stream, 6, 4)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    assert len(take(stream, 20, 4)) == 80


# -- prefetching


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_prefetching_does_not_change_what_comes(cache_dir: str, depth: int):
    config = digits(cache_dir, **IMAGE_AUGMENTATION)
    ahead = DataStream(config.model_copy(update={"prefetch": depth}))
    behind = DataStream(config.model_copy(update={"prefetch": 0}))
    assert same(ahead, behind, 30, 64)
    assert ahead.state() == behind.state()


def test_prefetching_follows_a_change_of_batch_size(cache_dir: str):
    config = digits(cache_dir, **IMAGE_AUGMENTATION)
    ahead = DataStream(config.model_copy(update={"prefetch": 3}))
    behind = DataStream(config.model_copy(update={"prefetch": 0}))
    for num in (16, 16, 5, 100, 1, 16):
        assert same(ahead, behind, 2, num)
        assert ahead.state() == behind.state()


def test_prefetching_raises_the_readers_error_in_the_caller(tmp_path: Path):
    source = numbered_shards(tmp_path, [10, 10])
    stream = DataStream(numbered_config(source, prefetch=2, shuffle=0))
    (tmp_path / "01.tar").write_bytes(b"x" * 10240)
    for _ in range(2):  # and again, instead of waiting for a thread that is gone
        with pytest.raises(UserError, match=r"01\.tar"):
            take(stream, 6, 4)


def test_closed_or_forgotten_streams_leave_no_thread(tmp_path: Path):
    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == "ebm-dist-data"} - others

    others: set[threading.Thread] = set()
    others = threads()  # of tests that failed to build a run, whose tracebacks are kept
    source = numbered_shards(tmp_path, [10])
    config = numbered_config(source, prefetch=2)
    stream = DataStream(config)
    first = take(stream, 1, 4)
    stream.close()
    assert not threads()
    second = take(stream, 1, 4)  # goes on where it stood
    assert len({*first, *second}) == 8
    assert threads()
    del stream
    assert not threads()


# -- the cursor


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(("num_shards", "world_size"), [(1, 1), (6, 1), (6, 2), (1, 3)])
def test_resumed_stream_matches_an_uninterrupted_one(
    tmp_path: Path, prefetch: int, num_shards: int, world_size: int
):
    source = numbered_shards(tmp_path, [31] * num_shards)
    config = numbered_config(source, prefetch=prefetch, noise_std=0.1)
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size, "seed": 3}
        for stop in (0, 1, 5, 11, 40):  # in the middle, at the end and beyond an epoch
            through = DataStream(config, **ranks)
            for _ in range(stop):
                through.next_batch(5)
            state = json.loads(json.dumps(through.state()))
            resumed = DataStream(config, **ranks)
            resumed.load_state(state)
            assert resumed.state() == state
            assert same(through, resumed, 20, 5)


def test_cursor_is_small_and_json(cache_dir: str):
    stream = DataStream(digits(cache_dir))
    stream.next_batch(8)
    assert len(json.dumps(stream.state())) < 300


def test_loading_a_cursor_rewinds_a_stream_that_went_further(cache_dir: str):
    stream = DataStream(digits(cache_dir, **IMAGE_AUGMENTATION))
    stream.next_batch(32)
    state = stream.state()
    expected = [stream.next_batch(32).x for _ in range(3)]
    stream.load_state(state)
    assert all(torch.equal(stream.next_batch(32).x, x) for x in expected)


_KILLED = """
import json, os, signal, sys
from ebm_dist.data import DataConfig, DataStream
stream = DataStream(DataConfig(**json.loads(sys.argv[1])), seed=7)
for _ in range(9):
    stream.next_batch(5)
print(json.dumps(stream.state()), flush=True)
stream.next_batch(5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_stream_of_a_killed_process_goes_on_in_another(tmp_path: Path):
    config = numbered_config(numbered_shards(tmp_path, [40, 40]), prefetch=2, noise_std=0.1)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, config.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    through = DataStream(config, seed=7)
    for _ in range(9):
        through.next_batch(5)
    resumed = DataStream(config, seed=7)
    resumed.load_state(json.loads(done.stdout))
    assert same(through, resumed, 30, 5)


def test_split_by_sample_goes_on_exactly_at_another_world_size(tmp_path: Path):
    source = numbered_shards(tmp_path, [50])
    config = numbered_config(source)
    two = [DataStream(config, rank=r, world_size=2) for r in range(2)]
    for stream in two:
        take(stream, 3, 4)
    alone = DataStream(config)
    alone.load_state(two[1].state())
    whole = DataStream(config)
    take(whole, 3, 8)
    assert take(alone, 10, 8) == take(whole, 10, 8)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 1), (2, 16)])
def test_cursor_at_another_world_size_stays_in_its_epoch(tmp_path: Path, before: int, after: int):
    source = numbered_shards(tmp_path, [12] * 8)
    stream = DataStream(numbered_config(source), rank=1, world_size=before)
    take(stream, 96 // before + 12 // before, 1)  # an epoch and an eighth
    state = stream.state()
    assert state["epoch"] == 1
    for rank in range(after):
        other = DataStream(numbered_config(source), rank=rank, world_size=after)
        other.load_state(state)
        assert other.state()["epoch"] == 1
        assert len(take(other, 96 // after, 1)) == 96 // after


def test_cursor_of_other_data_restarts_its_epoch_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    first = DataStream(numbered_config(numbered_shards(tmp_path / "a", [20])))
    take(first, 7, 4)
    other = DataStream(numbered_config(numbered_shards(tmp_path / "b", [24])))
    other.load_state(first.state())
    assert "other data" in caplog.text
    assert (other.state()["epoch"], other.state()["offset"]) == (1, 0)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"version": 99},
        {"epoch": -1},
        {"offset": "3"},
        {"mode": "other"},
        {"num_batches": None},
    ],
)
def test_broken_cursor_is_refused(cache_dir: str, broken: dict[str, object]):
    stream = DataStream(digits(cache_dir))
    state = {**stream.state(), **broken} if broken else {}
    with pytest.raises(ValueError, match="data cursor"):
        stream.load_state(state)


# -- noise


def test_ranks_split_by_shard_share_no_noise(tmp_path: Path):
    source = numbered_shards(tmp_path, [20] * 4, event=50)
    config = numbered_config(source, noise_std=0.1)
    noise = []
    for rank in range(2):
        x = DataStream(config, rank=rank, world_size=2).next_batch(20).x
        noise.append((x - x.round()).flatten())
    correlation = torch.corrcoef(torch.stack(noise))[0, 1]
    assert abs(float(correlation)) < 4 / noise[0].numel() ** 0.5


def test_successive_batches_share_no_noise(tmp_path: Path):
    source = numbered_shards(tmp_path, [40], event=50)
    stream = DataStream(numbered_config(source, noise_std=0.1))
    noise = [(x - x.round()).flatten() for x in (stream.next_batch(20).x for _ in range(2))]
    correlation = torch.corrcoef(torch.stack(noise))[0, 1]
    assert abs(float(correlation)) < 4 / noise[0].numel() ** 0.5


# -- plain shards and splits


def test_plain_shards_are_described_by_their_first_sample(tmp_path: Path):
    spec = describe(numbered_config(numbered_shards(tmp_path, [3], event=5)))
    assert (spec.shape, spec.kind, spec.num_classes) == ((5,), "real", None)


def test_holdout_splits_plain_shards_once_and_for_all(tmp_path: Path):
    source = numbered_shards(tmp_path, [200, 200])
    config = numbered_config(source, holdout=0.25)
    test = {int(value) for value in load_split(config, "test").x[:, 0]}
    train = {int(value) for value in load_split(config, "train").x[:, 0]}
    assert test | train == set(range(400))
    assert not test & train
    assert abs(len(test) - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5
    assert set(take(DataStream(config), 100, 8)) == train


def test_test_source_is_the_test_split_of_plain_shards(tmp_path: Path):
    config = numbered_config(
        numbered_shards(tmp_path / "train", [20]),
        test_source=numbered_shards(tmp_path / "test", [7]),
    )
    assert len(load_split(config, "test").x) == 7


def test_load_split_is_scaled_limited_and_not_augmented(cache_dir: str):
    config = digits(cache_dir, **IMAGE_AUGMENTATION)
    x = load_split(config, "test", limit=50).x
    assert x.shape == (50, 1, 8, 8)
    assert torch.equal(x, load_split(digits(cache_dir), "test", limit=50).x)
    assert float(x.min()) == -1.0
    assert float(x.max()) == 1.0
    # 17 grey levels and nothing between them, to the rounding of 8 bits.
    level = (x + 1) * 8
    assert float((level - level.round()).abs().max()) < 16 / 255


def test_pattern_of_prepared_shards_reads_just_these(tmp_path: Path):
    from ebm_dist.data import prepare

    manifest = prepare("digits", tmp_path / "digits", shard_size=500)
    config = DataConfig(shards=str(tmp_path / "digits" / "train-{000000..000001}.tar"))
    assert describe(config).num_classes == 10
    assert len(load_split(config, "train").x) == 1000
    assert len(load_split(config, "test").x) == manifest.num_samples("test")


def test_a_stream_that_is_asked_for_other_numbers_reads_no_sample_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As chains do that restart from data at random: reading ahead began anew each time."""
    source = numbered_shards(tmp_path, [40, 40])
    asked = [16, 3, 5, 3, 3, 4, 1, 6]
    plain = DataStream(numbered_config(source, prefetch=0))
    expected = [plain.next_batch(num).x for num in asked]
    opened: list[int] = []
    real = Reader.seek
    monkeypatch.setattr(Reader, "seek", lambda self, at: (opened.append(1), real(self, at))[1])
    ahead = DataStream(numbered_config(source, prefetch=4))
    for num, x in zip(asked, expected, strict=True):
        assert torch.equal(ahead.next_batch(num).x, x)
    assert len(opened) <= 3, "at its making and at the two changes after which it gives up"
    ahead.close()
