"""The MCMC worker. It is stateless, so that any worker can repeat the round of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ebm_dist.buffer.codec import Codec, StorageName
from ebm_dist.buffer.rows import open_rows
from ebm_dist.cluster.shared_memory import NodeMemory
from ebm_dist.core.errors import NonFinite
from ebm_dist.core.generators import seeded
from ebm_dist.core.plugins import USER_METRICS
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import (
    Arrays,
    ChainSample,
    EnergyFn,
    EventSpec,
    Lease,
    MovedChains,
    NegativeArrays,
)
from ebm_dist.core.weights import FlatLayout
from ebm_dist.diagnostics import autocorrelation_time, effective_sample_size, split_rhat
from ebm_dist.energies import EnergySection
from ebm_dist.energies.context import CONTEXT, bind, chain_unit, trait
from ebm_dist.jarzynski.kernel import GAIN, carried, weighted
from ebm_dist.jarzynski.weights import resampling
from ebm_dist.metrics.names import describe
from ebm_dist.objectives import ObjectiveSection
from ebm_dist.samplers import Chain, Engine, KernelSection, run_chain
from ebm_dist.samplers.tempering.levels import highest_level, noise_of
from ebm_dist.samplers.traits import trait as kernel_trait


class Worker:
    """Runs MCMC rounds: takes a lease, moves its chains under given weights, returns them."""

    def __init__(
        self,
        energy: EnergySection,
        sampler: KernelSection,
        spec: EventSpec,
        *,
        objective: ObjectiveSection | None = None,
        device: str = "cpu",
        resample_threshold: float | None = None,
        storage: StorageName = "float32",
        steady: bool = False,
        shared: NodeMemory | None = None,
        num_updates: int | None = None,
    ) -> None:
        """
        Args:
            objective: makes the energy function of the chains from the learned energy; None to use
                the learned energy itself.
            num_updates: the last update of the run; `sampler.engine: auto` compiles only if enough
                updates remain.
            resample_threshold: chains with Jarzynski weights are resampled when their effective
                sample fraction falls below this; None for chains without weights.
            storage: the format in which shards store chains.
            steady: rounds must not depend on when a compilation ends, as in flow.mode sync.
            shared: directory in which the shards of this node map their chains; None to accept any.
        """
        self._device = torch.device(device)
        self._spec = spec
        self._energy = self._chain_energy = energy.build()
        if objective is not None:
            self._chain_energy = objective.chain_energy(self._energy)
        self._chain_energy.to(self._device).eval().requires_grad_(False)
        self._layout = FlatLayout.of(self._energy)
        self._codec = Codec.of(storage, spec)
        self._staging: Tensor | None = None
        self._within = str(shared.path) if shared is not None else None
        self._sampler = sampler
        self._resample_threshold = resample_threshold
        kernel = sampler.build()
        self._kernel = kernel if resample_threshold is None else weighted(kernel)
        self._notes: list[str] = []
        self._engine = Engine(sampler.engine, steady=steady, say=self._notes.append)
        self._num_updates = num_updates
        self._version: int | None = None

    def run_round(
        self, lease: Lease | None, weights: np.ndarray, version: int, num_steps: int
    ) -> MovedChains | None:
        """Move the chains of `lease` by `num_steps` steps under `weights` of `version`.

        Raises:
            NonFinite: an energy or a position is not finite.
        """
        if lease is None:  # the shard had too few free chains
            return None
        self._use(weights, version)
        if self._num_updates is not None:
            self._engine.progress = version / self._num_updates
        condition = self._empty_condition(lease)
        start = self._fetch(lease, condition)
        if start is None:
            return _void(lease, version, num_steps)
        context = lease.context if condition is None else lease.context | {"condition": condition}
        energy_fn = self._given(self._chain_energy, context)
        log_weight = np.asarray(lease.log_weight)
        negatives = ancestors = None
        if self._resample_threshold is not None:
            now, log_weight = self._carried(lease, start)
            negatives = NegativeArrays(
                # A copy: the next round reuses the memory of `start`.
                x=np.array(start.cpu().numpy()),
                energy=now.astype(np.float32),
                version=np.full(len(start), version, np.int64),
                log_weight=log_weight.astype(np.float32),
            )
            seed = derive_seed(lease.seed, "resample")
            if (found := resampling(log_weight, self._resample_threshold, seed)) is not None:
                ancestors, log_weight = found
                start = start[torch.from_numpy(ancestors).to(self._device)]
        chain = self._run(start, energy_fn, lease.seed, num_steps, lease.context.get("clock"))
        if (gain := chain.info.pop(GAIN, None)) is not None:
            log_weight = log_weight + num_steps * gain.double().cpu().numpy()
        stored = self._codec.encode(chain.position, self._generator(lease.seed, "rounding"))
        energy = self._energy_of(chain, energy_fn, stored).float().cpu().numpy()
        if not (np.isfinite(energy).all() and chain.position.isfinite().all()):
            raise NonFinite(
                f"chains left the finite numbers under the weights of version {version}; lower "
                "sampler.step_size, set sampler.clamp and sampler.grad_clip, or raise "
                "objective.energy_l2"
            )
        position, token = stored.cpu().numpy(), None
        if lease.grant is not None:
            rows = open_rows(lease.grant, self._within)
            written = rows is not None and rows.write(lease.grant, position, lease.chain_id)
            position, token = None, lease.grant.token if written else None
        return MovedChains.of(
            lease,
            position=position,
            energy=energy,
            log_weight=log_weight.astype(np.float32),
            version=version,
            num_steps=num_steps,
            negatives=negatives,
            ancestors=ancestors,
            stats=round_stats(chain, start),
            token=token,
            level=self._level_after(chain, lease.context),
            notes=self._new_notes(),
            compiling=self._engine.compiling,
        )

    def hold(self, weights: np.ndarray, version: int) -> int:
        """Load weights before the first round. The answer tells that the process has started."""
        self._use(weights, version)
        return version

    def sample(
        self, num: int, num_steps: int, weights: np.ndarray, seed: int, start_std: float
    ) -> ChainSample:
        """`num` chains that start from noise, after `num_steps` steps.

        An energy that needs a label gets all classes equally often; one that needs a level gets the
        cleanest, or the highest where the sampler goes down from there.

        Args:
            seed: seed of this call, from which those of the starts and of the moves are derived.
            start_std: standard deviation of the starting noise, buffer.init_std.
        """
        self._use(weights, None)
        generator = seeded(derive_seed(seed, "starts"))
        highest = highest_level(self._kernel, self._energy)
        if highest is None:
            start = self._spec.noise(num, generator, std=start_std)
        else:
            start = noise_of(self._energy, highest, (num, *self._spec.shape), generator)
        context: Arrays = {}
        needed = trait(self._energy, "needs_context")
        if "label" in needed:
            context["label"] = np.arange(num) % trait(self._energy, "num_labels")
        if "level" in needed:
            context["level"] = np.full(num, highest or 0)
        energy_fn = self._given(self._energy, context)
        chain = self._run(start, energy_fn, derive_seed(seed, "moves"), num_steps)
        if (moved := self._level_after(chain, context)) is not None:
            context["level"] = moved
        return ChainSample(chain.position.cpu().numpy(), context)

    def _given(self, energy: nn.Module, context: Arrays) -> EnergyFn:
        """The energy function of chains with this context."""
        tensors = {
            name: torch.from_numpy(np.array(context[name])).to(self._device)
            for name in CONTEXT
            if name in context
        }
        return bind(energy, **tensors)

    def _empty_condition(self, lease: Lease) -> np.ndarray | None:
        """An array for the conditions that a lease grants by rows; None if it grants none."""
        if lease.grant is None or (shape := lease.grant.condition_shape) is None:
            return None
        return np.empty((len(lease.slots), *shape), np.float32)

    def _fetch(self, lease: Lease, condition: np.ndarray | None) -> Tensor | None:
        """The chains of a lease, (M, *event) float32 on the device; None if the lease is void.

        Valid until the next call, which reuses the staging buffer.
        """
        size = (len(lease.slots), *self._spec.shape)
        if self._staging is None or self._staging.shape != size:
            empty = torch.from_numpy(np.empty(size, self._codec.dtype))
            self._staging = empty.pin_memory() if self._device.type == "cuda" else empty
        if lease.grant is None:
            assert lease.position is not None
            np.copyto(self._staging.numpy(), lease.position)
        else:
            rows = open_rows(lease.grant, self._within)
            staging = self._staging.numpy()
            if rows is None or not rows.read(lease.grant, staging, lease.chain_id, condition):
                return None
        # The copy may be asynchronous: the buffer is reused only after the round, and the end of
        # the round synchronises.
        return self._codec.decode(self._staging.to(self._device, non_blocking=True))

    def _energy_of(self, chain: Chain, energy_fn: EnergyFn, stored: Tensor) -> Tensor:
        """The energies (M,) of the chains as stored, after rounding."""
        if self._codec.name == "float32" or self._codec.discrete:
            return chain.energy
        with torch.no_grad():
            return energy_fn(self._codec.decode(stored))

    def _generator(self, seed: int, *purpose: str) -> torch.Generator:
        seed = derive_seed(seed, *purpose) if purpose else seed
        return seeded(seed, self._device)

    def _run(
        self,
        start: Tensor,
        energy_fn: EnergyFn,
        seed: int,
        num_steps: int,
        clock: np.ndarray | None = None,
    ) -> Chain:
        generator, start = self._generator(seed), start.to(self._device)
        ages = None
        if clock is not None and kernel_trait(self._kernel, "reads_clock"):
            ages = torch.from_numpy(np.array(clock)).to(self._device)
        unit = chain_unit(energy_fn, start)
        chain = run_chain(
            self._kernel,
            start if unit is None else start / unit,
            energy_fn,
            num_steps,
            generator,
            precision=self._sampler.precision,
            channels_last=self._sampler.channels_last,
            engine=self._engine,
            clock=ages,
        )
        return chain if unit is None else replace(chain, position=unit * chain.position)

    def _level_after(self, chain: Chain, context: Arrays) -> np.ndarray | None:
        """The levels (M,) of the moved chains; None if the sampler leaves them as they are."""
        if "level" not in context or not kernel_trait(self._kernel, "moves_level"):
            return None
        state: Any = chain.state
        return state.level.cpu().numpy()

    def _new_notes(self) -> tuple[str, ...]:
        # A compiling thread may add a note meanwhile: remove only those that were taken.
        taken = tuple(self._notes)
        del self._notes[: len(taken)]
        return taken

    def _carried(self, lease: Lease, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Energies and Jarzynski log-weights of unmoved chains x under the current weights."""
        assert lease.energy is not None
        log_weight, recorded = (
            torch.from_numpy(np.array(value)) for value in (lease.log_weight, lease.energy)
        )
        now, log_weight = carried(log_weight, recorded, x, self._energy, self._kernel.temperature)
        return now.numpy(), log_weight.numpy()

    def _use(self, weights: np.ndarray, version: int | None) -> None:
        if version is None or version != self._version:
            self._layout.bind_(self._energy, weights)
            self._version = version


def _void(lease: Lease, version: int, num_steps: int) -> MovedChains:
    """The answer for a lease whose rows were given to another: the shard counts it as late."""
    nothing = np.zeros(len(lease.slots), np.float32)
    return MovedChains.of(
        lease,
        position=None,
        energy=nothing,
        log_weight=nothing,
        version=version,
        num_steps=num_steps,
    )


def round_stats(chain: Chain, start: Tensor) -> dict[str, float]:
    """Diagnostics of a round, by metric name. Makes two transfers from the device."""
    names, values = [], []
    for key, per_chain in chain.info.items():
        name = f"sampler/{key}"  # a user's sampler may report any name
        names.append(name if describe(name) is not None else f"{USER_METRICS}{key}")
        values.append(per_chain.float().mean())
    moved = rearrange(chain.position - start, "b ... -> b (...)")
    names.append("sampler/displacement")
    values.append(moved.norm(dim=1).mean())
    stats = dict(zip(names, torch.stack(values).tolist()))
    trace = chain.energies.cpu()
    if trace.shape[0] >= 4:
        # The autocorrelation time is about each chain's own mean; ESS and R-hat also detect chains
        # with different means.
        stats["chain/autocorrelation"] = float(autocorrelation_time(trace))
        stats["chain/ess"] = float(effective_sample_size(trace))
        stats["chain/rhat"] = float(split_rhat(trace))
    # From the outcomes, not from the acceptance rate, which for NUTS is a mean along trajectories.
    if "accepted" in chain.info:
        stats["chain/self_transition"] = 1.0 - stats["sampler/accepted"]
    return stats
