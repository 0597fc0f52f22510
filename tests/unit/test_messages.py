"""Advice in messages can be followed: what it names exists, and what it says to set is accepted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from ebm_dist import cli
from ebm_dist.config.run_config import RunConfig, load
from ebm_dist.config.text import models_at
from ebm_dist.core.errors import UserError

PACKAGE = Path(cli.__file__).parent
NO_KEYS = {"run.log", "energy.logits", "learner.safetensors"}
OF_OTHER_PROGRAMS = {
    "--head",  # ray start
    "--porcelain",  # git
    "--shm-size",  # docker
    "--logdir",  # tensorboard
    "--sort",  # tar
    "--dereference",
    "--hard-dereference",
    "--help",  # click has it beside the options
}


def messages() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every string in the package but the docstrings."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        skip = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skip.update(map(id, node.values))
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                text = "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if id(node) not in skip:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def keys() -> dict[str, set[str]]:
    """The keys of each section, of all its members where it has several."""
    out: dict[str, set[str]] = {}
    for name in RunConfig.model_fields:
        if sections := models_at(RunConfig, [name], {}):  # `plugins` is a list of names
            out[name] = {key for section in sections for key in section.model_fields}
    return out


def options() -> set[str]:
    found: set[str] = set()

    def visit(command: click.Command) -> None:
        found.update(name for param in command.params for name in param.opts)
        for child in getattr(command, "commands", {}).values():
            visit(child)

    visit(typer.main.get_command(cli.app))
    return found


def test_every_config_key_that_a_message_names_exists() -> None:
    known = keys()
    pattern = re.compile(rf"(?<![\w./'-])({'|'.join(known)})\.([a-z_]{{2,}})\b(?![(/])")
    unknown = [
        f"{where}: {section}.{key}"
        for where, text in messages()
        for section, key in pattern.findall(text)
        if key not in known[section] and f"{section}.{key}" not in NO_KEYS
    ]
    assert not unknown


def test_every_option_that_a_message_names_exists() -> None:
    known = options() | OF_OTHER_PROGRAMS
    assert "--num" in known
    unknown = [
        f"{where}: {option}"
        for where, text in messages()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)
        if option not in known
    ]
    assert not unknown


CONFIG: dict[str, Any] = {
    "runtime": {"backend": "ray"},
    "data": {"source": "digits", "batch_size": 128},
    "energy": {"name": "mlp"},
    "sampler": {"name": "langevin", "step_size": 1.0, "noise_std": 0.1},
    "objective": {"name": "contrastive"},
    "buffer": {"capacity": 2000},
    "workers": {"num_chains": 64},
    "flow": {"mode": "async"},
}
JARZYNSKI = ("buffer.jarzynski=true", "buffer.reinit_prob=0", "buffer.init=noise")
# Each is refused with advice that names values.
FAULTS: dict[str, tuple[str, ...]] = {
    "batch of three ranks": ("learner.num_ranks=3", "workers.num_chains=1"),
    "negatives of three ranks": (
        "learner.num_ranks=2", "buffer.num_negatives=65", "workers.num_chains=1",
    ),
    "round": ("workers.num_chains=48",),
    "shards": ("buffer.num_shards=100",),
    "shard": ("buffer.capacity=63",),
    "inline ranks": ("runtime.backend=inline", "learner.num_ranks=2"),
    "band without chains": (
        "objective={name: score_matching}", "flow.min_steps_per_update=100000",
    ),
    "temperature": ("objective.temperature=0.5",),
    "wire": ("flow.stale=reweight", "learner.wire=bfloat16"),
    "warm-up": ("sampler.adapt_steps=10",),
    "recompute": ("learner.recompute_activations=true",),
    "audit": ("evaluation.audit_feedback=true",),
    "weights of re-seeded chains": (*JARZYNSKI, "evaluation.reseed_stuck=true"),
    "weights of data": ("buffer.jarzynski=true", "buffer.reinit_prob=0", "buffer.init=data"),
    "weights of restarts": ("buffer.jarzynski=true", "buffer.reinit_prob=0.1"),
    "weights in uint8": (*JARZYNSKI, "buffer.storage=bfloat16"),
    "weights in bf16": (*JARZYNSKI, "sampler.precision=bf16"),
    "weights on a short wire": (*JARZYNSKI, "learner.wire=bfloat16"),
    "weights in parts": (*JARZYNSKI, "learner.accumulation=2"),
    "weights without chains": (*JARZYNSKI, "objective={name: score_matching}"),
}  # fmt: skip


def advised(line: str) -> list[str]:
    """The overrides that the message's part after the semicolon names, each one way out."""
    key = line.partition(": ")[0]
    advice = line.partition("; ")[2]
    out = [
        f"{name}={value}"
        for name, value in re.findall(r"([a-z]+\.[a-z_]+)(?::|=| to) ?([\w.+-]*\w)", advice)
    ]
    out += [
        f"{key}={value}" for value in re.findall(r"(?:set it to|try|or) ([\d.]*\d|false)", advice)
    ]
    if "leave it out" in advice:
        out.append(f"{key}=null")
    return out


def complaints(*overrides: str) -> str:
    try:
        load(CONFIG, overrides)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FAULTS)
def test_each_way_out_that_a_refusal_names_is_one(name: str) -> None:
    first = complaints(*FAULTS[name]).partition("\n")[0]
    ways = advised(first)
    assert ways, first
    for way in ways:
        # Another fault may be left, but this one is gone.
        assert first.partition(", got")[0] not in complaints(*FAULTS[name], way), way
