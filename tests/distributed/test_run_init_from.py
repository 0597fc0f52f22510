"""A run that begins with another's weights, with its learner in shards of two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from graph_runs import assert_bitwise_equal, run, weights

# No number of float32 moves by as little, unless it is zero.
STANDING = ("learner.lr=1e-30", "learner.optimizer=sgd", "learner.momentum=0.0")


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_begin_with_the_weights_of_an_export_bit_for_bit(
    stage: int, tmp_path: Path
) -> None:
    run(tmp_path / "source", "run.steps=4")
    assert all(tensor.any() for tensor in weights(tmp_path / "source").values())
    begin = f"run.init_from={tmp_path / 'source' / 'export'}"
    ranks = ("learner.num_ranks=2", f"learner.zero_stage={stage}", "runtime.backend=ray")
    result = run(tmp_path / "new", begin, *ranks, *STANDING, "run.steps=2", "run.seed=8")
    assert result.step == 2
    assert "begins with the averaged weights" in (tmp_path / "new" / "run.log").read_text()
    assert_bitwise_equal(tmp_path / "source", tmp_path / "new")
