"""Out-of-distribution detection: AUROC of several scores, and a calibrated threshold of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from scipy.stats import binomtest
from torch import Tensor

from ebm_dist.core.events import energy_at
from ebm_dist.core.types import EnergyFn

Score = Literal["energy", "grad_norm", "typicality", "max_prob"]
SCORES: tuple[Score, ...] = ("energy", "grad_norm", "typicality", "max_prob")


def ood_auroc(
    energy: EnergyFn,
    x_in: Tensor,
    x_out: Tensor,
    *,
    score: Score = "energy",
    x_reference: Tensor | None = None,
) -> float:
    """Probability that an out-of-distribution event scores above an in-distribution one.

    1/2 is chance level. Published figures of one model differ by up to .2 between scores, so
    report the score with the number; `auroc` also gives the standard error.

    Args:
        x_in: (N, *event) held-out events of the training distribution.
        x_out: (M, *event) out-of-distribution events.
        score: see `ood_score`.
        x_reference: training events, which `typicality` needs.
    """
    familiar = ood_score(energy, x_in, score=score, x_reference=x_reference)
    foreign = ood_score(energy, x_out, score=score, x_reference=x_reference)
    return auroc(familiar, foreign)[0]


def ood_score(
    energy: EnergyFn,
    x: Tensor,
    *,
    score: Score,
    x_reference: Tensor | None = None,
    batch_size: int = 500,
) -> Tensor:
    """Scores (N,) of events (N, *event), higher for more unusual ones.

    energy: E(x), minus the log-likelihood up to a constant. grad_norm: ||dE/dx||, the
    approximate-mass score of Grathwohl et al. (2020), arXiv:1912.03263. typicality:
    |E(x) - mean E(x_reference)|, Nalisnick et al. (2019), arXiv:1906.02994, for single events.
    max_prob: minus the largest class probability, for an energy with `logits`.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if score == "typicality":
        if x_reference is None:
            raise ValueError("score 'typicality' needs x_reference, events of the training law")
        centre = _energies(energy, x_reference, batch_size).mean()
        return (_energies(energy, x, batch_size) - centre).abs()
    if score == "energy":
        return _energies(energy, x, batch_size)
    if score == "grad_norm":
        return torch.cat([_grad_norm(energy, part) for part in x.split(batch_size)])
    logits = getattr(energy, "logits", None)
    if not callable(logits):
        raise ValueError(
            f"score 'max_prob' needs an energy with class logits; {type(energy).__name__} has "
            f"none, use score 'energy' or 'grad_norm'"
        )
    with torch.no_grad():
        parts = []
        for part in x.split(batch_size):
            value = energy_at(logits, part)  # type: ignore[arg-type]
            parts.append(-value.double().softmax(dim=1).max(dim=1).values.cpu())
    return torch.cat(parts)


def auroc(familiar: Tensor, foreign: Tensor) -> tuple[float, float]:
    """P(foreign > familiar) + P(equal)/2 of scores (N,) and (M,), and its standard error.

    The Mann-Whitney statistic, with the distribution-free error of DeLong et al. (1988).
    """
    familiar, foreign = familiar.double().cpu(), foreign.double().cpu()
    if familiar.numel() < 2 or foreign.numel() < 2:
        raise ValueError(
            f"auroc: needs at least 2 scores on each side, got {familiar.numel()} and "
            f"{foreign.numel()}"
        )
    if bool(familiar.isnan().any() | foreign.isnan().any()):
        raise ValueError("auroc: scores are NaN; the energy is not finite on these events")

    def below(values: Tensor, query: Tensor) -> Tensor:
        ordered = values.sort().values
        low = torch.searchsorted(ordered, query)
        high = torch.searchsorted(ordered, query, right=True)
        return (low + high).double() / (2 * len(values))

    of_foreign = below(familiar, foreign)  # share of familiar scores below each foreign one
    of_familiar = 1 - below(foreign, familiar)
    variance = of_foreign.var() / len(foreign) + of_familiar.var() / len(familiar)
    return float(of_foreign.mean()), math.sqrt(float(variance))


def threshold_for(familiar: Tensor, kept: float) -> float:
    """The score at or below which a new in-distribution event lies with probability >= `kept`.

    The ceil((N + 1) kept)-th smallest of N held-out scores (N,), as in split conformal prediction:
    it holds for any law of the scores, averaged over the N events. Infinite if N is too small.
    """
    rank = math.ceil((len(familiar) + 1) * kept)
    return float(familiar.sort().values[rank - 1]) if rank <= len(familiar) else math.inf


def share(hits: Tensor) -> tuple[float, float, float]:
    """The share of true entries of (N,) bool, and the 95% interval of Wilson around it."""
    found = binomtest(int(hits.sum()), len(hits))
    interval = found.proportion_ci(method="wilson")
    return float(found.statistic), float(interval.low), float(interval.high)


def ood_report(
    energy: EnergyFn,
    x_in: Tensor,
    others: Mapping[str, Tensor],
    x_reference: Tensor | None = None,
    *,
    kept: float = 0.95,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """AUROC of every applicable score for each data set of `others`, and a threshold's shares.

    The threshold is calibrated on every other event of `x_in`; the share that it keeps is measured
    on the rest.

    Args:
        kept: in-distribution events that the threshold is to keep.
        on_step: called with the number of sets that are scored and of all.

    Returns:
        `auroc/SCORE/SET` and `auroc_se/SCORE/SET`; `threshold/SCORE`; `kept/SCORE` and
        `detected/SCORE/SET`, the shares below and above it, with 95% intervals in `kept_low`,
        `kept_high`, `detected_low` and `detected_high`.
    """
    scores: list[Score] = ["energy", "grad_norm"]
    if x_reference is not None:
        scores.append("typicality")
    if getattr(energy, "num_classes", None):
        scores.append("max_prob")
    report = {}
    total = len(scores) * (1 + len(others))
    done = itertools.count(1)
    for score in scores:
        familiar = ood_score(energy, x_in, score=score, x_reference=x_reference)
        on_step(next(done), total)
        limit = threshold_for(familiar[::2], kept)
        report[f"threshold/{score}"] = limit
        report |= _shares("kept", score, familiar[1::2] <= limit)
        for name, x_out in others.items():
            foreign = ood_score(energy, x_out, score=score, x_reference=x_reference)
            report |= _shares("detected", f"{score}/{name}", foreign > limit)
            value, error = auroc(familiar, foreign)
            report[f"auroc/{score}/{name}"] = value
            report[f"auroc_se/{score}/{name}"] = error
            on_step(next(done), total)
    return report


def _shares(name: str, of: str, hits: Tensor) -> dict[str, float]:
    names = f"{name}/{of}", f"{name}_low/{of}", f"{name}_high/{of}"
    return dict(zip(names, share(hits)))


def _energies(energy: EnergyFn, x: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([energy_at(energy, part).double().cpu() for part in x.split(batch_size)])


def _grad_norm(energy: EnergyFn, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(energy_at(energy, x).sum(), x)
    return grad.flatten(1).double().norm(dim=1).cpu()
