"""What every objective shares: the family, the base module, the base section, its checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ebm_dist.core.events import energy_at
from ebm_dist.core.section import Family, Section
from ebm_dist.core.types import Batch, EnergyFn, EventKind, EventSpec, LevelNoise, Negatives
from ebm_dist.objectives.weighting import ess_ratio, normalised_weights, staleness_log_weight

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """`objective(energy, batch, negatives, generator) -> (loss, metrics)`.

    The loss is the scalar to minimise. Metrics are detached 0-d tensors on the device of
    the data, named as in `metrics/names.py`; nothing here waits for that device. Whatever an
    objective trains beside the energy (a critic, log Z) is among its parameters.

    Every gradient in x that the loss needs is taken inside `forward`. A training engine
    that wraps the module (DeepSpeed) rescales gradients in its own hooks, so a gradient
    taken through the engine from outside is wrong, without an error.
    """

    needs_negatives: bool = False
    """Whether `forward` reads chains of the model; the trainer runs no sampler otherwise."""

    needs_labels: bool = False
    """Whether `forward` reads `batch.label`."""

    needs_generator: bool = False
    """Whether the loss draws noise; only then does the trainer pass a generator."""

    estimates_log_z: bool = False
    """Whether the metrics hold `likelihood/log_z`, learnt beside the energy; the evaluator then
    makes no estimate of its own."""

    reweight: bool = False
    """Set by the trainer under `flow.stale: reweight`: negatives that were moved under older
    weights get importance weights."""

    gather_ranks: Callable[[Tensor], Tensor] | None = None
    """Set by the trainer when it has several learner ranks: maps (k,) to (num_ranks, k), the
    vectors of all ranks. Without it self-normalised weights are those of the rank's own batch."""

    step: int | None = None
    """The update that comes next, counted from 0; None until `begin_update` is called."""

    def begin_update(self, step: int) -> None:
        """Tell an objective with a schedule which update the next `forward` belongs to."""
        self.step = step

    def forward(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch | Tensor,
        negatives: Negatives | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics.

        Args:
            energy: (B, *event) -> (B,), lower is likelier.
            batch: data, x of shape (B, *event); a bare tensor is data without labels.
            negatives: events of the model (M, *event); a bare tensor is fresh chains that
                count equally. Required where `needs_negatives`, not read elsewhere.
            generator: source of all noise; required where `needs_generator`.

        Raises:
            ValueError: an input is missing or has the wrong shape or dtype.
        """
        batch = as_batch(batch)
        if self.needs_negatives and negatives is None:
            raise ValueError(
                f"negatives: {self.name} contrasts data with events of the model, got None; pass "
                "a Negatives or a tensor (M, *event) from a sampler"
            )
        if self.needs_labels and batch.label is None:
            raise ValueError(
                f"batch.label: {self.name} needs labels (B,), got None; use labelled data or "
                "objective.name: contrastive"
            )
        if self.reweight and isinstance(negatives, Tensor):
            raise ValueError(
                "negatives: reweighting reads the energies that the worker recorded, got a bare "
                "tensor; pass a Negatives, or leave the objective's reweight False"
            )
        if self.needs_generator and generator is None:
            raise ValueError(
                f"generator: {self.name} draws noise and takes it from nowhere else; pass a "
                "torch.Generator"
            )
        read = None if negatives is None else as_negatives(negatives, batch)
        return self.loss(energy, batch, read, generator)

    def negative_weight(
        self,
        negatives: Negatives,
        energy_now: Tensor,
        *,
        temperature: float,
        truncation: float | Literal["inf"] | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Normalised weights (M,) of the negatives, detached, and metrics about them.

        Proportional to exp(negatives.log_weight), times the staleness weight of each where
        `reweight` is set.
        """
        log_weight = negatives.log_weight.to(energy_now.dtype)
        metrics: Metrics = {}
        if self.reweight:
            log_weight = log_weight + staleness_log_weight(
                energy_now, negatives.energy, temperature, truncation, self.gather_ranks
            )
            metrics["flow/ess_ratio"] = ess_ratio(log_weight, self.gather_ranks)
        return normalised_weights(log_weight, self.gather_ranks), metrics

    def loss(
        self,
        energy: nn.Module | EnergyFn,
        batch: Batch,
        negatives: Negatives | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Metrics]:
        """The objective itself, on inputs that `forward` has checked."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return f"objective {type(self).__name__}"


class ObjectiveSection(Section):
    """The config of one objective: `build` makes the module, `bind` fits it to the data."""

    kinds: ClassVar[tuple[EventKind, ...]] = get_args(EventKind)
    """Events that the objective is defined for."""

    example: ClassVar[dict[str, Any]] = {}
    """Small parameters that build without data; the protocol tests use them."""

    far_modes: ClassVar[str]
    """Whether the loss depends on how the data's mass is shared among modes that are far apart:
    "seen ..." or "not seen ...", for the model card and docs/objectives.md."""

    @property
    def contexts(self) -> frozenset[str]:
        """What it gives the energy beside x, of the data's own or of `buffer.context`."""
        return frozenset()

    @property
    def pair_noise(self) -> tuple[LevelNoise, LevelNoise] | None:
        """Noise by level: it makes the pair of a chain of a datum, and the noisy pair of the pair.
        None where pairs are data."""
        return None

    def chain_energy(self, energy: nn.Module) -> nn.Module:
        """The energy that chains move under, made of the learned one, which it shares.

        Raises:
            ValueError: the learned energy does not fit the objective.
        """
        return energy

    reweights: ClassVar[bool] = True
    """Whether negatives count by their weights, staleness and Jarzynski ones alike."""

    temperature: PositiveFloat | None = None
    """T of the fitted law exp(-E/T)/Z, which negatives are drawn from. A run fills in the sampler's
    temperature and refuses any other; 1 where there is no sampler."""

    @property
    def fitted_temperature(self) -> float:
        """T as a number."""
        return 1.0 if self.temperature is None else self.temperature

    def at_temperature(self, temperature: float) -> Self:
        """This section with that temperature, unless it has one already."""
        if self.temperature is not None or temperature == 0:
            return self
        return self.model_copy(update={"temperature": temperature})

    def reads_temperature(self, *, reweights: bool) -> bool:
        """Whether the loss depends on T; `reweights`: stale negatives get importance weights."""
        return True

    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Keys that may change when a run is resumed: they regularise training, and neither the fitted
    law nor the meaning of any learnt parameter depends on them."""

    @property
    def takes_negatives(self) -> bool:
        """Whether the loss reads chains of the model; told without importing anything."""
        return self.build().needs_negatives

    def build(self, seed: int = 0) -> Objective:
        """The module on the CPU; the same seed gives the same weights anywhere.

        torch's global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return self.module()

    def module(self) -> Objective:
        """Construct the module under a seeded generator; `build` calls it."""
        raise NotImplementedError

    def bind(self, spec: EventSpec) -> Self:
        """This section, completed with what it leaves to the data.

        Raises:
            ValueError: the objective cannot take the data's events.
        """
        if spec.kind not in self.kinds:
            raise ValueError(
                f"objective.name: {type(self).model_fields['name'].default} takes "
                f"{' or '.join(self.kinds)} events, the data is {spec.kind}; choose an objective "
                f"for {spec.kind} data, or convert the data"
            )
        return self


FAMILY: Family[Objective] = Family("objective")


def as_batch(batch: Batch | Tensor) -> Batch:
    """`batch` as a Batch; refuses a batch that no objective can read."""
    if isinstance(batch, Tensor):
        batch = Batch(batch)
    _check_events("batch.x", batch.x)
    if batch.label is not None and tuple(batch.label.shape) != tuple(batch.x.shape[:1]):
        raise ValueError(
            f"batch.label: shape {tuple(batch.label.shape)}, expected ({batch.x.shape[0]},), one "
            "for each event of batch.x"
        )
    return batch


def as_negatives(negatives: Negatives | Tensor, batch: Batch) -> Negatives:
    """`negatives` as Negatives without gradient; bare tensors count equally and are not stale."""
    if isinstance(negatives, Tensor):
        x = negatives.detach()
        # NaN, since no worker recorded an energy: a loss that reads one becomes NaN.
        negatives = Negatives(
            x=x,
            energy=x.new_full(x.shape[:1], float("nan"), dtype=torch.float32),
            version=x.new_full(x.shape[:1], -1, dtype=torch.int64),
            log_weight=x.new_zeros(x.shape[:1], dtype=torch.float32),
        )
    _check_events("negatives.x", negatives.x)
    if negatives.x.shape[1:] != batch.x.shape[1:]:
        raise ValueError(
            f"negatives.x: events of shape {tuple(negatives.x.shape[1:])}, the data has "
            f"{tuple(batch.x.shape[1:])}; chains and data must come from one data section"
        )
    if negatives.log_weight.shape != negatives.x.shape[:1]:
        raise ValueError(
            f"negatives.log_weight: shape {tuple(negatives.log_weight.shape)}, expected "
            f"({negatives.x.shape[0]},), one for each event of negatives.x"
        )
    return Negatives(
        negatives.x.detach(),
        negatives.energy.detach(),
        negatives.version,
        negatives.log_weight.detach(),
        negatives.context,
    )


def joined_context(
    batch: Batch | None, negatives: Negatives, num_points: int = 0
) -> dict[str, Tensor]:
    """What an energy is given with data, negatives and points beside the first data, joined in
    this order; empty where the negatives carry nothing that an energy takes.

    Raises:
        ValueError: the negatives carry a context that the data lacks.
    """
    joined: dict[str, Tensor] = {}
    for name in ("label", "condition"):
        if (of_negatives := negatives.context.get(name)) is None:
            continue
        of_data = of_negatives[:0]
        if batch is not None:
            of_data = getattr(batch, name)
            if of_data is None:
                raise ValueError(
                    f"batch.{name}: the negatives carry a {name}, the data has none; use data "
                    f"with a {name}, or leave buffer.context.{name} out"
                )
        joined[name] = torch.cat([of_data, of_negatives, of_data[:num_points]])
    return joined


def _check_events(argument: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{argument}: {x.dtype}, expected floating point: pass x.float()")
    if x.ndim < 1 or x.shape[0] == 0:
        raise ValueError(
            f"{argument}: shape {tuple(x.shape)} holds no event, expected (B, *event) with B > 0"
        )


def energies_of(energy: nn.Module | EnergyFn, x: Tensor) -> Tensor:
    """E(x) as (B,), at least float32.

    Raises:
        ValueError: the energy returned another shape. (B, 1) would broadcast against (B,) to
            (B, B) later, and the loss would be a wrong number without an error.
    """
    out = energy_at(energy, x)
    if out.shape != x.shape[:1]:
        hint = "; return out.squeeze(1)" if out.shape == (x.shape[0], 1) else ""
        raise ValueError(
            f"energy: returned shape {tuple(out.shape)} for x of shape {tuple(x.shape)}, expected "
            f"({x.shape[0]},), one number for each event{hint}"
        )
    return out if out.dtype == torch.float64 else out.float()


def energy_and_grad(
    energy: nn.Module | EnergyFn, x: Tensor, *, create_graph: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf x, E(x) (B,) and dE/dx (B, *event).

    With `create_graph` the gradient can be differentiated in the parameters and in the leaf.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        values = energies_of(energy, leaf)
        # Events do not interact, so the gradient of the sum holds each one's own.
        grad = input_grad(values, leaf, create_graph=create_graph)
    return leaf, values, grad


def input_grad(values: Tensor, leaf: Tensor, *, create_graph: bool = True) -> Tensor:
    """d(sum of values)/d(leaf); zeros where the values do not depend on the leaf."""
    if not values.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(
        values.sum(), leaf, create_graph=create_graph, materialize_grads=True
    )
    return grad


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise in the shape of x, drawn on the generator's device."""
    generator = given(generator)
    noise = torch.empty(x.shape, dtype=x.dtype, device=generator.device)
    return noise.normal_(generator=generator).to(x.device)


def uniform(shape: tuple[int, ...] | torch.Size, x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise on [0, 1) with the dtype and device of x."""
    noise = torch.empty(tuple(shape), dtype=x.dtype, device=generator.device)
    return noise.uniform_(generator=generator).to(x.device)


def integers(
    high: int, shape: tuple[int, ...] | torch.Size, x: Tensor, generator: torch.Generator
) -> Tensor:
    """Uniform int64 on [0, high) on the device of x."""
    draw = torch.randint(0, high, tuple(shape), generator=generator, device=generator.device)
    return draw.to(x.device)


def given(generator: torch.Generator | None) -> torch.Generator:
    """The generator that `forward` has checked."""
    if generator is None:
        raise ValueError("generator: this setting draws noise; pass a torch.Generator")
    return generator
