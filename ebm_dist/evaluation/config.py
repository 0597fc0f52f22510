"""The `evaluation` section of the config: measurements of the model during training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section


class EvaluationConfig(Section):
    """Measurements of the EMA weights and of the chains, outside the training step."""

    every: PositiveInt | None = 500
    """Updates between evaluations; null turns all of them off."""

    num_samples: PositiveInt = 500
    """Number of chains for each measurement of sample quality, and of images for each reference
    value; at most a quarter of the training images."""

    num_grid: PositiveInt = 64
    """Number of chains in the sample grid, which is written to `samples/` and logged."""

    num_test: PositiveInt = 1000
    """Number of held-out events for the logged energy and as reference of `fidelity`."""

    fidelity: Literal["auto"] | bool = "auto"
    """Log the Frechet distance to held-out data, in the features of a small classifier that is
    trained at the start. `auto`: on for labelled images."""

    fidelity_train: PositiveInt = 10_000
    """Largest number of labelled images on which the classifier of `fidelity` is trained."""

    fidelity_epochs: PositiveInt | None = None
    """Epochs of the classifier; null chooses a number that takes about a minute at most."""

    likelihood: Literal["auto"] | bool = "auto"
    """Log `likelihood/log_z`, `likelihood/log_prob` (of up to `num_test` training events) and
    `likelihood/log_prob_test`, at the temperature of the chains. `auto`: only if log Z is exact
    (binary events of at most 20 bits, an RBM whose smaller side has at most 20 units, real events
    of at most 2 dimensions). true: otherwise by annealed importance sampling."""

    num_ais_chains: PositiveInt = 128
    """Chains of annealed importance sampling, per direction."""

    num_ais_temperatures: PositiveInt = 200
    """Steps of the annealing path from the base distribution to the model."""

    trace_chains: Annotated[int, Field(ge=0)] = 32
    """Chains per shard that are traced over rounds for autocorrelation, ESS, split R-hat and the
    stagnation alarm; after every `trace_records` rounds the next ones are traced. 0: no tracing."""

    trace_records: Annotated[int, Field(ge=8)] = 64
    """Rounds that a trace holds. A chain that restarts (buffer.reinit_prob) before 20 rounds is not
    assessed."""

    stagnation_fraction: PositiveFloat = 0.25
    """Fraction of stuck chains above which the stagnation alarm is raised."""

    stagnation_rhat: Annotated[float, Field(gt=1.0)] = 1.2
    """Split R-hat over the traced rounds, of any coordinate or of the energy, above which the
    stagnation alarm is raised as well."""

    reseed_stuck: bool = False
    """Restart stuck chains on a stagnation alarm. Checkpoints do not hold traces, so a resumed run
    may restart other chains than an uninterrupted one."""

    audit_every: PositiveInt | None = None
    """Updates between long-run audits; null turns the auditor off."""

    audit_steps: PositiveInt = 2000
    """Steps of each audited chain; at least ten times `sampler.num_steps`."""

    audit_chains: PositiveInt = 64
    """Number of chains that the auditor runs."""

    audit_feedback: bool = False
    """Use chains of the audit as negatives: those in spurious minima, or all if they differ in law
    from short chains. Checkpoints do not hold them, so a resumed run has none until the next
    audit."""

    audit_feedback_weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Total weight of these chains in the negative phase; the buffer's chains have the rest."""

    audit_feedback_updates: PositiveInt = 50
    """Number of updates that use these chains. It is limited because the chains do not move
    meanwhile."""
