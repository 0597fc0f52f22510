"""Likelihood, sample quality, out-of-distribution detection, robustness and long-run audits."""

from __future__ import annotations

from ebm_dist.evaluation.audit import long_run_audit
from ebm_dist.evaluation.bases import base_law
from ebm_dist.evaluation.exact import exact_log_partition, is_exact
from ebm_dist.evaluation.fidelity import Fidelity, frechet_distance
from ebm_dist.evaluation.likelihood import (
    bits_per_dim,
    log_likelihood,
    log_partition,
    log_probs,
)
from ebm_dist.evaluation.ood import ood_auroc, ood_report
from ebm_dist.evaluation.robustness import robust_accuracy

__all__ = [
    "Fidelity",
    "base_law",
    "bits_per_dim",
    "exact_log_partition",
    "frechet_distance",
    "is_exact",
    "log_likelihood",
    "log_partition",
    "log_probs",
    "long_run_audit",
    "ood_auroc",
    "ood_report",
    "robust_accuracy",
]
