"""Joint energy-classifier: one network is a classifier of x and an energy over x."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_dist.core.types import Batch, EnergyFn, EventSpec, Negatives
from ebm_dist.objectives.likelihood.contrastive import Context, Contrastive, ContrastiveFields
from ebm_dist.objectives.objective import FAMILY, Metrics, Objective


@FAMILY.register
class JointSection(ContrastiveFields):
    """Cross entropy of the logits, and the contrastive loss of E(x) = -logsumexp(logits)."""

    name: Literal["joint"] = "joint"
    example: ClassVar[dict[str, Any]] = {}
    far_modes: ClassVar[str] = (
        "seen as far as the chains cross between them: with sampler.name parallel_tempering, "
        "not with chains that stay in the mode where they began (from data, or persistent "
        "behind a barrier)"
    )

    classification_weight: NonNegativeFloat = 1.0
    """Weight of -log p(y|x)."""

    contrastive_weight: NonNegativeFloat = 1.0
    """Weight of the contrastive part."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the label's mass that is spread over all classes."""

    def bind(self, spec: EventSpec) -> JointSection:
        if spec.num_classes is None:
            raise ValueError(
                "objective.name: joint needs the number of the data's classes; set "
                "data.num_classes where plain shards hold .cls labels, else choose labelled data, "
                "or objective.name: contrastive"
            )
        return super().bind(spec)

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset({"label"})

    def module(self) -> Objective:
        return Joint(self)


class Joint(Contrastive):
    """-log p(y|x) - log p(x), with logits f(x), p(y|x) = softmax f and E(x) = -logsumexp f.

    Grathwohl et al. (2020), arXiv:1912.03263, eq. 9. The energy needs `logits(x)`:
    (B, num_classes). Where negatives carry labels (`buffer.context.label`) the second part is
    -log p(x|y), with E(x, y) = -f_y(x).

    Sees the weights of far modes only as far as chains cross between them.
    """

    needs_labels = True

    def __init__(self, config: JointSection) -> None:
        super().__init__(config)
        self.joint = config

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        assert negatives is not None
        assert batch.label is not None
        seen: list[Tensor] = []

        def evaluate(energy: nn.Module | EnergyFn, x: Tensor, context: Context) -> Tensor:
            seen.append(logits_of(energy, x))
            if (label := context.get("label")) is None:
                return -seen[0].logsumexp(1)
            return -seen[0].gather(1, label[:, None]).squeeze(1)

        contrastive, metrics = self.contrast(energy, batch, negatives, generator, evaluate)
        logits = seen[0][: batch.x.shape[0]]
        classification = F.cross_entropy(
            logits, batch.label, label_smoothing=self.joint.label_smoothing
        )
        loss = (
            self.joint.classification_weight * classification
            + self.joint.contrastive_weight * contrastive
        )
        metrics["loss/classification"] = classification.detach()
        metrics["objective/accuracy"] = (logits.argmax(1) == batch.label).float().mean()
        metrics["loss/total"] = loss.detach()
        return loss, metrics


def logits_of(energy: nn.Module | EnergyFn, x: Tensor) -> Tensor:
    """The energy's class logits (B, num_classes), at least float32."""
    if not hasattr(energy, "logits"):
        raise ValueError(
            f"energy: {type(energy).__name__} has no logits(x) -> (B, num_classes), which this "
            "objective reads; use a network energy with energy.num_classes set"
        )
    out = cast(Any, energy).logits(x)
    if out.ndim != 2 or out.shape[0] != x.shape[0]:
        raise ValueError(
            f"energy.logits: returned shape {tuple(out.shape)} for x of shape {tuple(x.shape)}, "
            f"expected ({x.shape[0]}, num_classes)"
        )
    return out if out.dtype == torch.float64 else out.float()
