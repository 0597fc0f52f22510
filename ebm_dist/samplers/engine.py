"""How a round's steps are run: one by one, or in compiled blocks, and who decides it when.

Small energies are bound by the dispatch of single operations, not by arithmetic: there a block
of steps compiled into one function is several times faster. An energy bound by its arithmetic,
as convolutions are, gains nothing from that and stays eager.

Compiled and eager steps agree to rounding and not bit for bit. So what a round returns depends
on whether its block was ready, and there are two kinds of engine:

- in the background: rounds go on eagerly until the block is there. Which round is the first
  compiled one depends on the machine's load;
- steady, for runs that promise the same bits however they are spread: what runs is a function
  of the config and of the round's shape alone. `auto` is then eager, and `compiled` compiles
  before the first round of each shape. A compiler that fails or is missing is an error there,
  since another worker, or this one after a restart, might have one. Machines with different
  instruction sets compile to different bits, as their eager matrix products differ too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ebm_dist.samplers.block import Block, build, cloned, copied, flatten, weights_of
from ebm_dist.samplers.capture import Captured
from ebm_dist.samplers.compiler import CompilerFailed, compile_graph
from ebm_dist.samplers.kernel import Kernel, KernelState, value_and_grad
from ebm_dist.samplers.standing import Autocast, has_convolutions, module_of, standing
from ebm_dist.samplers.tape import CannotCompile
from ebm_dist.types import EnergyFn

Choice = Literal["auto", "eager", "compiled"]

PAYBACK_S = 60.0
"""Seconds of eager sampling at one shape before `auto` compiles. A compilation takes 8 to 30 s
and about halves what follows at the least, so a run pays at most about as much again as it would
have, knowing its own length; one that is over within a minute pays nothing."""

SHORT_STEP_S = 3e-3
"""An eager step that takes longer is bound by arithmetic. MLP 2-64-64-1, 2 AVX-512 cores: 0.16 ms
at 64 chains (5.4 times faster compiled), 1.4 ms at 4096 (1.9 times); convolutional networks of
10 to 150 ms: 0.9 to 1.2 times."""

log = logging.getLogger("ebm_dist")


@dataclass(slots=True)
class _Entry:
    """One shape of round: what is known of it."""

    energy: EnergyFn  # held, so that its id stays its own
    status: Literal["eager", "compiling", "refused"] = "eager"
    block: Block | None = None
    eager_s: float = 0.0


class Engine:
    """Runs the rounds of one place: a worker keeps one, and with it what was compiled.

    Args:
        choice: eager, compiled, or auto, which compiles where `SHORT_STEP_S` and `PAYBACK_S`
            say that it pays.
        background: compile while rounds go on eagerly; else the round that asks for it waits.
        steady: decide before the first round of each shape; see the module's docstring.
        fused_noise: blocks draw their noise themselves; None: on CUDA, unless the engine is steady,
            whose chains then are those of single steps to rounding.
        captured: blocks are replayed as CUDA graphs; None: on CUDA.
        say: is told, in one line each, what was chosen and why.
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
        if choice == "auto" and steady:
            say(
                "sampler.engine: auto is eager, since flow.mode: sync must not depend on when a "
                "compilation ends; compiled would compile before the first round"
            )

    def block(
        self, kernel: Kernel[Any], energy: EnergyFn, state: KernelState, num_steps: int
    ) -> Block | None:
        """What runs rounds of `num_steps` steps from states like this one, if it is compiled.

        Raises:
            CompilerFailed: of a steady engine, where there is no working compiler.
        """
        if not self._may_compile:
            return None
        entry = self._entry(kernel, energy, state, num_steps)
        if self.choice == "compiled" and entry.status == "eager":
            self._compile(entry, kernel, energy, state, num_steps, "as asked")
        return entry.block

    def took(
        self,
        seconds: float,
        kernel: Kernel[Any],
        energy: EnergyFn,
        state: KernelState,
        num_steps: int,
    ) -> None:
        """A round of single steps took `seconds`: `auto` may now want to compile."""
        if self.choice != "auto" or not self._may_compile:
            return
        entry = self._entry(kernel, energy, state, num_steps)
        entry.eager_s += seconds
        if entry.status != "eager" or entry.eager_s < PAYBACK_S:
            return
        step_ms = 1e3 * seconds / num_steps
        if step_ms > 1e3 * SHORT_STEP_S:
            entry.status = "refused"
            self._say(
                f"sampler.engine: auto stays eager, a step takes {step_ms:.1f} ms, which is "
                "arithmetic and not dispatch"
            )
            return
        why = f"an eager step takes {step_ms:.2f} ms, most of it dispatch"
        self._compile(entry, kernel, energy, state, num_steps, why)

    def channels_last(self, energy: EnergyFn, position: Tensor) -> bool:
        """Whether these images (B, C, H, W) are held channels-last without being told to.

        Known from the energy alone, so it is the same in every round of every worker: where
        it convolves, and does not ask for the row-major layout by `.view`.
        """
        module = module_of(energy)
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
            # The size of the blocks follows from it. Were one block used for rounds of every
            # length, a round would depend on the lengths that this engine saw before.
            num_steps,
            torch.get_num_threads(),
        )
        return self._entries.setdefault(key, _Entry(energy))

    def _compile(
        self,
        entry: _Entry,
        kernel: Kernel[Any],
        energy: EnergyFn,
        state: KernelState,
        num_steps: int,
        why: str,
    ) -> None:
        entry.status = "compiling"

        def work() -> None:
            started = time.perf_counter()
            try:
                built, how = self._built(kernel, energy, state, num_steps)
            except CannotCompile as error:
                entry.status = "refused"
                if self._steady and isinstance(error, CompilerFailed):
                    raise
                self._say(f"sampler.engine: eager, because {error}")
                return
            seconds = time.perf_counter() - started
            self.compile_s += seconds
            entry.block = built  # one assignment: the rounds that go on meanwhile see all or none
            self._say(
                f"sampler.engine: {self.choice} runs blocks of {built.num_steps} steps from now "
                f"on, compiled in {seconds:.1f} s{how}: {why}"
            )

        if not self._background:
            work()
            return
        # What the thread reads must not move under it, and this round goes on.
        energy, state = copied(energy), cloned(state)
        # No daemon: the interpreter would tear itself down around a running compiler.
        threading.Thread(target=work, name="compile", daemon=False).start()

    def _built(
        self, kernel: Kernel[Any], energy: EnergyFn, state: KernelState, num_steps: int
    ) -> tuple[Block, str]:
        """A block, and what is to be said of how it runs."""
        on_cuda = state.energy.device.type == "cuda"
        captured = on_cuda if self._captured is None else self._captured
        capture = partial(Captured, say=self._say) if captured else None
        build_ = partial(build, kernel, energy, state, num_steps, compile_graph, capture=capture)
        fused = self._fused_noise
        if not (on_cuda and not self._steady if fused is None else fused):
            return build_(), ""
        try:
            built = build_(fused_noise=True)
            return built, ", noise and all" if built.num_fused else ""
        except CannotCompile as error:
            # The steps may be sound, and the compiler's noise alone be another than ours.
            return build_(), f", their noise drawn beforehand since, fused, {error}"


def _identity(energy: EnergyFn) -> Any:
    """The same for two wrappers, or two bound methods, of one module."""
    if isinstance(energy, Autocast):
        return ("bf16", _identity(energy.energy))
    owner = getattr(energy, "__self__", None)
    return (id(owner), energy.__func__) if isinstance(owner, nn.Module) else id(energy)  # type: ignore[attr-defined]


def _takes_channels_last(energy: EnergyFn, position: Tensor) -> bool:
    probe = position[:2].contiguous(memory_format=torch.channels_last)
    try:
        # With the weights laid out too: images of one channel take their layout from those.
        with standing(energy, bf16=False, channels_last=True):
            value_and_grad(energy, probe)
    except RuntimeError:
        return False
    return True
