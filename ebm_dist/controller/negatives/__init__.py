"""The source of an update's negatives, and their delivery to the learners."""

from ebm_dist.controller.negatives.asynchronous import AsyncNegatives
from ebm_dist.controller.negatives.source import NegativeSource
from ebm_dist.controller.negatives.sync import SyncNegatives

MODES: dict[str, type[NegativeSource]] = {"sync": SyncNegatives, "async": AsyncNegatives}
"""By `flow.mode`."""
