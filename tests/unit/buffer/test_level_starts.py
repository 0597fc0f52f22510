"""Chains of noise levels that begin at data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ebm_dist.buffer.starts import Starts
from ebm_dist.config.run_config import load
from ebm_dist.core.types import Batch, EventSpec

SPEC = EventSpec((2,), "real")
STDS = (0.1, 1.0, 3.0)
NUM = 6000


class AtFive:
    """Data that are all at 5."""

    def next_batch(self, num: int) -> Batch:
        return Batch(torch.full((num, 2), 5.0))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def test_a_chain_that_begins_at_a_datum_has_the_noise_of_its_level() -> None:
    config = load(
        {
            "energy": {"name": "mlp", "num_levels": 3, "noise_stds": STDS},
            "sampler": {
                "name": "simulated_tempering",
                "kernel": {"name": "mala", "step_size": 0.1},
            },
            "objective": {"name": "contrastive_levels"},
            "buffer": {"init": "data", "context": {"level": "stratified"}},
        }
    )
    fields = config.context_fields(SPEC)
    starts = Starts(config.buffer, SPEC, index=0, seed=0, data=AtFive(), fields=fields)
    x, context = starts.draw(NUM, "start")
    assert sorted(set(context["level"])) == [0, 1, 2]
    for level, std in enumerate(STDS):
        numbers = (x[context["level"] == level] - 5.0).ravel()
        assert abs(numbers.mean()) < 4 * std / len(numbers) ** 0.5
        error = (2 * len(numbers)) ** -0.5  # of a standard deviation, relative
        assert numbers.std() == pytest.approx(std, rel=4 * error)
    again, _ = Starts(config.buffer, SPEC, index=0, seed=0, data=AtFive(), fields=fields).draw(
        NUM, "start"
    )
    assert (again == x).all()
