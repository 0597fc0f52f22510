"""The DeepSpeed engine of one learner rank.

This module and `group.py` turn off the DeepSpeed features that a run does not use: its console
output, the build of a shared-memory collective at start, its gradient clipping and its checkpoints.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebm_dist.core.errors import NonFinite
from ebm_dist.core.seeds import derive_seed
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.core.weights import FlatLayout, flat_tensors
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.deepspeed_options import deepspeed_options
from ebm_dist.learner.group import Group, numbered
from ebm_dist.learner.micro_batch import micro_batches
from ebm_dist.learner.optimizer import make_optimizer
from ebm_dist.learner.packed import PackedWeights
from ebm_dist.learner.partition import keep_shapes, partition_of
from ebm_dist.learner.step import LearningStep
from ebm_dist.objectives.objective import Objective


class LearnerEngine:
    """Takes optimiser steps on this rank's slice of the batch, in collectives with the other ranks.

    Every public method is collective: all ranks call it, each in one thread. The engine owns the
    modules that it is given: under ZeRO-3 their weights are empty between calls.
    """

    def __init__(
        self,
        config: LearnerConfig,
        energy: nn.Module,
        objective: nn.Module,
        *,
        rank: int = 0,
        world_size: int = 1,
        master_addr: str = "127.0.0.1",
        master_port: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            energy, objective: the same on every rank; the weights are taken from rank 0.
            master_addr, master_port: the address of rank 0; not read at world size 1.
            device: the device of this rank; "cuda" means the current one. The process must not have
                used DeepSpeed on another kind of device.

        Raises:
            ValueError: the energy and objective have nothing to train, or
                `recompute_activations` finds nothing to recompute.
            RunFailed: the ranks did not find each other within `timeout_s`.
        """
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = numbered(device)
        self.step = 0
        # On one rank the ZeRO stages would copy and reduce without saving memory.
        self.zero_stage = config.zero_stage if world_size > 1 else 0
        self._closed = False
        if not any(p.requires_grad for p in [*energy.parameters(), *objective.parameters()]):
            raise ValueError(
                f"energy {type(energy).__name__} has no parameters to train; choose a network, "
                "such as energy.name: mlp"
            )
        if config.recompute_activations:
            _recompute(energy)
        # Computed before DeepSpeed wraps the module: ZeRO-3 leaves parameters of shape (0,).
        self.layout = FlatLayout.of(energy)
        self._module = LearningStep(
            energy,
            objective,
            autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            keep_gathered=self.zero_stage == 3,
        )
        # Comes before the references below: `to` keeps parameter objects, but replaces buffers.
        self._module.to(self.device)
        # Cached, because a walk over the modules takes 1% of a small network's update.
        self._published = list(flat_tensors(energy).values())
        self._energy_parameters = list(energy.parameters())
        self._parameters = dict(self._module.named_parameters())
        persistent = self._module.state_dict(keep_vars=True).keys()
        self._buffer_names = [n for n, _ in self._module.named_buffers() if n in persistent]
        self._shapes = {n: tuple(p.shape) for n, p in self._parameters.items()}

        self._group = Group(rank, world_size, self.device)
        try:
            self._group.join(master_addr, master_port, config.timeout_s)
            self._engine = self._wrap()
        except BaseException:
            self.close()
            raise
        self._partition = partition_of(
            self._engine.optimizer, zero_stage=self.zero_stage, rank=rank
        )
        if world_size > 1 and isinstance(objective, Objective):
            # Importance weights are normalised over the global batch, not over one rank's slice.
            objective.gather_ranks = self._gather_ranks

    def update(
        self, batch: Batch, negatives: Negatives | None, *, seed: int, lr: float
    ) -> dict[str, float]:
        """One optimiser step on this rank's slices; returns metrics averaged over ranks.

        Args:
            batch: x (B, *event) of this rank; B is the same on every rank and divisible by
                `accumulation`.
            negatives: x (M, *event) of this rank, under the same rules, or None.
            seed: seeds the objective's noise; differs between ranks.
            lr: the learning rate of this step.

        Raises:
            NonFinite: on every rank, if the loss or gradient of any rank is not finite, or the
                mean gap over all ranks is beyond `gap_limit`. Weights and optimiser state are
                unchanged.
        """
        micro = micro_batches(batch, negatives, self.config.accumulation, self.device)
        if isinstance(self._module.objective, Objective):
            self._module.objective.begin_update(self.step)
        totals: dict[str, Tensor] = {}
        for index, (part, part_negatives) in enumerate(micro):
            self._engine.set_gradient_accumulation_boundary(index == len(micro) - 1)
            part_seed = seed if len(micro) == 1 else derive_seed(seed, "micro", index)
            loss, metrics = self._engine(part, part_negatives, part_seed)
            self._engine.backward(loss)
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        gradients = self._partition.gradients()
        values = self._agree(totals, gradients, num_micro=len(micro))
        norm = values["learner/param_grad_norm"]
        if not (math.isfinite(values["loss/total"]) and math.isfinite(norm)):
            self._partition.discard()
            raise NonFinite(
                f"update {self.step}: the loss is {values['loss/total']:g} and the norm of its "
                f"gradient {norm:g} over {self.world_size} rank(s); the weights are as before. "
                "Lower learner.lr or sampler.step_size, or set learner.grad_clip, "
                "objective.energy_l2 or energy.spectral_norm"
            )
        self._refuse_exploded(values)
        clip = self.config.grad_clip
        if clip is not None and norm > clip:
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        self._partition.set_lr(lr)
        # DeepSpeed frees gradients once it has flattened them; these references would keep them.
        del gradients
        self._engine.step()
        self.step += 1
        return {**values, "learner/lr": lr}

    def _refuse_exploded(self, values: dict[str, float]) -> None:
        limit = self.config.gap_limit
        name = "energy/gap" if "energy/gap" in values else "loss/total"
        if limit is None or abs(values[name]) <= limit:
            return
        self._partition.discard()
        raise NonFinite(
            f"update {self.step}: {name} is {values[name]:g}, past learner.gap_limit = {limit:g}; "
            "the weights are as before. Lower learner.lr, flow.max_lag or sampler.step_size, set "
            "objective.energy_l2 or energy.spectral_norm, or raise learner.gap_limit"
        )

    @torch.no_grad()
    def packed_weights(self) -> PackedWeights | None:
        """A copy of the energy's weights in `layout` order, on its device; None except on rank 0.

        Does not synchronise with the device.
        """
        with self._gathered(self._energy_parameters):
            if self.rank != 0:
                return None
            return PackedWeights(torch.cat([t.reshape(-1) for t in self._published]).float())

    def flat_weights(self) -> np.ndarray | None:
        """The energy's weights (N,) float32 on the CPU; None except on rank 0."""
        packed = self.packed_weights()
        return packed.on_host() if packed is not None else None

    @torch.no_grad()
    def state(self) -> dict[str, Tensor] | None:
        """The training state as full (unsharded) CPU tensors; None except on rank 0.

        Keys: `param/NAME`, `buffer/NAME`, `optim/KEY/NAME`, and the 0-d `optim/step` and `step`.
        The form does not depend on the number of ranks or the ZeRO stage.
        """
        out: dict[str, Tensor] = {}
        keep = self.rank == 0
        with self._gathered(list(self._parameters.values())):
            if keep:
                for name, parameter in self._parameters.items():
                    out[f"param/{name}"] = _copy(parameter)
                for name in self._buffer_names:
                    out[f"buffer/{name}"] = _copy(self._module.get_buffer(name))
        for key in self._partition.moment_names():
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:
                    whole = self._partition.moment(parameter, key)
                    if keep:
                        out[f"optim/{key}/{name}"] = _copy(whole)
        if not keep:
            return None
        out["optim/step"] = torch.tensor(self._partition.step_count())
        out["step"] = torch.tensor(self.step)
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`, which every rank gets in full; any world size or stage wrote it.

        Raises:
            ValueError: `state` belongs to another energy, objective or optimiser.
        """
        self._check(state)
        parameters = list(self._parameters.values())
        with self._gathered(parameters, modified=True):
            for name, parameter in self._parameters.items():
                # Under ZeRO-3 rank 0's values are broadcast; at other stages every rank writes.
                if self.zero_stage != 3 or self.rank == 0:
                    parameter.copy_(state[f"param/{name}"])
        for name in self._buffer_names:
            self._module.get_buffer(name).copy_(state[f"buffer/{name}"])
        self._partition.refresh()
        for key in self._partition.moment_names():
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:
                    value = state[f"optim/{key}/{name}"].to(self.device, torch.float32)
                    self._partition.set_moment(parameter, key, value)
        self._partition.set_step_count(int(state["optim/step"]))
        self.step = int(state["step"])

    def close(self) -> None:
        """Leave the process group, so that this process can make another engine."""
        if self._closed:
            return
        self._closed = True
        try:
            if hasattr(self, "_engine"):
                self._engine.destroy()
                del self._engine
        finally:
            self._group.leave()

    def __enter__(self) -> LearnerEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wrap(self) -> Any:
        trainable = [p for p in self._module.parameters() if p.requires_grad]
        options = deepspeed_options(
            self.config,
            zero_stage=self.zero_stage,
            world_size=self.world_size,
            num_parameters=sum(p.numel() for p in trainable),
        )
        engine, *_ = self._group.deepspeed.initialize(
            model=self._module,
            optimizer=make_optimizer(self.config, trainable),
            model_parameters=trainable,
            config=options,
            dist_init_required=False,
        )
        if self.world_size == 1:
            # Saves flattening the gradient and a reduction over one rank, with a thread switch.
            engine.enable_backward_allreduce = False
        if self.zero_stage == 3:
            keep_shapes(trainable)
        return engine

    def _agree(
        self, totals: dict[str, Tensor], gradients: list[Tensor], *, num_micro: int
    ) -> dict[str, float]:
        """Means over ranks and micro-batches, and the global norm of the gradient.

        One reduction and one transfer serve metrics, clipping and the finite check, since NaN and
        infinity propagate through a sum.
        """
        norms = torch._foreach_norm(gradients) if gradients else ()
        scalars, num = [*norms, *totals.values()], len(norms)
        if self.world_size > 1:
            packed = torch.stack(scalars).double()
            packed = torch.cat([packed[:num].square().sum(0, keepdim=True), packed[num:]])
            dist.all_reduce(packed)
            first, *rest = packed.tolist()
        else:
            # After a backward, the first call of any operation costs a CPU 20 to 40 us, because its
            # code is not in the caches. So few kinds of operation are used here.
            on_cpu = self.device.type == "cpu"
            numbers = [s.item() for s in scalars] if on_cpu else torch.stack(scalars).tolist()
            first, rest = sum(x * x for x in numbers[:num]), numbers[num:]
        if not self._partition.sharded:
            first /= self.world_size
        scale = 1.0 / (self.world_size * num_micro)
        means = {name: value * scale for name, value in zip(totals, rest)}
        norm = math.sqrt(first) if first >= 0 else math.nan
        return {**means, "learner/param_grad_norm": norm}

    @torch.no_grad()
    def _gather_ranks(self, vector: Tensor) -> Tensor:
        """All-gathers a vector (k,) into (world_size, k)."""
        out = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(out, vector.detach().contiguous())
        return torch.stack(out)

    def _gathered(
        self, parameters: list[nn.Parameter], *, modified: bool = False
    ) -> AbstractContextManager[Any]:
        """Context in which every parameter is unsharded, and may be written if `modified`."""
        if self.zero_stage != 3:
            return nullcontext()
        return self._group.deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if modified else None
        )

    def _check(self, state: dict[str, Tensor]) -> None:
        wanted: dict[str, tuple[int, ...]] = {"step": (), "optim/step": ()}
        for name in self._buffer_names:
            wanted[f"buffer/{name}"] = tuple(self._module.get_buffer(name).shape)
        for name, parameter in self._parameters.items():
            wanted[f"param/{name}"] = self._shapes[name]
            if parameter.requires_grad:
                for key in self._partition.moment_names():
                    wanted[f"optim/{key}/{name}"] = self._shapes[name]
        faults = [f"{name} is missing" for name in sorted(wanted.keys() - state.keys())]
        faults += [f"{name} is unknown" for name in sorted(state.keys() - wanted.keys())]
        faults += [
            f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ]
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise ValueError(
                f"checkpoint does not fit the learner: {faults[0]}{more}; it must come from the "
                "same energy, objective and learner.optimizer"
            )


def _recompute(energy: nn.Module) -> None:
    blocks = [m for m in energy.modules() if hasattr(m, "recompute")]
    if not blocks:
        raise ValueError(
            f"learner.recompute_activations: energy {type(energy).__name__} has no transformer "
            "blocks; set it to false, or choose energy.name: vit or transformer_lm"
        )
    for part in blocks:
        part.recompute = True  # type: ignore[assignment]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
