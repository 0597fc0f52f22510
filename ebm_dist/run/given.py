"""Builds the RunConfig from the arguments of `train`: a config, and objects given from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

import ebm_dist.data
import ebm_dist.energies
from ebm_dist.config.checks import check
from ebm_dist.config.run_config import RunConfig, load
from ebm_dist.config.text import validate
from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import import_plugins
from ebm_dist.core.section import Section
from ebm_dist.data.config import DataConfig
from ebm_dist.run.recipe import with_recipe


class _DataPart(Section):
    """The data section, which is needed to fill in the others."""

    data: DataConfig = DataConfig()


def config_of(
    config: RunConfig | Mapping[str, Any] | str | Path | None,
    energy: nn.Module | Callable[..., Any] | None,
    data: Dataset | Tensor | np.ndarray | None,
) -> tuple[RunConfig, str | None]:
    """The config of a run, and a line about the sampler if one was chosen for it.

    Raises:
        UserError: the config is invalid, or an object cannot be used.
    """
    said, parts = None, {}
    if energy is not None:
        try:
            parts["energy"] = ebm_dist.energies.given(energy)
        except ValueError as error:
            raise UserError(str(error)) from None
    if isinstance(config, Mapping | None):
        sections = dict(config or {})
        if energy is not None or data is not None:
            sections.setdefault("runtime", {"backend": "inline"})
        section = validate(_DataPart, {"data": sections.get("data") or {}}).data
        if data is not None:
            section = ebm_dist.data.given(data, section)
        if "sampler" not in sections:
            sections, section, said = with_recipe(sections, section)
        parts["data"] = section
        dumps = {name: part.model_dump(mode="json") for name, part in parts.items()}
        config = load(sections | dumps, trusted=True)
    elif isinstance(config, RunConfig):
        import_plugins(config.plugins, directory=config.runtime.working_dir)
    else:
        dumps = {name: part.model_dump(mode="json") for name, part in parts.items()}
        instead = [f"{name}={json.dumps(dump)}" for name, dump in dumps.items()]
        config = load(config, instead, trusted=True)
    if data is not None and "data" not in parts:
        parts["data"] = ebm_dist.data.given(data, config.data)
    if not parts:
        return config, None
    config = config.model_copy(update=parts)
    if problems := list(check(config)):
        raise UserError(*problems)
    return config, said


def is_given(config: RunConfig) -> bool:
    """Whether the config has objects given from Python, which a dump does not contain."""
    return any(getattr(part, "_given", None) is not None for part in (config.energy, config.data))
