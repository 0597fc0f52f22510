"""What a run measures of its own model while it trains, and how often."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ebm_dist.core.section import Section


class EvaluationConfig(Section):
    """Measurements on the EMA weights and on the chains, off the training step."""

    every: PositiveInt | None = 500
    """Updates between evaluations; null turns all of them off."""

    num_samples: PositiveInt = 500
    """Chains taken from the buffer for each measurement of sample quality, and images behind each
    reference; a quarter of the training images where that is fewer."""

    num_grid: PositiveInt = 64
    """Chains in the sample grid written to `samples/` and logged as an image."""

    num_test: PositiveInt = 1000
    """Held-out events whose energy is logged, and that fidelity compares with."""

    fidelity: Literal["auto"] | bool = "auto"
    """Feature-space Frechet distance to held-out data, from a small classifier trained once at
    the start. `auto`: on for labelled images."""

    fidelity_train: PositiveInt = 10_000
    """Labelled images that the classifier of `fidelity` is trained on, at most."""

    fidelity_epochs: PositiveInt | None = None
    """Passes over them; null chooses by their number so that it takes about a minute at most."""

    likelihood: Literal["auto"] | bool = "auto"
    """Log `likelihood/log_z`, `likelihood/log_prob` (of up to `num_test` training events) and
    `likelihood/log_prob_test`, at the temperature of the chains. `auto`: where log Z is exact
    (binary events of at most 20 bits, an RBM whose smaller side has at most 20 units, real events
    of at most 2 dimensions); true: also elsewhere, by annealed importance sampling."""

    num_ais_chains: PositiveInt = 128
    """Chains of annealed importance sampling, in each direction."""

    num_ais_temperatures: PositiveInt = 200
    """Steps of its path from the base law to the model."""

    trace_chains: Annotated[int, Field(ge=0)] = 32
    """Chains of each shard followed over their rounds for autocorrelation, ESS, split R-hat
    and the stagnation alarm, others after every `trace_records` rounds; 0 follows none."""

    trace_records: Annotated[int, Field(ge=8)] = 64
    """Rounds that the followed trace holds. Chains that live shorter than 20 of them, through
    buffer.reinit_prob, are not judged."""

    stagnation_fraction: PositiveFloat = 0.25
    """Share of stuck chains above which the stagnation alarm sounds."""

    stagnation_rhat: Annotated[float, Field(gt=1.0)] = 1.2
    """Split R-hat of any coordinate or of the energy, over the followed rounds, above which the
    stagnation alarm sounds as well."""

    reseed_stuck: bool = False
    """Give stuck chains a fresh start when the alarm sounds. What was followed is not kept in
    checkpoints, so a resumed run may re-seed others than one that was not stopped."""

    audit_every: PositiveInt | None = None
    """Updates between long-run audits; null turns the auditor off."""

    audit_steps: PositiveInt = 2000
    """Steps of each audited chain; ten or more times `sampler.num_steps`."""

    audit_chains: PositiveInt = 64
    """Chains that the auditor runs."""

    audit_feedback: bool = False
    """Feed what an audit found back as negatives: the chains in spurious minima, or all where their
    law is not the short run's. They are not kept in checkpoints: a run resumed meanwhile goes
    without until the next audit."""

    audit_feedback_weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the negative phase that they have together; the buffer's chains have the rest."""

    audit_feedback_updates: PositiveInt = 50
    """Updates that they are fed back for. The chains stand meanwhile, so not for ever."""
