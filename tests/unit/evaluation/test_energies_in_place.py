"""An energy that changes its argument in place is refused by everything that evaluates it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebm_dist.actors.evaluator import mean_energy
from ebm_dist.core.types import EventSpec
from ebm_dist.evaluation.exact import exact_log_partition
from ebm_dist.evaluation.likelihood import log_likelihood, log_partition
from ebm_dist.evaluation.ood import ood_score
from ebm_dist.evaluation.robustness import robust_accuracy
from ebm_dist.jarzynski.kernel import carried
from ebm_dist.objectives.objective import energies_of

PLANE = EventSpec((2,), "real")
ZEROS = torch.zeros(6, dtype=torch.double)


@torch.no_grad()
def energy(x: Tensor) -> Tensor:
    x.mul_(2)
    return x.square().sum(1)


class Classifier(torch.nn.Module):
    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.add_(1)
        return x


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PATHS = {
    "log_likelihood": lambda x: log_likelihood(energy, x, 0.0),
    "log_partition": lambda x: log_partition(
        energy, PLANE, generator=generator(), num_chains=4, num_temperatures=2
    ),
    "exact_log_partition": lambda x: exact_log_partition(energy, PLANE),
    "enumeration": lambda x: exact_log_partition(energy, EventSpec((2,), "binary")),
    "ood energy": lambda x: ood_score(energy, x, score="energy"),
    "ood gradient": lambda x: ood_score(energy, x, score="grad_norm"),
    "ood classes": lambda x: ood_score(Classifier(), x, score="max_prob"),
    "attacks": lambda x: robust_accuracy(
        Classifier(), x, torch.zeros(6, dtype=torch.long), epsilon=0.1, num_steps=1
    ),
    "objectives": lambda x: energies_of(energy, x),
    "weighted rounds": lambda x: carried(ZEROS, ZEROS, x, energy, 1.0),
    "the evaluator": lambda x: mean_energy(energy, x),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("path", PATHS)
def test_an_energy_that_changes_its_argument_is_refused(path):
    with pytest.raises(ValueError, match="changes its argument x in place"):
        PATHS[path](torch.ones(6, 2))
