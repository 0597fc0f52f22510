"""Chooses a sampler, with matching sizes and rates, for a config without a sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm_dist.core.errors import UserError
from ebm_dist.core.seeds import derive_seed
from ebm_dist.data import describe, load_split
from ebm_dist.data.config import DataConfig
from ebm_dist.data.dataset import open_dataset
from ebm_dist.samplers import adapt_step_size, make

MAX_LOOKED_AT = 2**24
"""Largest amount of real data from which its scale is estimated, in numbers."""

FEW_NUMBERS = 64
"""Events of at most this size get one thread: waking a second thread takes longer than the
operations of a small network. On two busy cores a step of 128 chains in the plane took 20 ms of CPU
time with two threads, and .9 ms with one."""

NUM_CENTRES = 256
NUM_ADAPT_STEPS = 200

Recipe = dict[str, dict[str, Any]]


def with_recipe(
    config: Mapping[str, Any], data: DataConfig
) -> tuple[dict[str, Any], DataConfig, str]:
    """`config` with a sampler for the kind of the data, and matching values in other sections.

    Keys of the config are not changed. The run writes the whole recipe to config.yaml.

    Args:
        config: sections by name, without `sampler`.
        data: its data section.

    Returns:
        The sections, the data section, and a line that names the choice.
    """
    spec = describe(data)
    size = math.prod(spec.shape)
    if spec.kind == "real":
        x = load_split(data, "train", max(NUM_CENTRES, MAX_LOOKED_AT // size)).x
        recipe, said = _real(x), f"of scale {x.std():.3g}"
    elif spec.kind == "image":
        recipe, said = _image(), f"of shape {spec.shape}"
    else:
        recipe, said = _discrete(), f"of shape {spec.shape}"
    batch = data.batch_size
    negatives = _told(config, "buffer").get("num_negatives") or batch
    if isinstance(negatives, int):
        recipe["workers"] = {"num_chains": math.gcd(negatives, 1024)}
        recipe["buffer"]["capacity"] = 16 * negatives  # each chain moves every 16 updates
    if size <= FEW_NUMBERS:
        recipe["learner"]["num_threads"] = 1
        recipe["workers"] = recipe.get("workers", {}) | {"num_threads": 1}
    inline = _told(config, "runtime").get("backend") == "inline"
    # In one process a lag saves no time. On Ray, energies diverge with a lag above 1.
    recipe["flow"] = {"mode": "sync"} if inline else {"max_lag": 1}
    changes = recipe.pop("data", {})
    if _told(config, "evaluation").get("every", True) and not open_dataset(data).has("test"):
        changes["holdout"] = 0.1
    told = _told(config, "data")
    data = data.model_copy(update={k: v for k, v in changes.items() if k not in told})
    if config.get("objective") is not None:
        recipe.pop("objective", None)
    filled = dict(config)
    for name, part in recipe.items():
        if isinstance(filled.get(name), Mapping | None):  # another type is refused later
            filled[name] = part | _told(config, name)
    sampler = recipe["sampler"]
    shown = ", ".join(f"{key} {value:g}" for key, value in sampler.items() if key in _SHOWN)
    line = f"sampler left out: {sampler['name']} ({shown}) for {spec.kind} events {said}"
    return filled, data, f"{line}; config.yaml has the whole recipe"


def _told(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return dict(section) if isinstance(section, Mapping) else {}


_SHOWN = ("step_size", "noise_std", "grad_clip", "num_steps")


def _real(x: Tensor) -> Recipe:
    """Persistent chains under an exact sampler: maximum likelihood.

    No chain is restarted. On a mixture of three Gaussians with masses .51, .30 and .19, the chains
    had .65, .22 and .14 if they were restarted with probability .2, and .51, .29 and .20 if not.
    """
    return {
        "sampler": {"name": "mala", "step_size": _step_size(x), "num_steps": 20},
        # The initial noise covers the data, whatever its mean.
        "buffer": {"init_std": _short(x.square().mean().sqrt()), "reinit_prob": 0.0},
        "learner": {"lr": 2e-3, "schedule": "cosine", "ema_decay": 0.98, "grad_clip": 1.0},
    }


def _image() -> Recipe:
    """Short clipped Langevin rounds with little noise (Du & Mordatch 2019)."""
    return {
        "sampler": {
            "name": "langevin",
            "step_size": 10.0,
            "noise_std": 0.01,
            "grad_clip": 0.03,
            "num_steps": 20,
            "clamp": [-1.0, 1.0],
        },
        "objective": {"name": "contrastive", "energy_l2": 0.1},
        "buffer": {"reinit_prob": 0.05},
        "learner": {
            "lr": 4e-4,
            "schedule": "cosine",
            "warmup_steps": 50,
            "betas": [0.0, 0.999],
            "ema_decay": 0.99,
            "grad_clip": 1.0,
        },
        "data": {"noise_std": 0.03},
    }


def _discrete() -> Recipe:
    """Persistent chains that change the sites which the gradient suggests.

    On two noisy patterns of 8 bits, a small network was .03 nats from the data's law after 400
    updates at this learning rate, and 1.0 nats at a fifth of it.
    """
    return {
        "sampler": {"name": "gibbs_with_gradients", "num_steps": 40},
        "buffer": {"reinit_prob": 0.05},
        "learner": {"lr": 5e-3, "schedule": "cosine", "ema_decay": 0.98, "grad_clip": 1.0},
    }


def _step_size(x: Tensor) -> float:
    """The step size at which MALA has its target acceptance on the density of the data x.

    Not adapted to the initial weights, as `sampler.adapt_steps` does: their energy is flat and
    accepts any step. With such a step, 4% of the moves were accepted 50 updates later.
    """
    centres = x[:NUM_CENTRES].flatten(1)
    num, dim = centres.shape
    variance = float(centres.var(0, correction=0).mean())
    if variance == 0:
        raise UserError("data: all events looked at are the same; a density needs them to differ")
    # A kernel density estimate with Scott's bandwidth.
    width = variance * num ** (-2 / (dim + 4))
    norm = centres.square().sum(1)

    def energy(y: Tensor) -> Tensor:
        distance = y.square().sum(1, keepdim=True) - 2 * y @ centres.T + norm
        return -torch.logsumexp(-distance / (2 * width), 1)

    kernel = make("mala", step_size=0.05 * variance)
    generator = torch.Generator().manual_seed(derive_seed(0, "recipe"))
    return _short(adapt_step_size(kernel, centres, energy, NUM_ADAPT_STEPS, generator).step_size)  # type: ignore[attr-defined]


def _short(value: Any) -> float:
    """`value` to two digits, since further ones differ between machines and a resume compares
    them."""
    return float(f"{float(value):.2g}")
