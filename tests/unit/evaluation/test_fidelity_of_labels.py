"""Conditional models that come with the package, and the same with their labels mixed up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebm_dist
from ebm_dist.data import DataConfig, load_split
from ebm_dist.evaluation.fidelity import Fidelity
from ebm_dist.export.reader import Export, open_export

GARMENTS = Path(__file__).parents[3] / "data" / "fashion-mnist"
NUM = 40


class MixedUp(nn.Module):
    """E(x, y + 1): every class is drawn under the label before its own."""

    def __init__(self, energy: Any) -> None:
        super().__init__()
        self.energy = energy
        self.context, self.needs_context = energy.context, energy.needs_context
        self.num_labels, self.noise_stds = energy.num_labels, energy.noise_stds

    def forward(self, x: Tensor, label: Tensor, **context: Tensor) -> Tensor:
        return self.energy(x, label=(label + 1) % self.num_labels, **context)


def drawn_and_judged(export: Export, source: str) -> tuple[dict[str, float], dict[str, float]]:
    """What a classifier of the data makes of `NUM` samples, and of as many with labels mixed up."""
    data = DataConfig(source=source)
    train, test = load_split(data, "train", 10_000), load_split(data, "test", 2_000)
    fidelity = Fidelity.fit(train, test, export.spec)
    asked = torch.arange(NUM) % 10

    def judged(energy: nn.Module) -> dict[str, float]:
        x, _ = ebm_dist.sample(replace(export, energy=energy), NUM, label=asked)
        return fidelity.classes(x.clamp(-1, 1), asked)

    return judged(export.energy), judged(MixedUp(export.energy))


def test_digits_of_a_model_whose_labels_are_mixed_up_are_not_of_the_class_asked_for() -> None:
    right, mixed = drawn_and_judged(open_export("digits"), "digits")
    assert right["label_accuracy"] > 0.85
    assert mixed["label_accuracy"] < 0.1
    # The samples are as good, so nothing else tells.
    for found in (right, mixed):
        assert found["confident"] > 0.8
        assert found["class_share_max"] < 0.2


@pytest.mark.slow
@pytest.mark.skipif(not GARMENTS.is_dir(), reason="needs `ebm-dist data prepare fashion-mnist`")
def test_garments_of_a_model_whose_labels_are_mixed_up_are_not_of_the_class_asked_for() -> None:
    right, mixed = drawn_and_judged(open_export("fashion-mnist-classes"), str(GARMENTS))
    # 82% on its card: four standard errors of 40 samples are 24%.
    assert right["label_accuracy"] > 0.58
    assert mixed["label_accuracy"] < 0.2
