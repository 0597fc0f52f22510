"""What a run measures of its samples is measured of as many images as the floor beside it."""

from __future__ import annotations

import numpy as np
import pytest

from ebm_dist import samplers
from ebm_dist.actors.evaluator import Evaluator
from ebm_dist.core.types import ChainSample, EventSpec
from ebm_dist.core.weights import FlatLayout
from ebm_dist.data import DataConfig, load_split
from ebm_dist.energies import FAMILY
from ebm_dist.evaluation.config import EvaluationConfig


def test_the_temperature_that_a_step_size_makes_of_t_is_measured() -> None:
    data, spec = DataConfig(source="digits"), EventSpec((1, 8, 8), "image", 10)
    energy = FAMILY.section("quadratic", precision=[3.0] * 64, learnable=True).bind(spec)  # type: ignore[attr-defined]
    flat = FlatLayout.of(energy.build()).pack(energy.build()).numpy()
    config = EvaluationConfig(fidelity=False, likelihood=False)
    for name, measured in (("langevin", True), ("mala", False)):
        sampler = samplers.FAMILY.section(name, step_size=0.2, temperature=0.5)
        evaluator = Evaluator(config, data, energy, spec, sampler, seed=0, temperature=0.5)  # type: ignore[arg-type]
        found = evaluator.evaluate(1, ChainSample(np.zeros((8, 1, 8, 8), np.float32)), flat)
        values = found.values
        assert found.neighbours is None
        assert ("sampler/curvature" in values) == measured
        if measured:
            assert values["sampler/curvature"] == pytest.approx(3.0)
            expected = 2 * 0.5 / (2 - 3.0 * 0.2)
            assert values["sampler/effective_temperature"] == pytest.approx(expected)


@pytest.mark.parametrize("num_chains", [120, 500])
def test_training_images_as_samples_are_as_far_as_the_floor(num_chains: int) -> None:
    # Digits keep a quarter of their training images from the classifier: fewer than 500.
    data, spec = DataConfig(source="digits"), EventSpec((1, 8, 8), "image", 10)
    energy = FAMILY.section("quadratic", precision=[1.0] * 64, learnable=True).bind(spec)  # type: ignore[attr-defined]
    config = EvaluationConfig(fidelity_epochs=1, likelihood=False)
    flat = FlatLayout.of(energy.build()).pack(energy.build()).numpy()
    images = load_split(data, "train", config.fidelity_train).x[:num_chains].numpy()
    found = Evaluator(config, data, energy, spec, seed=0).evaluate(1, ChainSample(images), flat)
    values = found.values
    assert values["fidelity/distance"] == pytest.approx(values["fidelity/train"])
    assert found.neighbours is not None
    shown = found.neighbours.reshape(16, 4, 1, 8, 8)
    np.testing.assert_allclose(shown[:, 1], images[:16], atol=1e-3)
