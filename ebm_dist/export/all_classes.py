"""The energy of all classes together, of a run whose chains have labels."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ebm_dist.core.errors import UserError
from ebm_dist.energies.context import trait
from ebm_dist.export.reader import Export


class _AllClasses(nn.Module):
    """E(x) = -T log sum_y exp(-E(x, y)/T), x (B, *event) -> (B,): the model without its labels.

    The energy itself, called without a label, has T = 1 in its place.
    """

    def __init__(self, energy: nn.Module, temperature: float) -> None:
        super().__init__()
        self.energy = energy
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        logits = self.energy.logits(x)  # type: ignore[operator]
        return -self.temperature * (logits / self.temperature).logsumexp(1)


def of_all_classes(export: Export) -> Export:
    """The export of a class-conditional run, with the energy of all classes together.

    Raises:
        UserError: the energy has no logits, from which that is computed.
    """
    if not trait(export.energy, "num_labels") or "label" in trait(export.energy, "needs_context"):
        raise UserError(
            f"{export.path}: the energy takes a label and has no class logits, so it has no energy "
            "of all classes together; use --suite fidelity or landscape"
        )
    return replace(export, energy=_AllClasses(export.energy, export.sampler.law_temperature).eval())
