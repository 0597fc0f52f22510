"""Access to gradients and optimiser state in DeepSpeed, at each ZeRO stage.

Only this module depends on the internals of DeepSpeed's optimisers. Weights are float32 at every
stage, so a module's parameters and the optimiser's master copies hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.optimizer import make_optimizer


class Partition:
    """Stage 0: every rank holds the full state, and the optimiser is torch's own."""

    sharded = False
    """Whether `gradients` holds this rank's part only."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        for master in self.masters():
            _start_state(self.inner, master)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimiser that updates the master weights."""
        return self._optimizer

    def masters(self) -> list[Tensor]:
        """The tensors for which `inner` keeps state."""
        return [p for group in self.inner.param_groups for p in group["params"]]

    def gradients(self) -> list[Tensor]:
        """The averaged gradients after the last backward of an update, writable for clipping.

        A weight that the loss does not use has gradient zero, as at every other stage. So weight
        decay applies to it, whatever the number of ranks.
        """
        gradients = []
        for master in self.masters():
            grad = master.grad
            if grad is None:
                grad = master.grad = torch.zeros_like(master)
            gradients.append(grad)
        return gradients

    def discard(self) -> None:
        """Drop the gradient, as if the backward had not run."""
        self._optimizer.zero_grad(set_to_none=True)

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The full tensor `key` of the optimiser for `parameter`. Collective if it is sharded."""
        return self.inner.state[parameter][key]

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set this rank's part of the tensor `key` for `parameter` from the full `value`."""
        self.inner.state[parameter][key].copy_(value)

    def refresh(self) -> None:
        """Copy the module's parameters into the master weights."""

    def moment_names(self) -> tuple[str, ...]:
        """Names of the optimiser's tensors per weight, e.g. exp_avg; () for plain SGD."""
        for master in self.masters():
            state = self.inner.state[master]
            return tuple(k for k, v in state.items() if k != "step" and torch.is_tensor(v))
        return ()

    def step_count(self) -> int:
        """The optimiser's count of updates; 0 if it keeps none."""
        counts = {int(s["step"]) for m in self.masters() if "step" in (s := self.inner.state[m])}
        assert len(counts) <= 1, f"weights disagree on the number of updates: {counts}"
        return counts.pop() if counts else 0

    def set_step_count(self, count: int) -> None:
        """Set the count of updates of every weight."""
        for master in self.masters():
            state = self.inner.state[master]
            if "step" in state:
                state["step"].fill_(count)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.inner.param_groups:
            group["lr"] = lr


class _ShardedPartition(Partition):
    """Each rank holds a part of the state, in a ZeRO optimiser around torch's own."""

    sharded = True

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer

    def gradients(self) -> list[Tensor]:
        groups = self._optimizer.averaged_gradients.values()
        return [grad for group in groups if group is not None for grad in group]

    def refresh(self) -> None:
        self._optimizer.refresh_fp32_params()


class FlatPartition(_ShardedPartition):
    """Stages 1 and 2: each rank holds a slice of one flat tensor of all weights."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        # DeepSpeed maps parameters to state after the first step; our state exists before it.
        optimizer._lazy_init_hp_params_optimizer_state()

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def discard(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return parameter.get_full_hp_param(optim_state_key=key)  # type: ignore[attr-defined]

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        parameter.set_full_hp_param(value, optim_state_key=key)  # type: ignore[attr-defined]


class GatheredPartition(_ShardedPartition):
    """Stage 3: each rank holds a padded slice of every weight."""

    def __init__(self, optimizer: Any, *, rank: int) -> None:
        self._rank = rank
        super().__init__(optimizer)

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def discard(self) -> None:
        optimizer = self._optimizer
        # `step` makes these calls before it reads a gradient. Without them the next backward would
        # add to the dropped gradient.
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer.zero_grad(set_to_none=True)
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._optimizer.get_full_hp_param(parameter, key)

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        # DeepSpeed's own setter of full values does not pad the slice of the last rank.
        flat = value.new_zeros(size * (self._rank + 1))
        end = min(flat.numel(), value.numel())
        flat[:end] = value.flatten()[:end]
        local = flat[size * self._rank :]
        self._optimizer.set_local_hp_param(local, parameter, key)


def first_state(config: LearnerConfig, step: nn.Module) -> dict[str, Tensor]:
    """The result of `LearnerEngine.state` before the first update, computed without an engine."""
    trained = {name: p for name, p in step.named_parameters() if p.requires_grad}
    partition = Partition(make_optimizer(config, list(trained.values())))
    persistent = step.state_dict().keys()
    state: dict[str, Tensor] = {f"param/{name}": p.detach() for name, p in step.named_parameters()}
    state |= {f"buffer/{name}": b for name, b in step.named_buffers() if name in persistent}
    for key in partition.moment_names():
        state |= {f"optim/{key}/{name}": partition.moment(p, key) for name, p in trained.items()}
    return state | {"optim/step": torch.tensor(0), "step": torch.tensor(0)}


def keep_shapes(parameters: Iterable[nn.Parameter]) -> None:
    """Restore the shape of parameters that ZeRO-3 has emptied, while their gradient is stored.

    An inner `autograd.grad` consumes the module hooks by which ZeRO-3 gathers weights for the outer
    backward, so a weight can be empty when its gradient arrives. Torch then compares the layout
    of the gradient with that of a (0,) tensor: an error, or a read past the end of its strides.
    The placeholder has the right shape and takes no memory.
    """

    def fill(parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def before(grad: Tensor) -> None:
            shape = parameter.ds_shape  # type: ignore[attr-defined]
            if parameter.shape != shape:
                parameter.data = parameter.data.new_empty(1).expand(shape)

        return before

    def empty(parameter: Tensor) -> None:
        if parameter.numel() > 1 and not any(parameter.stride()):
            parameter.data = parameter.data.new_empty(0)

    for parameter in parameters:
        parameter.register_hook(fill(parameter))
        parameter.register_post_accumulate_grad_hook(empty)


def partition_of(optimizer: Any, *, zero_stage: int, rank: int) -> Partition:
    """The partition of a DeepSpeed engine's `optimizer`."""
    if zero_stage == 0:
        return Partition(optimizer)
    if zero_stage == 3:
        return GatheredPartition(optimizer, rank=rank)
    return FlatPartition(optimizer)


def _start_state(inner: torch.optim.Optimizer, master: Tensor) -> None:
    """Create now the state that torch creates at the first step.

    So a checkpoint before the first update has the same keys as a later one, and a checkpoint can
    be loaded into an optimiser that has not stepped.
    """
    state = inner.state[master]
    if isinstance(inner, torch.optim.SGD):
        # Torch sets the buffer to the first gradient; a zero buffer gives the same result.
        if inner.defaults["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(master)
        return
    on_device = inner.defaults["fused"] or inner.defaults["capturable"]
    state["step"] = torch.zeros(
        (), dtype=torch.float32, device=master.device if on_device else "cpu"
    )
    state["exp_avg"] = torch.zeros_like(master)
    state["exp_avg_sq"] = torch.zeros_like(master)
