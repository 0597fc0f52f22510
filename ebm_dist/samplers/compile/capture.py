"""A block as one launch: what it does on a GPU, recorded as a CUDA graph and replayed.

Torch's compiler can do this by itself (`triton.cudagraphs`), in a form that does not serve here:
its recordings belong to the thread that compiled, which is one in the background; and a result is
overwritten by the next call, which a chain between two blocks is not allowed to be. What is wanted
is simpler: one function, one shape, inputs that move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[list[Tensor]], Sequence[Tensor]]

Recording = tuple[Callable[[], Any], Sequence[Tensor]]
"""What repeats a function on the memory that it was recorded with, and where its results are."""

_WARM_UPS = 2
"""Calls before the recording: libraries set their memory up at the first."""


def record(run: Callable[[], Sequence[Tensor]], device: torch.device) -> Recording:
    """`run` on `device` as a CUDA graph."""
    here = torch.cuda.current_stream(device)
    aside = torch.cuda.Stream(device)
    try:
        with torch.cuda.device(device):
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    run()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: one that compiles the next block, say.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                results = run()
    finally:
        # A recording that failed may have left its own stream in charge.
        torch.cuda.set_stream(here)
    here.wait_stream(aside)
    return graph.replay, results


class Captured:
    """`run`, recorded at the first call and replayed from then on.

    A recording reads and writes the memory that it was made with. So inputs are copied there,
    and results out of there, by one launch each. Where recording fails, `run` itself goes on.

    Args:
        run: a function of tensors on one device that waits for nothing and draws no noise.
        num_held: so many inputs, the last ones, are the same memory at every call, and are read
            where they are.
        say: is told, in one line, if there is no recording and why.
    """

    def __init__(self, run: Run, num_held: int, say: Callable[[str], None]) -> None:
        self._run = run
        self._num_held = num_held
        self._say = say
        self._own: list[Tensor] = []
        self._recording: Recording | None = None
        self._failed = False

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if self._recording is None and not self._failed:
            self._record(inputs)
        if self._recording is None:
            return self._run(inputs)
        replay, results = self._recording
        torch._foreach_copy_(self._own, inputs[: len(self._own)])
        replay()
        out = [torch.empty_like(result) for result in results]
        torch._foreach_copy_(out, list(results))
        return out

    def _record(self, inputs: list[Tensor]) -> None:
        num_copied = len(inputs) - self._num_held
        own, held = [t.clone() for t in inputs[:num_copied]], inputs[num_copied:]
        try:
            # The function may empty the list that it is given.
            recording = record(lambda: self._run([*own, *held]), own[0].device)
        except Exception as error:
            # Of many kinds: whatever the block calls may refuse to be recorded.
            self._failed = True
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._say(f"sampler.engine: blocks are launched kernel by kernel, because {line}")
            return
        self._own, self._recording = own, recording
