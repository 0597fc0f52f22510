"""DeepSpeed writes nothing where a run's own progress is shown."""

from __future__ import annotations

import os
import subprocess
import sys

from engine_ranks import free_port

SCRIPT = """
import sys
import torch
from ebm_dist import energies, objectives
from ebm_dist.learner.config import LearnerConfig
from ebm_dist.learner.engine import LearnerEngine
from ebm_dist.core.types import Batch

rank, ports = int(sys.argv[1]), sys.argv[2:]
for stage, port in enumerate(ports):
    energy = energies.make("mlp", event_shape=(3,), widths=(8,))
    config = LearnerConfig(zero_stage=stage, optimizer="sgd", grad_clip=1.0)
    with LearnerEngine(
        config,
        energy,
        objectives.make("score_matching"),
        rank=rank,
        world_size=2,
        master_port=int(port),
    ) as engine:
        for step in range(3):
            engine.update(Batch(torch.randn(8, 3)), None, seed=step, lr=0.1)
        engine.state()
"""


def test_deepspeed_prints_nothing_at_any_stage():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DS_", "PYTHONW"))}
    ports = [str(free_port()) for _ in range(4)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in ranks:
        stdout, stderr = process.communicate(timeout=90)
        assert process.returncode == 0, stderr
        assert stdout == ""
        assert stderr == ""
