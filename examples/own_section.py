"""A section of your own: its keys are checked and documented like those of what is built in."""

from typing import Literal

from own_network import Net
from pydantic import PositiveInt

from ebm_dist import energies
from ebm_dist.energies.family import BoundSection


@energies.FAMILY.register
class TallSection(BoundSection):
    """A network with one wide layer."""

    name: Literal["tall"] = "tall"

    height: PositiveInt = 64
    """Units of the layer."""

    def module(self):
        return Net(self.height)
