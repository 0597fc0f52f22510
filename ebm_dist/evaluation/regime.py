"""What a run's chains are for: to sample the model's law, or to generate from fresh starts."""

from __future__ import annotations

SHORT_RUN_REINIT = 0.5
"""From this buffer.reinit_prob on, what training knows of the model is its chains' first rounds:
the audit starts where they start. Below it, the audit goes on from where the chains are."""

FROZEN_TEMPERATURE = 1e-4
"""T below which chains cross nothing. Energies of a network are of order 1, so a barrier of a
hundredth is already a hundred T high. The recipes for images have a T of 1e-6 to 1e-5."""

GENERATOR = (
    "chains keep their mode, as usual at this temperature; coverage comes from restarts "
    "(buffer.reinit_prob). Do not trust the model's density: run `ebm-dist evaluate` with "
    "`--suite landscape`"
)
"""What is said of a short-run generator in place of an alarm."""


def is_short_run_generator(temperature: float, reinit_prob: float) -> bool:
    """Whether chains that stay in their mode are what the recipe does, and no fault.

    Args:
        temperature: T of the law exp(-E/T) of the chains, NaN where it is not known.
        reinit_prob: the share of chains that start anew each round.
    """
    return temperature < FROZEN_TEMPERATURE or reinit_prob >= SHORT_RUN_REINIT
