"""Every config that the repository ships trains: each inline, and one of each sort on Ray."""

from __future__ import annotations

import gzip
import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import ebm_dist
from ebm_dist.config.run_config import load
from ebm_dist.data.sources.prepare import prepare

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
PICTURES = {"digits.yaml", "fashion_mnist_pcd.yaml"}
UPDATES = 3
# What the shipped values would make long or large, and what makes no difference to three updates.
BRIEF = (
    f"run.steps={UPDATES}",
    "data.toy_samples=2048",
    "tracking.log_every=1",
    "evaluation.every=null",
    "runtime.start_timeout_s=400",
    "tracking.wandb=off",
)


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in the place of Fashion-MNIST's, from IDX files of noise."""
    source = tmp_path_factory.mktemp("idx")
    generator = np.random.default_rng(0)
    for part, num in (("train", 96), ("t10k", 32)):
        images = generator.integers(0, 256, (num, 28, 28), np.uint8)
        labels = (np.arange(num) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(
                f">{array.ndim}I", *array.shape
            )
            path = source / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))
    out = tmp_path_factory.mktemp("shards") / "fashion-mnist"
    prepare("fashion-mnist", out, source=source)
    return out


def train_briefly(name: str, run_dir: Path, garments: Path, *overrides: str) -> None:
    """Train the shipped config `name` for a few updates, each of which moves the weights."""
    brief = [*BRIEF, f"data.cache_dir={run_dir.parent / 'cache'}", *overrides]
    if name in PICTURES:  # at their shipped sizes a slow core takes many seconds an update
        brief += ["sampler.num_steps=2", "data.batch_size=16", "workers.num_chains=8"]
    if "fashion_mnist" in name:
        brief.append(f"data.source={garments}")
    config = load(CONFIGS / name, brief)
    result = ebm_dist.train(config, run_dir=run_dir, console=Console(file=io.StringIO()))
    assert result.finished
    assert result.step == UPDATES
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    updates = {row["step"]: row for row in rows if "loss/total" in row}
    assert sorted(updates) == list(range(1, UPDATES + 1))
    for row in updates.values():
        assert math.isfinite(row["loss/total"])
        assert 0 < row["learner/param_grad_norm"] < math.inf
    assert result.export_dir is not None
    learnt = ebm_dist.load_energy(result.export_dir).state_dict()
    assert all(value.isfinite().all() for value in learnt.values())


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_trains_inline(name: str, tmp_path: Path, garments: Path) -> None:
    one_process = ("runtime.backend=inline", "learner.num_ranks=1")
    train_briefly(name, tmp_path / "r", garments, *one_process)


# The sorts: chains and none, continuous and discrete, labels, one rank and two.
ON_RAY = {
    "digits.yaml": "learner.num_ranks=2",
    "toy/joint.yaml": "workers.num_workers=2",
    "fashion_mnist_classes.yaml": "learner.num_ranks=2",
    "toy/pseudo_likelihood.yaml": "learner.num_ranks=1",
}


@pytest.mark.ray
@pytest.mark.parametrize("name", ON_RAY)
def test_shipped_config_of_each_sort_trains_on_ray(
    name: str, tmp_path: Path, garments: Path
) -> None:
    train_briefly(name, tmp_path / "r", garments, "runtime.backend=ray", ON_RAY[name])
