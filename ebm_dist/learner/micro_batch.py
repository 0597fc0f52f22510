"""Moves a rank's batch and negatives to its device and splits them into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.types import Batch, Negatives


def micro_batches(
    batch: Batch, negatives: Negatives | None, count: int, device: torch.device
) -> list[tuple[Batch, Negatives | None]]:
    """`count` equal parts of `batch` and `negatives` on `device`.

    Raises:
        ValueError: `count` does not divide the batch or the negatives.
    """
    batch = _to(batch, device)
    negatives = None if negatives is None else _to(negatives, device)
    if count == 1:
        return [(batch, negatives)]
    batches = _cut(batch, count, "data.batch_size")
    cut = [None] * count if negatives is None else _cut(negatives, count, "the negatives")
    return list(zip(batches, cut))


def _to(item: Any, device: torch.device) -> Any:
    """A dataclass of tensors, on `device`; the same object if it is there already."""
    if item.x.device == device:
        return item
    return _mapped(item, lambda tensor: tensor.to(device, non_blocking=True))


def _cut(item: Any, count: int, what: str) -> list[Any]:
    """Splits a dataclass of tensors into `count` equal parts along the first dim."""
    num = item.x.shape[0]
    if num % count:
        raise ValueError(
            f"learner.accumulation: {count} does not divide the {num} events of a rank "
            f"({what}); change either"
        )
    size = num // count
    return [_mapped(item, lambda t, i=i: t[i * size : (i + 1) * size]) for i in range(count)]


def _mapped(item: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass of tensors, of None and of tensors by name, with each tensor mapped."""
    values = {name: getattr(item, name) for name in item.__dataclass_fields__}
    return replace(
        item,
        **{
            name: {key: function(tensor) for key, tensor in value.items()}
            if isinstance(value, dict)
            else function(value)
            for name, value in values.items()
            if value is not None
        },
    )
