"""Weights in bfloat16 on the wire: workers move chains under them, the learner keeps its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_runs import run

from ebm_dist.actors.worker import Worker
from ebm_dist.checkpoint import files as checkpoint
from ebm_dist.core.weights import as_sent


def test_workers_get_the_nearest_bfloat16_of_the_weights_and_the_learner_keeps_float32(
    tmp_path: Path, monkeypatch
) -> None:
    received: dict[int | None, np.ndarray] = {}
    use = Worker._use

    def spy(self: Worker, weights: np.ndarray, version: int | None) -> None:
        received[version] = weights
        use(self, weights, version)

    monkeypatch.setattr(Worker, "_use", spy)
    run(tmp_path / "run", "learner.wire=bfloat16", "checkpoint.every=19", "checkpoint.keep=3")
    assert all(weights.dtype == np.uint16 for weights in received.values())
    kept_at_19 = tmp_path / "run" / "checkpoints" / checkpoint.name_of(19)
    learner = checkpoint.open_checkpoint(kept_at_19).tensors("learner")
    kept = [v for k, v in learner.items() if k.startswith("param/energy.")]
    flat = torch.cat([v.reshape(-1) for v in kept])
    # The chains of update 20 moved under the weights after 19.
    assert np.array_equal(
        received[max(v for v in received if v is not None)], as_sent(flat.numpy(), "bfloat16")
    )
    assert not torch.equal(flat, flat.bfloat16().float())
