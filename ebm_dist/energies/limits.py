"""Limits on the size of an energy while it is built: one line of config can ask for any size."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode

MAX_PARTS = 1_000_000
"""Most modules and parameters of an energy that a user builds; they take some ten seconds."""


@contextmanager
def limited(*, max_parts: int, max_numbers: int) -> Iterator[None]:
    """Inside the context, an energy that this thread builds too large raises an error.

    Nothing is estimated from the config: modules and parameters are counted when they are
    registered, and numbers before their memory is allocated.

    Raises:
        ValueError: more than `max_parts` modules and parameters, or `max_numbers` numbers.
    """
    parts, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, part: object) -> None:
        nonlocal parts
        if threading.get_ident() != thread:
            return
        parts += 1
        if parts > max_parts:
            raise ValueError(
                f"energy: has more than {max_parts} modules and weights; lower its depth, or the "
                "number of its blocks, layers or members"
            )

    hooks = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
    ]
    try:
        with _Numbers(max_numbers):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Numbers(TorchDispatchMode):
    """Counts the numbers of every new tensor, before torch makes it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = self._limit = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # A function that creates a tensor (empty, zeros, randn, randint) takes sizes, no tensors.
        if not any(isinstance(arg, Tensor) for arg in args):
            for arg in args:
                if isinstance(arg, list | tuple) and all(isinstance(size, int) for size in arg):
                    self._left -= math.prod(arg)
                    break
        if self._left < 0:
            raise ValueError(
                f"energy: needs more than {self._limit} numbers; lower its widths or depth"
            )
        return func(*args, **(kwargs or {}))


def numbers_in_memory() -> int:
    """The number of float32 numbers that fit into this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // torch.float32.itemsize
