"""What a run measures of its samples is measured of as many images as the floor beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, run

import ebm_dist
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


DIGITS: dict[str, Any] = {
    **SMALL,
    "run": {"name": "small", "seed": 3, "steps": 2},
    "data": {"source": "digits", "batch_size": 64, "prefetch": 0},
    "energy": {"name": "mlp", "widths": (16,), "num_classes": "data"},
    "sampler": {"name": "langevin", "step_size": 0.1, "noise_std": 0.01, "num_steps": 2},
    "objective": {"name": "joint"},
    "evaluation": {"every": 2, "fidelity_epochs": 1},
}


def test_the_card_of_a_classifier_has_the_accuracy_of_its_own_logits_and_that_of_its_judge(
    tmp_path: Path,
) -> None:
    result, _ = run(tmp_path / "r", base=DIGITS)
    export = result.open_export()
    test = load_split(DataConfig(source="digits"), "test")
    with torch.no_grad():
        guess = ebm_dist.load_energy(export.path).logits(test.x).argmax(1)
    accuracy = float((guess == test.label).double().mean())
    assert result.metrics["classifier/accuracy"] == pytest.approx(accuracy)
    head, card = (export.path / "README.md").read_text().split("# small\n")
    assert (
        f"| `classifier/accuracy` | {accuracy:.6g} | 2 | test accuracy of the model's own" in card
    )
    assert "of the feature classifier, which judges the samples; not that of the model |" in card
    assert "type: classifier/accuracy" in head
    assert "type: fidelity/accuracy" not in head, "the hub shows these as results of the model"


def test_class_logits_that_are_not_trained_to_classify_are_not_measured_as_a_classifier(
    tmp_path: Path,
) -> None:
    base = {
        **DIGITS,
        "objective": {"name": "contrastive"},
        "evaluation": {"every": 2, "fidelity": False},
    }
    result, _ = run(tmp_path / "r", base=base)
    assert "energy/test" in result.metrics
    assert "classifier/accuracy" not in result.metrics
