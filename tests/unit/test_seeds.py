"""Every stream of noise has a seed of its own."""

from __future__ import annotations

import torch

from ebm_dist.core.seeds import derive_seed


def test_no_two_streams_of_a_run_share_a_seed() -> None:
    seeds = [derive_seed(seed, "lease", i) for seed in range(4) for i in range(5000)]
    seeds += [
        derive_seed(seed, "update", rank, s)
        for seed in range(4)
        for rank in range(8)
        for s in range(500)
    ]
    seeds += [derive_seed(0, "shard", i, "fresh", j) for i in range(20) for j in range(50)]
    assert len(set(seeds)) == len(seeds)


def test_paths_that_read_alike_are_apart() -> None:
    paths = [("a", 1), ("a", "1"), ("a", 1, ""), ("a", 11), ("a1",), (1, "a")]
    assert len({derive_seed(0, *path) for path in paths}) == len(paths)
    assert derive_seed(12, 3) != derive_seed(1, 23)


def test_seeds_are_the_same_everywhere_and_fit_a_generator() -> None:
    # A pinned value: a resumed run on another machine must draw the same noise.
    assert derive_seed(0, "lease", 17) == 4539945723671291878
    for i in range(100):
        seed = derive_seed(2**62 + i, "x", i)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_the_noise_of_neighbouring_streams_is_uncorrelated() -> None:
    num, size = 200, 400
    noise = torch.stack(
        [
            torch.randn(size, generator=torch.Generator().manual_seed(derive_seed(0, "lease", i)))
            for i in range(num)
        ]
    )
    correlation = torch.corrcoef(noise)
    off = correlation[~torch.eye(num, dtype=torch.bool)]
    # Of N(0, 1 / size) each; the largest of 19,900 lies below 5 standard errors.
    assert off.abs().max() < 5.5 / size**0.5
    assert abs(float(off.var()) * size - 1) < 4 * (2 / (num * (num - 1) / 2)) ** 0.5
