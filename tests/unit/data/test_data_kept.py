"""Samples in memory bring what the shards would have brought, in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_shards import npy, numbered_config, numbered_shards, take, write_tar

from ebm_dist.core.errors import UserError
from ebm_dist.core.types import EventSpec
from ebm_dist.data import DataStream
from ebm_dist.data.format.decode import Layout
from ebm_dist.data.stream.kept import Kept, Sample


@pytest.mark.parametrize("num", [3, 5, 80])  # 80 are more than two epochs
@pytest.mark.parametrize("shuffle", [0, 8, 100])
@pytest.mark.parametrize(("rank_split", "world_size"), [("auto", 1), ("sample", 3), ("shard", 2)])
def test_epochs_in_memory_bring_what_reading_brings(
    tmp_path: Path, rank_split: str, world_size: int, shuffle: int, num: int
):
    # Split by shard, a rank's epoch is other shards each time: some are here and some are not.
    source = numbered_shards(tmp_path, [9, 8, 7, 6, 5])
    config = numbered_config(source, noise_std=0.1, rank_split=rank_split, shuffle=shuffle)
    for rank in range(world_size):
        kept, read = (
            DataStream(config.model_copy(update={"cache": mode}), rank=rank, world_size=world_size)
            for mode in ("always", "never")
        )
        for _ in range(240 // num + 3):
            ours, theirs = kept.next_batch(num), read.next_batch(num)
            assert torch.equal(ours.x, theirs.x)
            assert torch.equal(ours.label, theirs.label)  # type: ignore[arg-type]
            assert kept.state() == read.state()
        assert kept._reader._epochs._rows is not None
        assert read._reader._epochs._rows is None


def test_unlabelled_epochs_in_memory_have_no_labels(tmp_path: Path):
    members = [(f"{i}.npy", npy(np.full(1, i, np.float32))) for i in range(8)]
    stream = DataStream(numbered_config(str(write_tar(tmp_path / "0.tar", members))))
    for _ in range(6):
        assert stream.next_batch(4).label is None
    assert stream._reader._epochs._rows is not None


def test_a_cursor_goes_back_into_an_epoch_that_is_in_memory(tmp_path: Path):
    stream = DataStream(numbered_config(numbered_shards(tmp_path, [10, 10]), noise_std=0.1))
    take(stream, 7, 4)
    state = stream.state()
    expected = [stream.next_batch(4).x for _ in range(9)]
    stream.load_state(state)
    assert all(torch.equal(stream.next_batch(4).x, x) for x in expected)


def test_samples_that_a_cursor_passed_over_are_decoded_when_their_turn_comes(tmp_path: Path):
    config = numbered_config(numbered_shards(tmp_path, [10, 10]))
    through, late = DataStream(config), DataStream(config)
    take(through, 4, 4)
    late.load_state(through.state())
    assert take(late, 1, 4) == take(through, 1, 4)
    assert not late._reader._epochs._kept._encoded
    assert take(late, 1, 4) == take(through, 1, 4)
    assert 0 < len(late._reader._epochs._kept._encoded) < 16
    assert take(late, 4, 4) == take(through, 4, 4)
    assert not late._reader._epochs._kept._encoded


def test_a_broken_sample_that_was_passed_over_is_named_when_its_turn_comes(tmp_path: Path):
    members = [(f"{i}.npy", npy(np.full(1, i, np.float32))) for i in range(8)]
    members[1] = ("1.npy", npy(np.full(2, 1, np.float32)))
    config = numbered_config(str(write_tar(tmp_path / "0.tar", members)), shuffle=0)
    stream = DataStream(config)
    stream.load_state({**stream.state(), "offset": 4, "num_batches": 1})
    assert take(stream, 1, 4) == [4, 5, 6, 7]
    with pytest.raises(UserError, match=r"0\.tar: sample '1'"):
        take(stream, 1, 4)


def test_rows_are_copies_and_shards_that_come_later_leave_them_alone():
    kept = Kept(Layout(EventSpec((2,), "real"), None, labelled=True))
    for number in (7, 3):
        x = np.full(2, number, np.float32)
        kept.keep(number, (Sample(None, x, number), Sample(None, x + 0.5, number + 1)))
        rows = kept.rows([number])
        assert rows is not None
        x, label = kept.take(np.array(rows))
        assert label is not None
        assert x.tolist() == [[number] * 2, [number + 0.5] * 2]
        assert label.tolist() == [number, number + 1]
        x[:], label[:] = -1, -1
    assert kept.rows([3, 5]) is None
    rows = kept.rows([3, 7])
    assert rows is not None
    assert kept.take(np.array(rows))[0][:, 0].tolist() == [3, 3.5, 7, 7.5]
    assert [s.decoded(kept._layout)[0][0] for s in kept.samples(7)] == [7, 7.5]
