"""Distinguishes short-run generators from runs whose chains should sample the model's law."""

from __future__ import annotations

SHORT_RUN_REINIT = 0.5
"""From this buffer.reinit_prob on, training is short-run: the audit then begins at fresh starts, as
the chains do. Below it, the audit continues from the buffer's chains."""

FROZEN_TEMPERATURE = 1e-4
"""T below which chains cross no barrier. Energies of a network are of order 1, so a barrier of .01
is already 100 T high. The recipes for images have a T of 1e-6 to 1e-5."""

GENERATOR = (
    "chains keep their mode, as usual at this temperature; coverage comes from restarts "
    "(buffer.reinit_prob). Do not trust the model's density: ebm-dist evaluate --suite landscape "
    "shows where it is wrong"
)
"""Replaces the alarm for a short-run generator."""


def is_short_run_generator(temperature: float, reinit_prob: float) -> bool:
    """Whether the recipe implies that chains stay in their mode, so that this is not a fault.

    Frozen chains without restarts cover nothing: they are stuck in this regime too.

    Args:
        temperature: T of the law exp(-E/T) of the chains; NaN if unknown.
        reinit_prob: the fraction of chains that restart each round; NaN if unknown.
    """
    frozen = temperature < FROZEN_TEMPERATURE and reinit_prob != 0
    return frozen or reinit_prob >= SHORT_RUN_REINIT
