"""Decides whether the steps of a round run one by one or in compiled blocks.

Small energies are limited by the dispatch of single operations, not by arithmetic: a block of
steps compiled into one function is several times faster. An energy limited by arithmetic gains up
to a half from faster convolutions (`winograd`), and otherwise between nothing and a quarter. So
`auto` compiles once, where the rest of the run repays it, times both, and keeps the faster.

Compiled and eager steps agree to rounding, not bit for bit. So the result of a round depends on
whether its block was ready, and there are two kinds of engine:

- background: rounds run eagerly until the block is ready, which depends on the machine's load;
- steady, for runs that promise the same bits for any number of workers: the choice depends on the
  config and the shape of the round alone. `auto` then means eager, and `compiled` compiles before
  the first round of each shape. A compiler that fails or is missing is an error there, since
  another worker, or this one after a restart, might have one. Machines with different instruction
  sets compile to different bits; their eager matrix products differ too.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ebm_dist.core.types import EnergyFn
from ebm_dist.energies.context import Given
from ebm_dist.samplers.compile.block import (
    Block,
    build,
    cloned,
    copied,
    first_line,
    flatten,
    weights_of,
)
from ebm_dist.samplers.compile.capture import Captured
from ebm_dist.samplers.compile.compiler import (
    CompilerFailed,
    beside_rounds,
    compile_graph,
    prepare,
)
from ebm_dist.samplers.compile.recorded_noise import CannotCompile
from ebm_dist.samplers.compile.winograd import suits_processor
from ebm_dist.samplers.frozen import (
    Autocast,
    for_rows,
    has_convolutions,
    lasting,
    module_of,
    prepared_weights,
)
from ebm_dist.samplers.kernel import Kernel, KernelState, value_and_grad

Choice = Literal["auto", "eager", "compiled"]

SHORT_STEP_S = 3e-3
"""A longer eager step is limited by arithmetic. MLP 2-64-64-1, 2 AVX-512 cores: 0.16 ms
at 64 chains (5.4 times faster compiled), 1.4 ms at 4096 (1.9 times); convolutional networks of
2 to 80 ms: 1.4 to 1.9 times with Winograd's algorithm, 0.9 to 1.27 without."""

PAYBACK_S = 60.0
"""Seconds of eager steps at one shape that repay the compilation of short steps: it takes 8 to
30 s and makes later steps about twice as fast, or faster. While it is unknown how much is left,
`auto` compiles when as much is behind it: it then takes at most about twice the time of the better
choice."""

LONG_PAYBACK_S = 240.0
"""The same for long steps: 30 to 110 s of compilation on a busy machine, a quarter faster."""

DIRECT_PAYBACK_S = 600.0
"""The same for long steps with convolutions that Winograd's algorithm does not compute here: they
gain between nothing and a quarter. An eighth of 600 s is 75 s, about one compilation."""

FIRST_LOOK_S = 10.0
"""Seconds of eager steps at one shape after which what is left of a run is estimated. They count
from the first progress on: rounds before it wait for a learner that starts."""

TRIAL_ROUNDS = 5
"""Rounds of each kind whose fastest times are compared: other processes can only add time."""

WORTHWHILE = 0.97
"""Compiled blocks are kept if they take at most this share of the eager time."""

log = logging.getLogger("ebm_dist")


@dataclass(slots=True)
class _Entry:
    """What the engine knows about rounds of one shape."""

    energy: EnergyFn  # a reference, so that no other object gets its id
    status: Literal["eager", "compiling", "refused"] = "eager"
    block: Block | None = None
    compile_s: float = 0.0
    how: str = ""
    """End of the log line: how the block draws its noise."""
    eager_s: float = 0.0
    """Total time of all eager rounds so far; from the run's first progress on, of those after."""
    eager_rounds: int = 0
    """Their number."""
    eager_rounds_s: deque[float] = field(default_factory=lambda: deque(maxlen=TRIAL_ROUNDS))
    """Times of the last eager rounds before the compilation."""
    block_rounds_s: list[float] = field(default_factory=list)
    seen_progress: float | None = None
    """`Engine.progress` when this shape was first seen."""
    first_progress: float | None = None
    """The same after its first change."""


class Engine:
    """Compiles blocks of steps, caches them, and chooses between them and eager steps.

    A worker keeps one engine for all its rounds.

    Args:
        choice: eager, compiled, or auto, which compiles after enough sampling to repay it, and
            keeps the faster.
        background: compile in a thread while rounds run eagerly; else the round waits for it.
        steady: choose before the first round of each shape; see the module's docstring.
        fused_noise: blocks draw their noise inside the graph. None: on CUDA, unless the engine is
            steady; without it chains equal those of single steps to rounding.
        captured: blocks are replayed as CUDA graphs. None: on CUDA.
        say: receives one line for each choice, with the reason.
    """

    def __init__(
        self,
        choice: Choice = "auto",
        *,
        background: bool = True,
        steady: bool = False,
        fused_noise: bool | None = None,
        captured: bool | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.choice = choice
        self.compile_s = 0.0
        """Seconds spent on compilations so far."""
        self._background = background and not steady
        self._steady = steady
        self._fused_noise = fused_noise
        self._captured = captured
        self._say = say
        self._entries: dict[Any, _Entry] = {}
        self._layouts: dict[int, tuple[nn.Module, bool]] = {}
        self.progress: float | None = None
        """The share of the run that is done, in [0, 1], where the caller knows it."""
        self._declined = False
        if choice == "auto" and steady:
            say(
                "sampler.engine: auto is eager, since flow.mode: sync must not depend on when a "
                "compilation ends; compiled would compile before the first round"
            )

    def block(
        self, kernel: Kernel[Any], energy: EnergyFn, state: KernelState, num_steps: int
    ) -> Block | None:
        """The compiled block for rounds of `num_steps` steps from such states, if it is ready.

        Raises:
            CompilerFailed: the engine is steady and there is no working compiler.
        """
        if not self._may_compile:
            return None
        entry = self._entry(kernel, energy, state, num_steps)
        if self.choice == "compiled" and entry.status == "eager":
            self._compile(entry, kernel, energy, state, num_steps)
        return entry.block

    def took(
        self,
        seconds: float,
        kernel: Kernel[Any],
        energy: EnergyFn,
        state: KernelState,
        num_steps: int,
        *,
        in_blocks: bool,
    ) -> None:
        """Record that a round took `seconds`; `auto` may then start to compile, or decide."""
        if self.choice != "auto" or not self._may_compile:
            return
        entry = self._entry(kernel, energy, state, num_steps)
        if in_blocks:
            entry.block_rounds_s.append(seconds)
            if len(entry.block_rounds_s) == TRIAL_ROUNDS:
                self._decide(entry, num_steps)
            return
        if entry.first_progress is None and self.progress != entry.seen_progress:
            entry.first_progress, entry.eager_s, entry.eager_rounds = self.progress, 0.0, 0
        entry.eager_s += seconds
        entry.eager_rounds += 1
        if entry.status != "eager":
            return
        entry.eager_rounds_s.append(seconds)
        if self._repays(entry, energy, state, num_steps):
            self._compile(entry, kernel, energy, state, num_steps)

    def _repays(self, entry: _Entry, energy: EnergyFn, state: KernelState, num_steps: int) -> bool:
        """Whether what is left of the run, or what is behind it, repays a compilation."""
        payback_s, why = LONG_PAYBACK_S, ""
        if min(entry.eager_rounds_s) <= num_steps * SHORT_STEP_S:
            payback_s = PAYBACK_S
        elif _convolves_directly(energy, state):
            payback_s = DIRECT_PAYBACK_S
            why = ", since this processor gains little from compiled convolutions"
        if self.progress is None:
            return entry.eager_s >= payback_s
        first = entry.first_progress
        if first is None or self.progress <= first or entry.eager_s < FIRST_LOOK_S:
            return False
        rounds_left = entry.eager_rounds * (1 - self.progress) / (self.progress - first)
        # The median: the first rounds of a process are slower than those that follow.
        left_s = rounds_left * statistics.median(entry.eager_rounds_s)
        repays = left_s >= payback_s
        if repays or not self._declined:
            self._declined = True
            self._say(
                f"sampler.engine: auto {'compiles' if repays else 'stays eager'}, since about "
                f"{left_s:.0f} s of steps are left and a compilation repays itself in "
                f"{payback_s:.0f} s{why}"
            )
        return repays

    def _decide(self, entry: _Entry, num_steps: int) -> None:
        assert entry.block is not None
        eager, block = min(entry.eager_rounds_s), min(entry.block_rounds_s)
        times = (
            f"a step takes {1e3 * block / num_steps:.2f} ms in blocks of {entry.block.num_steps} "
            f"and {1e3 * eager / num_steps:.2f} ms alone"
        )
        if block > WORTHWHILE * eager:
            entry.block, entry.status = None, "refused"
            self._say(f"sampler.engine: auto stays eager, {times}")
        else:
            self._say(
                f"sampler.engine: auto runs compiled blocks, {times}; compiled in "
                f"{entry.compile_s:.1f} s{entry.how}"
            )

    def channels_last(self, energy: EnergyFn, position: Tensor) -> bool:
        """Whether to store images (B, C, H, W) channels-last although the config does not say so.

        True where the energy convolves them and works on that layout (a `.view` does not). It
        depends on the energy alone, so it is the same in every round of every worker.
        """
        module = module_of(lasting(energy))
        if self.choice == "eager" or position.ndim != 4 or module is None:
            return False
        known = self._layouts.get(id(module))
        if known is None:
            known = (module, has_convolutions(energy) and _takes_channels_last(energy, position))
            self._layouts[id(module)] = known
            if known[1]:
                self._say(
                    f"sampler.engine: {self.choice} holds images channels-last, since the energy "
                    "convolves them"
                )
        return known[1]

    @property
    def compiling(self) -> bool:
        """Whether blocks are being compiled, or wait for another process that compiles."""
        return any(e.status == "compiling" and e.block is None for e in self._entries.values())

    @property
    def _may_compile(self) -> bool:
        return self.choice == "compiled" or (self.choice == "auto" and not self._steady)

    def _entry(
        self, kernel: Kernel[Any], energy: EnergyFn, state: KernelState, num_steps: int
    ) -> _Entry:
        tensors: list[Tensor] = []
        skeleton = flatten(state, tensors)
        module = module_of(energy)
        key = (
            kernel,
            _identity(energy),
            module is not None and module.training,
            skeleton,
            tuple(
                (t.shape, t.stride(), t.dtype, t.device) for t in (*tensors, *weights_of(energy))
            ),
            # It determines the size of the block. If rounds of all lengths shared one block, a
            # round's result would depend on the lengths that this engine saw before.
            num_steps,
            torch.get_num_threads(),
        )
        return self._entries.setdefault(key, _Entry(energy, seen_progress=self.progress))

    def _compile(
        self,
        entry: _Entry,
        kernel: Kernel[Any],
        energy: EnergyFn,
        state: KernelState,
        num_steps: int,
    ) -> None:
        entry.status = "compiling"
        # Validates the start now, so that bad input is not reported as a compiler failure.
        kernel.init(state.position, energy)

        def work() -> None:
            started = time.perf_counter()
            try:
                built, entry.how = self._built(kernel, energy, state, num_steps)
            except Exception as error:
                entry.status = "refused"
                # Any exception: torch's internals change between versions, and memory can run out.
                if self._steady and not _no_machine_compiles(error):
                    raise
                self._say(f"sampler.engine: eager, because {first_line(error)}")
                return
            entry.compile_s = time.perf_counter() - started
            self.compile_s += entry.compile_s
            entry.block = built  # a single assignment, since rounds in other threads read it
            if self.choice == "compiled":
                self._say(
                    f"sampler.engine: compiled runs blocks of {built.num_steps} steps from now "
                    f"on, compiled in {entry.compile_s:.1f} s{entry.how}"
                )

        if not self._background:
            work()
            return
        prepare()

        def work_beside() -> None:
            with beside_rounds():
                work()

        # Copies for the thread: the current round goes on and changes the originals.
        energy, state = copied(energy), cloned(state)
        # No daemon: the interpreter would shut down while the compiler still runs.
        threading.Thread(target=work_beside, name="compile", daemon=False).start()

    def _built(
        self, kernel: Kernel[Any], energy: EnergyFn, state: KernelState, num_steps: int
    ) -> tuple[Block, str]:
        """The block, and the end of its log line."""
        on_cuda = state.energy.device.type == "cuda"
        captured = on_cuda if self._captured is None else self._captured
        capture = partial(Captured, say=self._say) if captured else None
        build_ = partial(build, kernel, energy, state, num_steps, compile_graph, capture=capture)
        fused = self._fused_noise
        if not (on_cuda and not self._steady if fused is None else fused):
            return build_(), ""
        try:
            built = build_(fused_noise=True)
            return built, ", including the noise" if built.num_fused else ""
        except CannotCompile as error:
            # The steps may compile correctly and only the fused noise be wrong.
            return build_(), f", with noise drawn beforehand, since fused noise failed: {error}"


def _no_machine_compiles(error: Exception) -> bool:
    """Whether the steps themselves are the fault, so that no other machine compiles them either."""
    return isinstance(error, CannotCompile) and not isinstance(error, CompilerFailed)


def _convolves_directly(energy: EnergyFn, state: KernelState) -> bool:
    """Whether the CPU computes convolutions of `energy` without Winograd's algorithm."""
    dtype = torch.bfloat16 if isinstance(energy, Autocast) else torch.float32
    return (
        state.energy.device.type == "cpu"
        and has_convolutions(energy)
        and not suits_processor(dtype)
    )


def _identity(energy: EnergyFn) -> Any:
    """A key that is equal for two wrappers, two contexts or two bound methods of one module."""
    if isinstance(energy, Autocast):
        return ("bf16", _identity(energy.energy))
    if isinstance(energy, Given):
        # Its shapes are in the key as well: the tensors are among its buffers.
        return (*energy.names, _identity(energy.energy))
    owner = getattr(energy, "__self__", None)
    return (id(owner), energy.__func__) if isinstance(owner, nn.Module) else id(energy)  # type: ignore[attr-defined]


def _takes_channels_last(energy: EnergyFn, position: Tensor) -> bool:
    probe = position[:2].contiguous(memory_format=torch.channels_last)
    try:
        # Weights are channels-last as well: images of one channel take their layout from them.
        with prepared_weights(energy, bf16=False, channels_last=True):
            value_and_grad(for_rows(energy, lambda rows: rows[:2]), probe)
    except RuntimeError:
        return False
    return True
