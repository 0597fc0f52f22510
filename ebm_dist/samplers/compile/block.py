"""Compiles several steps of a kernel into one function of chains, weights and noise.

torch traces the steps once into a graph without Python: the energy's forward, its gradient in the
position and the kernel's own arithmetic. Weights are inputs of the graph, so new weights need no
compilation. The noise comes from a `Tape`, and a seed then gives the chains of eager mode, to
rounding; or the graph draws it (`SeededNoise`), and a seed gives other chains of the same law.

Everything else that the energy reads becomes part of the graph. Attributes that are Python numbers
are assumed to be constant. A tensor that is neither a parameter nor a buffer is refused, so that
the graph never uses a stale value of it.
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
from ebm_dist.samplers.compile.hoist import hoist
from ebm_dist.samplers.compile.onednn import mkl_holds_back, products_by_onednn
from ebm_dist.samplers.compile.recorded_noise import CannotCompile, Tape, record, replay
from ebm_dist.samplers.compile.rewrite import DECOMPOSITIONS, scale_before_adding, share_sigmoids
from ebm_dist.samplers.compile.winograd import HOISTABLE
from ebm_dist.samplers.frozen import Autocast, module_of
from ebm_dist.samplers.kernel import Kernel, KernelState, as_float
from ebm_dist.samplers.stepper import Departing

MAX_STEPS = 20
"""Most steps in one block. With so many the cost of a call is negligible, and compilation time
grows with the number of steps."""

MAX_NODES = 1000
"""Most operations in one block; 20 steps of a small perceptron have about as many."""

DEEP_STEP = 150
"""A step with at least as many operations is compiled alone: it takes far longer than a call, and
compiling several would take minutes."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """Stands for a tensor in the skeleton that `flatten` returns; `number` is its index."""

    number: int


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors of `value` to `tensors`; returns its skeleton, which is hashable."""
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
    """The inverse of `flatten`, with other tensors."""
    if isinstance(skeleton, Leaf):
        return tensors[skeleton.number]
    if isinstance(skeleton, tuple):
        kind, parts = skeleton
        values = [rebuild(part, tensors) for part in parts]
        return tuple(values) if kind is tuple else kind(*values)
    return skeleton


def weights_of(energy: EnergyFn) -> list[Tensor]:
    """The parameters and buffers of `energy`, in a fixed order."""
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
    evaluate: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
    """Energies (B,) from a position and weights; for kernels whose last energy is not known."""
    prepare: Callable[..., Sequence[Tensor]] | None = None
    """Computes the hoisted inputs of the steps from the weights."""

    def prepared(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights and the hoisted inputs computed from them, for all calls of a round."""
        with torch.no_grad():
            return [*weights, *(self.prepare(*weights) if self.prepare is not None else ())]

    @property
    def num_fused(self) -> int:
        """Number of draws that the graph makes itself."""
        return self.noise.num_fused if isinstance(self.noise, SeededNoise) else 0

    def __call__(
        self, state: KernelState, weights: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Any, Tensor, Any]:
        """The state after the steps, the energies (num_steps, B), and the sums of the info.

        Args:
            weights: from `prepared`.
        """
        inputs: list[Tensor] = []
        flatten(state, inputs)
        count = len(inputs)
        inputs += weights
        inputs += self.noise.fill(generator)
        out = self.run(inputs)
        return rebuild(self.state, out[:count]), out[count], rebuild(self.info, out[count + 1 :])

    def energy_at(self, position: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
        """E (B,) at `position` (B, *event); None where the last state holds it.

        Args:
            weights: from `weights_of`, without hoisted inputs.
        """
        return None if self.evaluate is None else self.evaluate([position, *weights])[0]


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

    Runs the compiled steps once, compares them with the traced ones, and refuses a difference.

    Args:
        energy: its module is copied, so that another thread may keep using it.
        compile_graph: turns a graph into a function of a list of tensors.
        fused_noise: the graph draws its noise itself.
        capture: turns such a function into a single launch. Its second argument is the number
            of tensors, at the end of the list, that are the same memory at every call.

    Raises:
        CannotCompile: the steps cannot be traced, or the compiled ones give other numbers.
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

    evaluate = None
    if isinstance(kernel, Departing):
        evaluate = compiled(*_traced_energy(energy, state.position), 0)
    run = compiled(traced.graph, traced.inputs, traced.num_noise)
    return Block(
        num_steps, run, traced.noise, traced.state, traced.info, evaluate, prepare=traced.prepare
    )


def fitting(num_steps: int, most: int) -> int:
    """Block size for rounds of `num_steps`: at most `most`, with the fewest steps left over."""
    most = min(most, num_steps, MAX_STEPS)
    return max(range(max(1, most // 2), most + 1), key=lambda n: (-(num_steps % n), n))


@dataclass(frozen=True, slots=True)
class _Traced:
    """Steps as a graph, with example inputs."""

    graph: GraphModule
    inputs: list[Tensor]
    noise: Tape | SeededNoise
    num_noise: int  # number of inputs that are noise, after all others
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
        # Clones: the tracer merges inputs that share memory, as replicas do at the start.
        inputs = [t.detach().clone() for t in (*tensors, *weights_of(energy), *of_noise)]
        graph = _traced(steps, inputs)
        first, behind = num_state, num_state + num_weights
        prepare = hoist(graph, slice(first, behind), HOISTABLE)
        if prepare is not None:
            with torch.no_grad():
                inputs[behind:behind] = prepare(*inputs[first:behind])
        return cls(graph, inputs, noise, len(of_noise), skeleton, info_skeleton, prepare)


def _traced_energy(energy: EnergyFn, position: Tensor) -> tuple[GraphModule, list[Tensor]]:
    """`energy` without its gradient, as a graph of a position and weights, with example inputs."""
    module = module_of(energy)
    names = list(_named(module)) if module is not None else []

    def evaluate(x: Tensor, *weights: Tensor) -> list[Tensor]:
        held = dict(zip(names, weights))
        with _reparametrize_module(module or nn.Module(), held, tie_weights=True):
            return [as_float(energy(x))]

    inputs = [t.detach().clone() for t in (position, *weights_of(energy))]
    return _traced(evaluate, inputs), inputs


def _traced(function: Callable[..., list[Tensor]], inputs: list[Tensor]) -> GraphModule:
    """`function(*inputs)` as a graph, rewritten for the compiler."""
    try:
        # Not at the top: this import loads sympy, which most processes never need.
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    except CannotCompile:
        raise
    except Exception as error:
        # A tracer raises errors of many types, and all mean the same here.
        raise CannotCompile(f"torch cannot trace it: {first_line(error)}") from error
    _refuse_hidden_noise(graph)
    scale_before_adding(graph)
    share_sigmoids(graph)
    if mkl_holds_back():
        products_by_onednn(graph)
    return graph


def copied(energy: EnergyFn) -> EnergyFn:
    """`energy` with a copy of its module that needs no gradients."""
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
    """Refuse dropout and the like: their noise does not come from the generator of the round."""
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
    """Refuse a compiled graph whose results differ from the graph's by more than rounding."""
    with torch.no_grad():
        expected = in_torch(graph)(*[t.clone() for t in inputs])
        came = compiled([t.clone() for t in inputs])
    for e, c in zip(expected, came):
        off = (c - e).abs() > (0.1 if low else 1e-3) * (1 + e.abs())
        # A uniform number between two roundings of a probability decides differently. That
        # happens to one chain in thousands; a fault of the compiler shows in all of them.
        if off.sum() > (0.02 + 2 / num_chains) * off.numel():
            raise CannotCompile(
                f"the compiled steps differ from the traced ones by {(c - e).abs().max():.2g}"
            )


def first_line(error: BaseException) -> str:
    """The first line of the error's message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
