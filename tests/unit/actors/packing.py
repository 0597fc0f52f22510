"""Ray's choice of GPUs on a node, as far as claims are concerned: a stand-in without processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ebm_dist.cluster.backend import Node


@dataclass
class Machine:
    """A node whose whole claims take free devices, and fractions the fullest that has room."""

    id: str
    cpus: float
    num_gpus: int
    free: list[int] = field(init=False)
    """Of each device, in Ray's steps of 1e-4."""
    cpus_free: float = field(init=False)
    alive: bool = True

    def __post_init__(self) -> None:
        self.free = [10_000] * self.num_gpus
        self.cpus_free = self.cpus

    def place(self, gpus: float, cpus: float = 0.0) -> int | None:
        """The device, -1 for a claim of none, or None where the part would wait."""
        steps = round(gpus * 10_000)
        fits = [device for device, free in enumerate(self.free) if free >= steps]
        if self.cpus_free < cpus or (steps and not fits):
            return None
        self.cpus_free -= cpus
        if not steps:
            return -1
        device = min(fits, key=lambda i: self.free[i])
        self.free[device] -= steps
        return device

    def seen(self) -> Node:
        """As Ray tells it: sums over the devices."""
        return Node(
            self.id,
            False,
            {"CPU": self.cpus_free, "GPU": sum(self.free) / 10_000},
            {"CPU": self.cpus, "GPU": float(self.num_gpus)},
        )


def part(name: str, node: str | None, num_gpus: float) -> Any:
    return SimpleNamespace(name=name, node=node, num_gpus=num_gpus)
