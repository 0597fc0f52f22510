"""The YAML front matter of a model card, which the Hugging Face Hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

DATASETS = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""Names under which the hub has the data, by the last part of `data.source`."""

_FENCE = "---\n"
_HEAD = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


def front_matter(name: str, config: Mapping[str, Any], quality: Mapping[str, float]) -> str:
    """The front matter of the card of the model `name`.

    Args:
        config: `data`, `energy`, `event` and `sampler`, as in config.json.
        quality: measurements of the model by name; those that are not finite are left out.
    """
    image = config["event"]["kind"] == "image"
    # The last part alone: a path of a machine says nothing to others.
    source = PurePath(str(_source(config.get("data") or {}))).name
    finite = {key: float(value) for key, value in sorted(quality.items()) if math.isfinite(value)}
    tags = ["energy-based-model", "mcmc", config["energy"]["name"], config["sampler"]["name"]]
    fields: dict[str, Any] = {"library_name": "ebm_dist", "tags": tags}
    if image:
        fields["pipeline_tag"] = "unconditional-image-generation"
    if source in DATASETS:
        fields["datasets"] = [DATASETS[source]]
    if finite:
        fields["metrics"] = list(finite)
        result = {
            "task": {"type": fields.get("pipeline_tag", "density-estimation")},
            "dataset": {"type": DATASETS.get(source, source), "name": source},
            "metrics": [{"type": key, "name": key, "value": v} for key, v in finite.items()],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return _written(fields)


def with_license(card: str, license_id: str) -> str:
    """`card`, which begins with front matter, with this licence in it."""
    head = _HEAD.match(card)
    assert head is not None
    return _written({**yaml.safe_load(head[1]), "license": license_id}) + card[head.end() :]


def has_front_matter(card: str) -> bool:
    """Whether `card` begins with front matter; cards of releases before 0.2 do not."""
    return _HEAD.match(card) is not None


def _source(data: Mapping[str, Any]) -> Any:
    if data.get("source") == "module":
        return data.get("target")
    shards = data.get("shards")
    return data.get("source") or (shards[0] if isinstance(shards, list) else shards) or "data"


def _written(fields: Mapping[str, Any]) -> str:
    return _FENCE + yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True) + _FENCE
