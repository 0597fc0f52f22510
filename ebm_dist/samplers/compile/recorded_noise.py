"""Draws the noise of the next steps beforehand, so that steps compile without a generator.

A kernel draws numbers from its generator in some order. `record` notes the draws, `Tape.fill`
makes the same draws in the same order into memory of its own, and `replay` gives that memory to
the kernel in place of new draws. Kernels and energies need no change: a torch function mode
intercepts the calls that take the generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CannotCompile(Exception):
    """These steps cannot be compiled; the message completes the sentence "because ..."."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One call that filled memory with random numbers."""

    method: str  # of a tensor: normal_, uniform_ or random_
    shape: tuple[int, ...]
    dtype: torch.dtype
    arguments: tuple[Any, ...]  # mean and standard deviation, or the ends of the interval


_IN_PLACE = {
    torch.Tensor.normal_: "normal_",
    torch.Tensor.uniform_: "uniform_",
    torch.Tensor.random_: "random_",
}
# torch fills the result of these functions by the named method, so the numbers are the same.
_NEW = {torch.randn: "normal_", torch.rand: "uniform_"}


class _Draws(TorchFunctionMode):
    """Intercepts every call that draws from `generator`; `drawn` returns its result."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is not self._generator:
            return func(*args, **kwargs)
        if func in _IN_PLACE:
            into, rest = args[0], tuple(args[1:])
            self._refuse(func, set(kwargs) - {"generator"})
            draw = Draw(_IN_PLACE[func], tuple(into.shape), into.dtype, rest)
            return self.drawn(draw, func, args, kwargs, into)
        if func in _NEW:
            self._refuse(func, set(kwargs) - {"generator", "device", "dtype"})
            size = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            draw = Draw(_NEW[func], tuple(size), dtype, ())
            return self.drawn(draw, func, args, kwargs, None)
        raise CannotCompile(f"it draws its noise by {getattr(func, '__name__', func)}")

    def drawn(self, draw: Draw, func: Any, args: Any, kwargs: Any, into: Tensor | None) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _refuse(func: Any, unknown: set[str]) -> None:
        if unknown:
            raise CannotCompile(f"it calls {func.__name__} with {', '.join(sorted(unknown))}")


class _Record(_Draws):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__(generator)
        self.draws: list[Draw] = []

    def drawn(self, draw: Draw, func: Any, args: Any, kwargs: Any, into: Tensor | None) -> Tensor:
        self.draws.append(draw)
        return func(*args, **kwargs)


class _Replay(_Draws):
    def __init__(self, generator: torch.Generator, draws: Sequence[Draw], tape: Sequence[Tensor]):
        super().__init__(generator)
        self._next = iter(zip(draws, tape, strict=True))

    def drawn(self, draw: Draw, func: Any, args: Any, kwargs: Any, into: Tensor | None) -> Tensor:
        expected, numbers = next(self._next, (None, None))
        if draw != expected or numbers is None:
            raise CannotCompile("the noise that it asks for changes from step to step")
        return numbers if into is None else into.copy_(numbers)


@contextmanager
def record(generator: torch.Generator) -> Iterator[list[Draw]]:
    """Inside the context, add every draw from `generator` to the list that is yielded.

    Raises:
        CannotCompile: inside the context, at a draw that is not normal, uniform or of integers.
    """
    with _Record(generator) as mode:
        yield mode.draws


@contextmanager
def replay(
    generator: torch.Generator, draws: Sequence[Draw], tape: Sequence[Tensor]
) -> Iterator[None]:
    """Inside the context, answer draws from `generator` with the tensors of `tape`, in order.

    Raises:
        CannotCompile: inside the context, at a draw that is not the next of `draws`.
    """
    with _Replay(generator, draws, tape):
        yield


class Tape:
    """Memory for `draws` that `fill` overwrites with new numbers."""

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.memory = [torch.empty(d.shape, dtype=d.dtype, device=device) for d in draws]
        # Bound methods: ten attribute look-ups take as long as a step of a small energy.
        self._fills = [
            (getattr(numbers, d.method), d.arguments) for numbers, d in zip(self.memory, draws)
        ]

    def fill(self, generator: torch.Generator) -> list[Tensor]:
        """New numbers: those that the kernel would have drawn from `generator` itself."""
        for draw, arguments in self._fills:
            draw(*arguments, generator=generator)
        return self.memory

    def numbers(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The numbers of each draw, from the tensors that `fill` returned; here they are equal."""
        return inputs
