"""Several steps of a kernel as one compiled function of chains, weights and noise.

The steps are traced once, by torch, into one graph without Python: the energy's forward, its
gradient in the position and the kernel's own arithmetic. Weights are inputs of that graph, so
new ones never trigger a compilation. Its noise comes from a `Tape`, so a seed gives the chains
that it gives in eager mode, to rounding; or the graph draws it, as `SeededNoise`, and a seed gives
other chains of the same law.

Whatever else an energy reads is part of the graph from then on: attributes that are Python
numbers are taken to stay as they were, and a tensor that is neither a parameter nor a buffer
makes the steps impossible to compile rather than stale.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.stateless import _reparametrize_module

from ebm_dist.core.types import EnergyFn
from ebm_dist.samplers.compile.fused_noise import SeededNoise, in_torch
from ebm_dist.samplers.compile.hoist import take_out
from ebm_dist.samplers.compile.onednn import mkl_holds_back, products_by_onednn
from ebm_dist.samplers.compile.recorded_noise import CannotCompile, Tape, record, replay
from ebm_dist.samplers.compile.rewrite import DECOMPOSITIONS, scale_before_adding, share_sigmoids
from ebm_dist.samplers.compile.winograd import ONCE_A_ROUND
from ebm_dist.samplers.frozen import Autocast, module_of
from ebm_dist.samplers.kernel import Kernel, KernelState, as_float
from ebm_dist.samplers.stepper import Departing

MAX_STEPS = 20
"""Steps of one block. The price of a call is gone by then, and the time that a compilation takes
grows with the number."""

MAX_NODES = 1000
"""Operations of one block: 20 steps of a small perceptron."""

DEEP_STEP = 150
"""Operations of a step that is compiled alone: it takes long enough for the price of one call,
and the compilation of several would take minutes."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor's place in what `flatten` took apart."""

    number: int


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with its tensors appended to `tensors` and their places in their stead; hashable."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Leaf(len(tensors) - 1)
    if is_dataclass(value) and not isinstance(value, type):
        parts = tuple(flatten(getattr(value, f.name), tensors) for f in fields(value))
        return (type(value), parts)
    if isinstance(value, tuple):
        return (tuple, tuple(flatten(part, tensors) for part in value))
    return value


def rebuild(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """What `flatten` took apart, with other tensors."""
    if isinstance(skeleton, Leaf):
        return tensors[skeleton.number]
    if isinstance(skeleton, tuple):
        kind, parts = skeleton
        values = [rebuild(part, tensors) for part in parts]
        return tuple(values) if kind is tuple else kind(*values)
    return skeleton


def weights_of(energy: EnergyFn) -> list[Tensor]:
    """Parameters and buffers that `energy` reads, in one order."""
    module = module_of(energy)
    return [t.detach() for t in _named(module).values()] if module is not None else []


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@dataclass(frozen=True, slots=True)
class Block:
    """`num_steps` steps of one kernel, compiled for one shape."""

    num_steps: int
    run: Callable[[list[Tensor]], Sequence[Tensor]]
    noise: Tape | SeededNoise
    state: Any  # the skeleton of the kernel's state
    info: Any  # the skeleton of its info
    look: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
    """Energies (B,) from a position and weights, of a kernel whose steps leave the last unknown."""
    prepare: Callable[..., Sequence[Tensor]] | None = None
    """What steps read beside the weights, made of them."""

    def prepared(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What a round's calls are given for these weights."""
        with torch.no_grad():
            return [*weights, *(self.prepare(*weights) if self.prepare is not None else ())]

    @property
    def num_fused(self) -> int:
        """Draws that it makes itself, of all its noise."""
        return self.noise.num_fused if isinstance(self.noise, SeededNoise) else 0

    def __call__(
        self, state: KernelState, weights: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Any, Tensor, Any]:
        """The state after the steps, the energies (num_steps, B), and the sums of the info.

        Args:
            weights: as `prepared`.
        """
        inputs: list[Tensor] = []
        flatten(state, inputs)
        count = len(inputs)
        inputs += weights
        inputs += self.noise.fill(generator)
        out = self.run(inputs)
        return rebuild(self.state, out[:count]), out[count], rebuild(self.info, out[count + 1 :])

    def energy_at(self, position: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
        """E (B,) at `position` (B, *event), of bare weights; None where the last state knows it."""
        return None if self.look is None else self.look([position, *weights])[0]


def build(
    kernel: Kernel[Any],
    energy: EnergyFn,
    state: KernelState,
    num_steps: int,
    compile_graph: Callable[[GraphModule, list[Tensor]], Callable[[list[Tensor]], Any]],
    *,
    fused_noise: bool = False,
    capture: Callable[[Callable[[list[Tensor]], Any], int], Callable[[list[Tensor]], Any]]
    | None = None,
) -> Block:
    """Trace and compile at most `num_steps` steps of `kernel` from `state`.

    The compiled steps are run once beside the traced ones, and refused if they differ.

    Args:
        energy: of a module it is copied, so that another thread may go on using it.
        compile_graph: makes a function of a list of tensors out of a graph.
        fused_noise: the block draws its noise itself.
        capture: makes one launch out of such a function; its second argument says how many of
            the tensors, the last ones, are the same memory at every call.

    Raises:
        CannotCompile: the steps have no such form, or the compiler made others out of them.
    """
    energy = copied(energy)
    state = cloned(state)
    one = _Traced.of(kernel, energy, state, 1)
    size = max(1, len(one.graph.graph.nodes) - len(one.inputs))
    num_steps = fitting(num_steps, MAX_NODES // size if size < DEEP_STEP else 1)
    traced = one
    if num_steps > 1 or fused_noise:
        traced = _Traced.of(kernel, energy, state, num_steps, fused_noise=fused_noise)
    low = isinstance(energy, Autocast)

    def compiled(graph: GraphModule, inputs: list[Tensor], num_held: int) -> Callable[..., Any]:
        run = compile_graph(graph, inputs)
        _check(graph, inputs, run, state.energy.shape[0], low=low)
        return run if capture is None else capture(run, num_held)

    look = None
    if isinstance(kernel, Departing):
        look = compiled(*_traced_energy(energy, state.position), 0)
    run = compiled(traced.graph, traced.inputs, traced.num_noise)
    return Block(
        num_steps, run, traced.noise, traced.state, traced.info, look, prepare=traced.prepare
    )


def fitting(num_steps: int, most: int) -> int:
    """The size of blocks for rounds of `num_steps`: at most `most`, with the least left over."""
    most = min(most, num_steps, MAX_STEPS)
    return max(range(max(1, most // 2), most + 1), key=lambda n: (-(num_steps % n), n))


@dataclass(frozen=True, slots=True)
class _Traced:
    """Steps as a graph, with inputs to try it on."""

    graph: GraphModule
    inputs: list[Tensor]
    noise: Tape | SeededNoise
    num_noise: int  # inputs that are the noise's, after all others
    state: Any
    info: Any
    prepare: GraphModule | None

    @classmethod
    def of(
        cls,
        kernel: Kernel[Any],
        energy: EnergyFn,
        state: Any,
        num_steps: int,
        *,
        fused_noise: bool = False,
    ) -> _Traced:
        generator = torch.Generator(state.energy.device).manual_seed(0)
        tensors: list[Tensor] = []
        skeleton = flatten(state, tensors)
        with record(generator) as draws:
            last, info = state, None
            for _ in range(num_steps):
                last, info = kernel.step(last, energy, generator)
        after: list[Tensor] = []
        if flatten(last, after) != skeleton:
            raise CannotCompile("its state counts the moves outside of tensors")
        of_info: list[Tensor] = []
        info_skeleton = flatten(info, of_info)

        module = module_of(energy)
        names = list(_named(module)) if module is not None else []
        num_state, num_weights = len(tensors), len(names)
        noise = (SeededNoise if fused_noise else Tape)(draws, state.energy.device)

        def steps(*flat: Tensor) -> list[Tensor]:
            moved = rebuild(skeleton, flat[:num_state])
            weights = dict(zip(names, flat[num_state : num_state + num_weights]))
            energies, sums = [], None
            with (
                _reparametrize_module(module or nn.Module(), weights, tie_weights=True),
                replay(generator, draws, noise.numbers(flat[num_state + num_weights :])),
            ):
                for _ in range(num_steps):
                    moved, told = kernel.step(moved, energy, generator)
                    energies.append(moved.energy)
                    parts: list[Tensor] = []
                    flatten(told, parts)
                    sums = parts if sums is None else [a + b for a, b in zip(sums, parts)]
            out: list[Tensor] = []
            flatten(moved, out)
            return [*out, torch.stack(energies), *(sums or [])]

        of_noise = noise.fill(generator)
        # Clones: inputs that share memory, as replicas at the start do, would be made one.
        inputs = [t.detach().clone() for t in (*tensors, *weights_of(energy), *of_noise)]
        graph = _traced(steps, inputs)
        first, behind = num_state, num_state + num_weights
        prepare = take_out(graph, slice(first, behind), ONCE_A_ROUND)
        if prepare is not None:
            with torch.no_grad():
                inputs[behind:behind] = prepare(*inputs[first:behind])
        return cls(graph, inputs, noise, len(of_noise), skeleton, info_skeleton, prepare)


def _traced_energy(energy: EnergyFn, position: Tensor) -> tuple[GraphModule, list[Tensor]]:
    """`energy` without a gradient as a graph of a position and weights, and inputs for it."""
    module = module_of(energy)
    names = list(_named(module)) if module is not None else []

    def look(x: Tensor, *weights: Tensor) -> list[Tensor]:
        held = dict(zip(names, weights))
        with _reparametrize_module(module or nn.Module(), held, tie_weights=True):
            return [as_float(energy(x))]

    inputs = [t.detach().clone() for t in (position, *weights_of(energy))]
    return _traced(look, inputs), inputs


def _traced(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
    """`function(*inputs)` as a graph, rewritten for the compiler."""
    try:
        # Not at the top: it loads a computer algebra system, which most processes never need.
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    except CannotCompile:
        raise
    except Exception as error:
        # The errors of a tracer are of many kinds, and all say the same thing here.
        raise CannotCompile(f"torch cannot trace it: {first_line(error)}") from error
    _refuse_hidden_noise(graph)
    scale_before_adding(graph)
    share_sigmoids(graph)
    if mkl_holds_back():
        products_by_onednn(graph)
    return graph


def copied(energy: EnergyFn) -> EnergyFn:
    """`energy` with a module of its own, in evaluation as it was."""
    if isinstance(energy, Autocast):
        return Autocast(copied(energy.energy))
    module = module_of(energy)
    if module is None:
        return energy
    own = copy.deepcopy(module).requires_grad_(False)
    if energy is module:
        return cast(EnergyFn, own)
    return types.MethodType(cast(Any, energy).__func__, own)


def cloned(state: Any) -> Any:
    tensors: list[Tensor] = []
    skeleton = flatten(state, tensors)
    return rebuild(skeleton, [t.detach().clone() for t in tensors])


def _refuse_hidden_noise(graph: GraphModule) -> None:
    """Dropout, say: its numbers would not come from the generator of the round."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CannotCompile(f"it draws noise of its own ({node.target})")


def _check(
    graph: GraphModule,
    inputs: list[Tensor],
    compiled: Callable[[list[Tensor]], Any],
    num_chains: int,
    *,
    low: bool,
) -> None:
    """Refuse a compiled graph whose numbers are not those of the graph itself, to rounding."""
    with torch.no_grad():
        expected = in_torch(graph)(*[t.clone() for t in inputs])
        came = compiled([t.clone() for t in inputs])
    for e, c in zip(expected, came):
        off = (c - e).abs() > (0.1 if low else 1e-3) * (1 + e.abs())
        # A uniform number that falls between two roundings of one probability decides
        # another way; that is one chain in thousands, a fault of the compiler is all of them.
        if off.sum() > (0.02 + 2 / num_chains) * off.numel():
            raise CannotCompile(
                f"the compiled steps differ from the traced ones by {(c - e).abs().max():.2g}"
            )


def first_line(error: BaseException) -> str:
    """What `error` says, on one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
