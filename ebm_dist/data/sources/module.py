"""A user's own dataset, named in the config by a target or given from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import Dataset

from ebm_dist.core.errors import UserError, named
from ebm_dist.core.plugins import load_target, target_of
from ebm_dist.core.section import one_line_each
from ebm_dist.data.config import DataConfig
from ebm_dist.data.storage.indexed import Indexed
from ebm_dist.data.storage.items import Items, items_of


def open_module(config: DataConfig) -> Indexed:
    """The samples of `source: module` or `source: given`.

    Raises:
        UserError: in one line; the dataset cannot be imported or constructed, is not map-style, is
            empty, or was given in another process.
    """
    if config.source == "given":
        if config._given is None:
            raise UserError(
                f"data.source: given, so the data ({config.target}) was handed over in Python and "
                "is not in the config; call ebm_dist.train(..., data=...) again, or write it by "
                "ebm_dist.data.prepare and set data.source to the directory"
            )
        return Indexed(config, *config._given)
    assert config.target is not None
    train = _made(config.target, config.params, "data.params")
    test = None
    if config.test_params is not None:
        test = _made(config.target, config.test_params, "data.test_params")
    return Indexed(config, train, test)


def given(
    data: Dataset | Tensor | np.ndarray | tuple[Any, Any] | Mapping[str, Any],
    section: DataConfig | None = None,
) -> DataConfig:
    """A data section whose samples are `data`.

    The data is not copied, and a dump of the config does not contain it. A pickle of the config
    does: on Ray each learner rank, the evaluator, the auditor and, if chains start from data, each
    shard gets a copy. So write more than about a gigabyte as shards.

    Args:
        data: events (N, *event) as a tensor or array, a tuple (events, labels), a map-style
            dataset of events or (event, label), or {"train": ..., "test": ...} of two of these.
        section: the other keys of the section.

    Raises:
        UserError: in one line; `data` is none of these, or a key of `section` does not apply to it.
    """
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    if "train" not in parts or not parts.keys() <= {"train", "test"}:
        raise UserError(f"data: expected the keys train and test, got {', '.join(map(str, parts))}")
    named = parts["train"]
    if isinstance(named, tuple) and named:  # events and labels
        named = named[0]
    values = section.model_dump() if section is not None else {}
    values |= {"source": "given", "target": target_of(named)}
    values |= dict.fromkeys(("shards", "test_params", "fingerprint"))
    try:
        config = DataConfig.model_validate({**values, "params": {}})
    except ValidationError as error:
        raise UserError(*(f"data.{line}" for line in one_line_each(error, DataConfig))) from None
    if "test" in parts and config.holdout > 0:
        raise UserError("data.holdout: a test split is given as well; leave one of the two out")
    where = {"train": f"data: {config.target}", "test": f"data: test {config.target}"}
    train, test = (
        items_of(parts[split], where[split]) if split in parts else None
        for split in ("train", "test")
    )
    config._given = (train, test)
    Indexed(config, *config._given)  # raises for unusable samples
    return config


def _made(target: str, params: Mapping[str, Any], key: str) -> Items:
    found = load_target(target, "data.target", instances=True)
    where = f"{'data.target' if key == 'data.params' else key}: {target}"
    if not hasattr(found, "__qualname__"):  # an instance
        if params:
            raise UserError(f"{key}: {target} is an instance, which takes no parameters")
        return items_of(found, where)
    try:
        return items_of(_called(found, json.dumps(params, sort_keys=True)), where)
    except UserError:
        raise
    except Exception as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in params.items())
        raise UserError(f"{key}: {target}({arguments}) raises {named(error)}") from error


# Cached, because a dataset may take minutes to construct and the start of a run needs it often.
@lru_cache(maxsize=2)
def _called(factory: Callable[..., Any], params: str) -> Any:
    return factory(**json.loads(params))
