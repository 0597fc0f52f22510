"""Chains stored in fewer bits: the mean is kept, and what has not moved stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shards import make_shard

from ebm_dist.buffer.answers import Origin
from ebm_dist.buffer.codec import Codec, as_float32
from ebm_dist.buffer.config import BufferConfig
from ebm_dist.buffer.shard import Shard
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.types import EventSpec

IMAGE = EventSpec((1, 2, 2), "image")
SMALL = ("bfloat16", "uint8")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("x", [-0.9987, -0.5003, 0.00071, 0.3333, 0.70715])
def test_rounding_keeps_the_mean_and_adds_the_variance_that_is_stated(name, x) -> None:
    codec, num = Codec.of(name, IMAGE), 400_000
    stored = codec.decode(codec.encode(torch.full((num,), x), generator())).double()
    low, high = stored.min().item(), stored.max().item()
    x32 = float(np.float32(x))
    assert low <= x32 <= high
    quantum = high - low
    fraction = (x32 - low) / quantum
    variance = quantum**2 * fraction * (1 - fraction)
    assert abs(stored.mean().item() - x32) < 4 * (variance / num) ** 0.5 + quantum * 2**-13
    # Of a coin of two values, whose squared deviation has this variance.
    spread = quantum**2 * abs(1 - 2 * fraction) * (fraction * (1 - fraction) / num) ** 0.5
    assert abs(stored.var().item() - variance) < 4 * spread + 1e-3 * variance
    if name == "uint8":
        assert quantum == pytest.approx(2 / 255, rel=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_moves_smaller_than_a_quantum_add_up_as_they_do_in_float32(name) -> None:
    # To the nearest, uint8 would not let these chains move at all.
    codec, num, rounds, drift = Codec.of(name, IMAGE), 20_000, 100, 0.0011
    x, nearest = torch.zeros(num), torch.zeros(num)
    quantum = 2 / 255 if name == "uint8" else 2**-10
    for i in range(rounds):
        x = codec.decode(codec.encode(x + drift, generator(i)))
        nearest = codec.decode(codec.encode(nearest + drift))
    standard_error = (rounds * quantum**2 / 4 / num) ** 0.5
    assert abs(x.mean().item() - rounds * drift) < 4 * standard_error + rounds * quantum * 2**-13
    if name == "uint8":
        assert abs(nearest.mean().item()) < quantum


@pytest.mark.parametrize("name", SMALL)
def test_a_chain_that_has_not_moved_stays_where_it_is_to_the_bit(name) -> None:
    codec = Codec.of(name, IMAGE)
    start = codec.encode(torch.rand((500, 1, 2, 2), generator=generator()) * 2 - 1)
    for seed in range(20):
        assert torch.equal(codec.encode(codec.decode(start), generator(seed)), start)
    everything = torch.arange(256, dtype=torch.uint8)
    if name == "uint8":
        for seed in range(20):
            assert torch.equal(codec.encode(codec.decode(everything), generator(seed)), everything)
        assert codec.decode(everything)[[0, 255]].tolist() == [-1.0, 1.0]


def test_numbers_that_are_rounded_by_one_draw_are_rounded_independently() -> None:
    codec, num = Codec.of("uint8", IMAGE), 100_000
    up = codec.encode(torch.zeros((num, 4)), generator()).double() - 127  # a fair coin each
    correlation = torch.corrcoef(up.T) - torch.eye(4)
    assert correlation.abs().max() < 4 * num**-0.5


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["binary", "categorical"])
def test_discrete_events_lose_nothing(name, kind) -> None:
    codec = Codec.of(name, EventSpec((4, 3), kind))
    x = torch.randint(0, 2, (100, 4, 3), generator=generator()).float()
    assert torch.equal(codec.decode(codec.encode(x, generator())), x)


@pytest.mark.parametrize("name", SMALL)
def test_events_without_bounds_are_refused(name) -> None:
    with pytest.raises(ValueError, match=r"buffer\.storage.*float32"):
        make_shard(config={"storage": name})


@pytest.mark.parametrize("before", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "uint8"])
def test_a_checkpoint_keeps_what_is_stored_and_can_be_read_as_another_type(
    before, after, tmp_path
) -> None:
    def image_shard(storage: str, seed: int) -> Shard:
        config = BufferConfig(capacity=8, storage=storage)  # type: ignore[arg-type]
        return Shard(config, IMAGE, index=0, capacity=8, max_lease=4, seed=seed)

    first, second = image_shard(before, 0), image_shard(after, 1)
    saved = first.snapshot()
    learner = {"weight": np.zeros(1, np.float32)}
    parts = {"learner": learner, "shard_0000": saved.arrays}
    checkpoint.save(tmp_path, 1, parts, {}, keep=1)
    arrays = checkpoint.latest(tmp_path).arrays("shard_0000")
    assert arrays["position"].dtype == Codec.of(before, IMAGE).dtype
    second.restore(arrays, Origin(saved.meta.data))
    x, y = first.weighted().x, second.weighted().x
    assert x.dtype == y.dtype == np.float32
    assert np.array_equal(as_float32(arrays["position"], IMAGE), x)
    assert (
        np.abs(x - y).max() <= {"float32": 0.0, "bfloat16": 2**-9, "uint8": 1 / 255 + 1e-6}[after]
    )
    if before == after:
        assert np.array_equal(x, y)
