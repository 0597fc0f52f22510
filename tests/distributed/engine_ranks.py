"""Two learner ranks as processes that stay, and the plain torch loop they are held against."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ebm_dist import energies, objectives
from ebm_dist.core.generators import seeded
from ebm_dist.core.types import Batch, Negatives
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine

Draw = tuple[Batch, Negatives | None]


class Ranks:
    """Runs `function(rank, port, *args)` on every rank at once.

    The processes are kept: starting one costs more than any test in here.
    """

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(rank, far), daemon=True)
            process.start()
            self.pipes.append(near)
            self.processes.append(process)
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
        """The ranks' results in their order; an exception on a rank is an error here."""
        port = free_port()
        for pipe in self.pipes:
            pipe.send((function, port, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.stop()
                start.cache_clear()
                raise TimeoutError(f"rank {rank} gave no answer in {timeout} s")
            results.append(pipe.recv())
        failed = [text for ok, text in results if not ok]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in results]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


@functools.cache
def start(num_ranks: int = 2) -> Ranks:
    return Ranks(num_ranks)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            function, port, args = pipe.recv()
            try:
                answer = (True, function(rank, port, *args))
            except BaseException:
                answer = (False, f"rank {rank}:\n{traceback.format_exc()}")
            pipe.send(answer)


def make_energy(name: str, **params: Any) -> nn.Module:
    """A small energy; images are 1x8x8, other events have 3 numbers."""
    shape = (3,) if name == "mlp" else (1, 8, 8)
    small: dict[str, dict[str, Any]] = {
        "mlp": {"widths": (16, 16)},
        "resnet": {"width": 4, "multipliers": (1, 2)},
        "vit": {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
    }
    return energies.make(name, event_shape=shape, **{**small[name], **params})


def make_objective(name: str, **params: Any) -> nn.Module:
    return objectives.make(name, **params)


def draws(energy_name: str, num_steps: int, batch_size: int = 8, seed: int = 0) -> list[Draw]:
    """Global batches and negatives of `num_steps` updates, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3) if energy_name == "mlp" else (batch_size, 1, 8, 8)
    out: list[Draw] = []
    for _ in range(num_steps):
        x = torch.empty(shape).normal_(generator=generator)
        label = torch.randint(0, 4, (batch_size,), generator=generator)
        negative = 0.5 + 1.5 * torch.empty(shape).normal_(generator=generator)
        log_weight = torch.empty(batch_size).normal_(generator=generator)
        out.append(
            (
                Batch(x, label),
                Negatives(
                    negative,
                    torch.zeros(batch_size),
                    torch.zeros(batch_size, dtype=torch.int64),
                    log_weight,
                ),
            )
        )
    return out


def slice_of(draw: Draw, rank: int, world_size: int) -> Draw:
    batch, negatives = draw
    size = batch.x.shape[0] // world_size
    part = slice(rank * size, (rank + 1) * size)
    sliced = (
        None
        if negatives is None
        else Negatives(
            negatives.x[part],
            negatives.energy[part],
            negatives.version[part],
            negatives.log_weight[part],
        )
    )
    return Batch(batch.x[part], None if batch.label is None else batch.label[part]), sliced


def run_engine(
    rank: int,
    port: int,
    config: dict[str, Any],
    energy: tuple[str, dict[str, Any]],
    objective: tuple[str, dict[str, Any]],
    num_steps: int,
    world_size: int = 2,
    lr: float = 0.02,
    first: int = 0,
    state: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Train steps `first` to `num_steps` on this rank's slices; the end state and metrics."""
    module = make_energy(energy[0], **energy[1])
    with LearnerEngine(
        LearnerConfig(**config),
        module,
        make_objective(objective[0], **objective[1]),
        rank=rank,
        world_size=world_size,
        master_port=port,
    ) as engine:
        if state is not None:
            engine.load_state(state)
        metrics = []
        for step, draw in enumerate(draws(energy[0], num_steps)):
            if step >= first:
                batch, negatives = slice_of(draw, rank, world_size)
                seed = 1000 * step + rank
                metrics.append(engine.update(batch, negatives, seed=seed, lr=lr))
        return {"state": engine.state(), "flat": engine.flat_weights(), "metrics": metrics}


def run_plain(
    config: dict[str, Any],
    energy: tuple[str, dict[str, Any]],
    objective: tuple[str, dict[str, Any]],
    num_steps: int,
    lr: float = 0.02,
    num_slices: int = 1,
) -> dict[str, Any]:
    """The same updates by a loop anybody would write: torch alone, one process.

    `num_slices` > 1 averages the losses of slices with the ranks' seeds: what an objective with
    noise of its own, which no rank shares with another, is held against.
    """
    learner = LearnerConfig(**config)
    network = make_energy(energy[0], **energy[1])
    loss_of = make_objective(objective[0], **objective[1])
    both = nn.ModuleDict({"energy": network, "objective": loss_of})
    parameters = [p for p in both.parameters() if p.requires_grad]
    if learner.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, lr, momentum=learner.momentum, weight_decay=learner.weight_decay
        )
    else:
        kind = torch.optim.AdamW if learner.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(
            parameters,
            lr,
            betas=learner.betas,
            eps=learner.eps,
            weight_decay=learner.weight_decay,
        )
    metrics = []
    for step, draw in enumerate(draws(energy[0], num_steps)):
        optimizer.zero_grad()
        losses = []
        for index in range(num_slices):
            batch, negatives = slice_of(draw, index, num_slices)
            generator = seeded(1000 * step + index)
            with torch.autocast("cpu", torch.bfloat16, enabled=learner.precision == "bf16"):
                losses.append(loss_of(network, batch, negatives, generator)[0])
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, learner.grad_clip or float("inf"))
        optimizer.step()
        metrics.append({"loss/total": loss.item(), "learner/param_grad_norm": norm.item()})
    state = {f"param/{name}": p.detach().clone() for name, p in both.named_parameters()}
    return {"state": state, "metrics": metrics}
