"""Records a block as a CUDA graph and replays it as one launch.

torch's compiler can do this itself (`triton.cudagraphs`), but not in a form that fits here: its
recordings belong to the thread that compiled, here a background thread, and a call overwrites the
results of the call before, which are chains still in use. The need here is simpler: one function,
one shape, inputs at changing addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[list[Tensor]], Sequence[Tensor]]

Recording = tuple[Callable[[], Any], Sequence[Tensor]]
"""A function that replays the recording on the memory it was recorded with, and its results."""

_WARM_UPS = 2
"""Calls before the recording: libraries allocate their work memory at the first."""


def record(run: Callable[[], Sequence[Tensor]], device: torch.device) -> Recording:
    """`run` on `device` as a CUDA graph."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    try:
        with torch.cuda.device(device):
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile, for example one that compiles the next block.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                results = run()
    finally:
        # A failed recording may have left its own stream as the current one.
        torch.cuda.set_stream(current)
    current.wait_stream(side)
    return graph.replay, results


class Captured:
    """Records `run` at the first call and replays it from then on.

    A recording reads and writes fixed memory. So each call copies the inputs into that memory and
    the results out of it, by one launch each. If recording fails, every call runs `run`.

    Args:
        run: a function of tensors on one device that never synchronises and draws no noise.
        num_held: number of inputs, at the end of the list, that are the same memory at every call;
            they are read in place.
        say: receives one line if recording fails, with the reason.
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
            # A new list each time, since the function may empty the one it is given.
            recording = record(lambda: self._run([*own, *held]), own[0].device)
        except Exception as error:
            # Any exception: every operation of the block may refuse to be recorded.
            self._failed = True
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._say(f"sampler.engine: blocks are launched kernel by kernel, because {line}")
            return
        self._own, self._recording = own, recording
