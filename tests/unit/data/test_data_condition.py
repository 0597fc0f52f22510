"""`data.condition_size` divides each datum into a given part and the event that is sampled."""

from __future__ import annotations

import pytest
import torch

from ebm_dist.data import DataConfig, DataStream, describe, load_split

KEYS = {"source": "digits", "batch_size": 8, "noise_std": 0.1, "flip": True}


@pytest.mark.parametrize("flatten", [False, True])
def test_condition_and_event_are_the_two_parts_of_the_same_datum(flatten: bool) -> None:
    whole = DataConfig(**KEYS, flatten=flatten)  # type: ignore[arg-type]
    parted = whole.model_copy(update={"condition_size": 3})
    spec, batch = describe(parted), DataStream(parted, seed=1).next_batch(8)
    full = DataStream(whole, seed=1).next_batch(8)
    for divided, undivided in (
        (batch, full),
        (load_split(parted, "test", 9), load_split(whole, "test", 9)),
    ):
        assert divided.condition is not None
        assert tuple(divided.x.shape[1:]) == spec.shape
        assert tuple(divided.condition.shape[1:]) == spec.condition_shape
        assert torch.equal(torch.cat([divided.condition, divided.x], -1), undivided.x)
        assert torch.equal(divided.label, undivided.label)  # type: ignore[arg-type]
    assert spec.condition_shape == ((3,) if flatten else (1, 8, 3))
    assert describe(whole).condition_shape is None
    assert full.condition is None
