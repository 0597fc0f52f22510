"""One law of an energy with labels or noise levels: all classes together, the cleanest level."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ebm_dist.core.errors import UserError
from ebm_dist.energies.context import trait
from ebm_dist.export.reader import Export
from ebm_dist.export.sample import is_conditional


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


class _Cleanest(nn.Module):
    """E(x, level 0), x (B, *event) -> (B,): of data with the least noise."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor) -> Tensor:
        level = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.energy(x, level=level)


def of_one_law(export: Export, suite: str) -> tuple[Export, list[str]]:
    """The export with the energy that `suite` measures, and notes of what that is.

    `density` and `ood` want one law: that of all classes together, and of the cleanest level.

    Raises:
        UserError: the energy has no such law.
    """
    needs = trait(export.energy, "needs_context")
    if suite != "fidelity" and "condition" in needs:
        raise UserError(
            f"--suite {suite}: {export.path} has a conditional energy, with one law for each "
            "condition; use --suite fidelity, or measure it in Python with "
            "energy.given(condition=...)"
        )
    if suite == "landscape" and "level" in needs:
        raise UserError(
            f"--suite landscape: {export.path} has an energy for each noise level, and its chains "
            "do not stay at one; use --suite fidelity"
        )
    if suite not in ("density", "ood"):
        return export, []
    energy, notes = export.energy, []
    if is_conditional(export):
        if not trait(energy, "num_labels") or "label" in needs:
            also = "" if "level" in needs else " or landscape"
            raise UserError(
                f"{export.path}: the energy takes a label and has no class logits, so it has no "
                f"energy of all classes together; use --suite fidelity{also}"
            )
        energy = _AllClasses(energy, export.sampler.law_temperature)
        notes.append("E(x) is that of all classes together: -T log sum_y exp(-E(x, y)/T)")
    elif "level" in needs:
        std = trait(energy, "noise_stds")[0]
        energy = _Cleanest(energy)
        notes.append(f"E(x) is that of the cleanest level, of data with noise {std:g}")
    return replace(export, energy=energy.eval()), notes
