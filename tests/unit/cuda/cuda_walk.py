"""All that runs where runtime.device is cuda, called on a card that is not there.

    python tests/unit/cuda/cuda_walk.py [--real] [PART ...]

runs each part, or those whose name begins so, and prints one line of JSON for it: its name, and
the traceback of what it came to, or null. With --real on a GPU, and torch's own compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "fashion" not in p.stem)

SMALL = [
    "runtime={device: cuda, backend: inline}",
    "tracking.wandb=off",
    "data.batch_size=8",
    "workers.num_chains=8",
    "sampler.num_steps=3",
]


def a_run_is_trained_and_resumed(config: str, *more: str) -> None:
    from ebm_dist.config.run_config import load
    from ebm_dist.run.train import train

    with tempfile.TemporaryDirectory() as directory:
        for steps in (2, 3):
            overrides = [*SMALL, f"run.steps={steps}", "checkpoint.every=1", *more]
            result = train(load(ROOT / "configs" / config, overrides), run_dir=directory)
            assert result.step == steps, result


def an_export_is_sampled_and_evaluated() -> None:
    from typer.testing import CliRunner

    from ebm_dist.cli import app
    from ebm_dist.config.run_config import load
    from ebm_dist.run.train import train

    with tempfile.TemporaryDirectory() as directory:
        config = load(ROOT / "configs/toy/contrastive.yaml", [*SMALL, "run.steps=1"])
        train(config, run_dir=f"{directory}/run")
        export = f"{directory}/run/export"
        for words in (
            ["sample", export, "--num", "4", "--steps", "3", "--out", f"{directory}/x.npz"],
            ["evaluate", export, "--suite", "density"],
        ):
            done = CliRunner().invoke(app, [*words, "--device", "cuda"])
            assert done.exit_code == 0, (words, done.output, done.exception)


@contextmanager
def learner_of(config: Path, *more: str, ranks: int = 1) -> Iterator[Any]:
    from ebm_dist.actors.learner_rank import LearnerRank
    from ebm_dist.config.run_config import load
    from ebm_dist.data import describe
    from ebm_dist.run.train import bind

    if config.stem == "digits_levels":  # a chain goes down each of the levels
        more = ("sampler.num_steps=17", *more)
    bound = load(config, [*SMALL, "runtime.backend=ray", *more])
    bound = bind(bound, describe(bound.data))
    rank = LearnerRank(
        bound.learner, bound.data, bound.energy, bound.objective, rank=0, seed=0, device="cuda"
    )
    rank.start(("127.0.0.1", 29500))
    try:
        yield rank, bound
    finally:
        rank.close()


def updates_and_state(config: Path, *more: str) -> None:
    """Two updates, weights published, and the state taken and loaded."""
    import numpy as np
    import torch

    from ebm_dist.buffer.starts import Starts
    from ebm_dist.core.types import NegativeArrays
    from ebm_dist.data import describe

    with learner_of(config, *more) as (rank, bound):
        energy = rank._energy
        negatives: list[Any] = []
        if rank._objective.needs_negatives:
            spec = describe(bound.data)
            fields = bound.context_fields(spec)
            starts = Starts(bound.buffer, spec, index=0, seed=0, data=rank._data, fields=fields)
            x, context = starts.draw(8, "walk")
            zeros = np.zeros(8, np.float32)
            negatives = [NegativeArrays(x, zeros, np.zeros(8, np.int64), zeros, context)]
        parts = [(0, 8 // bound.learner.num_ranks)] * len(negatives)
        for step in range(2):
            rank.update(step, 1e-3, None, parts, *negatives)
            rank.published(True)
        assert all(p.is_cuda for p in energy.parameters())
        _, state = rank.state()
        # Of two ranks the other's half of the moments is not here.
        if bound.learner.num_ranks == 1:
            rank.load(state.learner, state.ema, state.data)
            rank.update(2, 1e-3, None, parts, *negatives)
        assert isinstance(rank.weights(), np.ndarray)
        assert torch.cuda.current_device() == 0


def rounds(sampler: str, storage: str = "float32", *, jarzynski: bool = False) -> None:
    """A worker's rounds on leases of a shard, single steps and compiled blocks of them."""
    import numpy as np

    from ebm_dist import energies, samplers
    from ebm_dist.actors.worker import Worker
    from ebm_dist.buffer.config import BufferConfig
    from ebm_dist.buffer.shard import Shard
    from ebm_dist.core.types import EventSpec
    from ebm_dist.core.weights import FlatLayout

    kind = samplers.FAMILY.members[sampler]
    if kind.discrete:
        spec, energy = EventSpec((3, 3), "binary"), energies.FAMILY.section("ising", shape=(3, 3))
    elif storage == "float32":
        spec = EventSpec((2,), "real")
        energy = energies.FAMILY.section("mlp", event_shape=(2,), widths=(4,))
    else:
        spec = EventSpec((1, 8, 8), "image")
        energy = energies.FAMILY.section(
            "resnet", event_shape=(1, 8, 8), width=4, multipliers=(1, 2), spectral_norm=True
        )
    buffer = BufferConfig(capacity=16, reinit_prob=0.3, storage=storage)  # type: ignore[arg-type]
    shard = Shard(buffer, spec, index=0, capacity=16, max_lease=8, seed=3)
    weights = FlatLayout.of(energy.build(seed=1)).pack(energy.build(seed=1)).numpy()
    lease_id = 0
    # A block draws its noise itself where the engine is not steady.
    for engine, steady in (
        ("eager", True),
        ("compiled", sampler == "langevin"),
        ("compiled", False),
    ):
        section = samplers.FAMILY.section(sampler, **{**kind.example, "engine": engine})
        worker = Worker(
            energy,
            section,
            spec,
            device="cuda",
            storage=storage,  # type: ignore[arg-type]
            steady=steady,
            resample_threshold=0.99 if jarzynski else None,
        )
        worker._engine._background = False
        for _ in range(2):
            lease = shard.checkout(lease_id, 8)
            moved = worker.run_round(lease, weights, lease_id, 2)
            assert moved is not None
            assert shard.checkin(moved).accepted
            shard.take(lease_id)
            lease_id += 1
            if engine == "compiled" and sampler not in UNTRACED:
                told = " ".join(moved.notes)
                assert "eager" not in told, told
                assert _replayed(worker), told
    assert isinstance(worker.sample(8, 2, weights, 5, start_std=1.0).x, np.ndarray)


UNTRACED = ("nuts", "parallel_tempering", "simulated_tempering", "tempered_transitions")
"""Their steps ask the device how to go on, or count outside of tensors: they stay single steps."""


def _replayed(worker: Any) -> bool:
    """Whether the round ran a block as a graph."""
    blocks = [entry.block for entry in worker._engine._entries.values()]
    return all(block is not None and block.run._recording is not None for block in blocks)


def compile_as_traced() -> None:
    """In place of torch's compiler, which has none for a card: the traced graph itself.

    A trace of tensors without numbers would ask for a CUDA that is not linked: real ones are
    traced, as on the CPU. What the graph makes is then on the card.
    """
    import cuda_card
    import torch
    from torch.fx.experimental import proxy_tensor

    from ebm_dist.samplers.compile import engine, fused_noise

    real = proxy_tensor.make_fx

    def make_fx(function: Any, decompositions: Any, tracing_mode: str) -> Any:
        def traced(*inputs: Any) -> Any:
            with cuda_card.away():
                graph = real(function, decompositions, tracing_mode="real")(*inputs)
            for node in graph.graph.nodes:
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
                elif node.op == "get_attr":  # a constant
                    setattr(graph, node.target, getattr(graph, node.target).cuda())
            graph.recompile()
            return graph

        return traced

    def compile_graph(graph: Any, inputs: list[Any]) -> Any:
        graph = fused_noise.in_torch(graph)

        def run(tensors: list[Any]) -> Any:
            with torch.no_grad():
                return graph(*tensors)

        return run

    proxy_tensor.make_fx = make_fx  # type: ignore[assignment]
    engine.compile_graph = compile_graph


QUICK = (
    "a run of images in bf16 and uint8",
    *(f"learner: {path.stem}" for path in CONFIGS),
    "learner: ZeRO-2 of two ranks",
    "learner: ZeRO-3 of two ranks",
    "sampler: langevin",
    "sampler: mala",
    "storage: weighted chains",
)
"""Parts that together take half a minute; all take minutes."""


def faults(*words: str) -> dict[str, str | None]:
    """The traceback of each part, or None, from a process of its own: the card changes torch, and
    DeepSpeed knows one kind of device."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}  # runtime.device decides, and not this
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["part"]: row["error"] for row in map(json.loads, done.stdout.splitlines())}


def parts() -> dict[str, Callable[[], None]]:
    from ebm_dist import samplers

    return {
        "a run of images in bf16 and uint8": partial(
            a_run_is_trained_and_resumed,
            "digits.yaml",
            "energy={name: resnet, width: 4, multipliers: [1], num_classes: data}",
            "energy.spectral_norm=true",
            "sampler.precision=bf16",
            "learner.precision=bf16",
            "buffer.storage=uint8",
            "evaluation={every: 2, audit_every: 2, audit_steps: 4, audit_chains: 4, num_test: 8, "
            "num_samples: 8, fidelity: false, likelihood: false}",
        ),
        "a run in sync mode": partial(
            a_run_is_trained_and_resumed, "toy/contrastive.yaml", "evaluation.every=null"
        ),
        "an export": an_export_is_sampled_and_evaluated,
        **{f"learner: {path.stem}": partial(updates_and_state, path) for path in CONFIGS},
        **{
            f"learner: ZeRO-{stage} of two ranks": partial(
                updates_and_state,
                ROOT / "configs/toy/contrastive.yaml",
                f"learner={{num_ranks: 2, zero_stage: {stage}, precision: bf16, accumulation: 2}}",
                "workers.num_chains=2",
            )
            for stage in (0, 1, 2, 3)
        },
        **{
            f"sampler: {name}": partial(rounds, name)
            for name in samplers.FAMILY.members
            if name != "module"
        },
        **{f"storage: {s}": partial(rounds, "langevin", s) for s in ("bfloat16", "uint8")},
        "storage: weighted chains": partial(rounds, "langevin", jarzynski=True),
    }


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"
    # What refers to torch's own functions comes before the card.

    sys.path.insert(0, str(Path(__file__).parent))
    wanted = sys.argv[1:]
    if "--real" in wanted:
        wanted.remove("--real")
    else:
        import cuda_card

        cuda_card.insert()
        compile_as_traced()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what runs print is no part of the answer
    for name, part in parts().items():
        if wanted and not any(name.startswith(word) for word in wanted):
            continue
        error, began = None, time.process_time()
        try:
            part()
        except BaseException:
            error = traceback.format_exc()
        seconds = time.process_time() - began
        print(json.dumps({"part": name, "error": error, "cpu_s": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
