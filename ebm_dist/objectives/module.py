"""A user's own function, callable or module as the objective, by a target in the config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ebm_dist.core.plugins import USER_METRICS, Target, load_target
from ebm_dist.core.types import CONTEXTS, Batch, EnergyFn, Negatives
from ebm_dist.core.weights import check_trainable
from ebm_dist.objectives.objective import FAMILY, Metrics, Objective, ObjectiveSection


class OwnObjective(Objective):
    """Calls a user's `(energy, batch, negatives, generator) -> (loss, metrics)`.

    A metric without a slash in its name is logged as `user/NAME`. One with a slash must be in
    `metrics/names.py`, such as `energy/gap`, which learner.gap_limit reads.
    """

    def __init__(
        self, own: Callable[..., Any], says: object, section: ModuleObjectiveSection
    ) -> None:
        """
        Args:
            own: the callable.
            says: the object with the attributes `needs_labels`, `needs_generator` and
                `estimates_log_z`, if any.
        """
        super().__init__()
        self.own = own
        self.target = section.target
        self.needs_negatives = section.needs_negatives
        self.needs_labels = bool(getattr(says, "needs_labels", False))
        self.needs_generator = bool(getattr(says, "needs_generator", True))
        self.estimates_log_z = bool(getattr(says, "estimates_log_z", False))

    def begin_update(self, step: int) -> None:
        super().begin_update(step)
        if isinstance(self.own, Objective):
            self.own.begin_update(step)

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        came = self.own(energy, batch, negatives, generator)
        if not (isinstance(came, tuple) and len(came) == 2 and isinstance(came[1], dict)):
            raise ValueError(
                f"objective.target: {self.target} returned a {type(came).__name__}, expected the "
                "pair (loss, metrics) of a scalar tensor and a dict"
            )
        loss, metrics = came
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective.target: {self.target} returned a loss of shape {shape}, expected a "
                "scalar tensor: end it with .mean()"
            )
        named = {
            key if "/" in key else f"{USER_METRICS}{key}": torch.as_tensor(value).detach()
            for key, value in metrics.items()
        }
        for key, value in named.items():
            if value.numel() != 1:
                raise ValueError(
                    f"objective.target: {self.target} returned the metric {key} of shape "
                    f"{tuple(value.shape)}, expected one number"
                )
        return loss, named


@FAMILY.register
class ModuleObjectiveSection(ObjectiveSection):
    """An objective of your own: a function, or a class whose instances are callable."""

    name: Literal["module"] = "module"
    far_modes: ClassVar[str] = "not known, since the objective is code of the user"
    reweights: ClassVar[bool] = False
    example: ClassVar[dict[str, Any]] = {"target": "my_pkg.losses:contrast"}

    target: Target
    """MODULE:NAME of a function `(energy, batch, negatives, generator) -> (loss, metrics)`, or of a
    class that makes such a callable from `params`; an nn.Module may have weights of its own. Its
    attributes `needs_labels` (default false), `needs_generator` (default true) and
    `estimates_log_z` (default false: whether it returns the metric `likelihood/log_z`) are read."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, or of every call of the function."""

    needs_negatives: bool = True
    """Whether it reads negatives. With false the run has no chains, and `negatives` is None."""

    @property
    def contexts(self) -> frozenset[str]:
        return frozenset(CONTEXTS)  # it may read any of `negatives.context`

    @property
    def takes_negatives(self) -> bool:
        return self.needs_negatives

    def build(self, seed: int = 0) -> Objective:
        # Imported before the seed is set, because an import may use random numbers.
        load_target(self.target, "objective.target")
        return super().build(seed)

    def reads_temperature(self, *, reweights: bool) -> bool:
        return False

    def module(self) -> Objective:
        found = load_target(self.target, "objective.target")
        if inspect.isfunction(found):
            own, says = partial(found, **self.params), found
        else:
            try:
                own = says = found(**self.params)
            except Exception as error:
                raise ValueError(
                    f"objective.params: {self.target} made of {self.params} raises "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not callable(own):
            raise ValueError(
                f"objective.target: {self.target} made a {type(own).__name__}, expected a callable "
                "(energy, batch, negatives, generator) -> (loss, metrics)"
            )
        if isinstance(own, nn.Module):
            check_trainable(own, f"objective.target: {self.target}")
        stated = getattr(says, "needs_negatives", self.needs_negatives)
        if stated != self.needs_negatives:
            raise ValueError(
                f"objective.needs_negatives: {str(self.needs_negatives).lower()}, but "
                f"{self.target} says {stated}; set it to {str(stated).lower()}"
            )
        return OwnObjective(own, says, self)
