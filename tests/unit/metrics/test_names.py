"""Every metric has a name that somebody wrote down."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import ebm_dist
import ebm_dist.samplers
from ebm_dist.metrics import names

PROMISED = {
    "energy/positive",
    "energy/negative",
    "energy/gap",
    "loss/total",
    "sampler/temperature",
    "sampler/acceptance",
    "sampler/grad_norm",
    "chain/autocorrelation",
    "chain/ess",
    "chain/rhat",
    "chain/self_transition",
    "chain/age_mean",
    "buffer/free",
    "buffer/leased",
    "buffer/ready",
    "buffer/capacity",
    "buffer/late_checkins",
    "buffer/expired_leases",
    "flow/lag_mean",
    "flow/lag_max",
    "flow/repaired",
    "flow/dropped",
    "flow/ess_ratio",
    "flow/mcmc_steps_per_update",
    "weights/version",
    "throughput/updates_per_s",
    "throughput/mcmc_steps_per_s",
    "wait/learner",
    "wait/worker",
    "likelihood/log_z",
    "likelihood/log_prob",
    "learner/param_grad_norm",
    "fault/restarts",
}


def test_the_promised_names_are_exactly_those_marked_so() -> None:
    assert sorted(PROMISED) == sorted(n for n, metric in names.METRICS.items() if metric.promised)


def test_names_that_are_not_metrics_are_unknown() -> None:
    assert names.unknown(["step", "epoch", "energy/gap", "energy/gpa"]) == ["energy/gpa"]


def test_a_metric_of_each_class_is_known_by_its_number() -> None:
    (entry,) = [name for name in names.METRICS if name.endswith(names.OF_EACH_CLASS)]
    of_ten = [entry.removesuffix("K") + str(number) for number in range(11)]
    assert {names.describe(name) for name in of_ten} == {names.METRICS[entry]}
    assert names.names_of_classes(entry, [*reversed(of_ten), "energy/gap"]) == of_ten
    assert names.describe("energy/gap_3") is names.describe(of_ten[0] + "x") is None


def test_every_metric_says_what_it_means() -> None:
    for name, metric in {**names.METRICS, **names.HISTOGRAMS, **names.IMAGES}.items():
        assert len(metric.meaning) > 8, name
        assert metric.unit, name


# What the running graph logs. `ebm-dist evaluate` writes reports of its own, with other keys.
LOGGED_BY = (
    *("actors", "buffer", "controller", "jarzynski", "learner", "objectives", "run"),
    "evaluation/audit.py",
)


def test_every_metric_that_the_code_writes_out_is_known() -> None:
    prefixes = {name.split("/")[0] for name in names.METRICS}
    literal = re.compile(r"""["']((?:%s)/[a-z_0-9]+)["']""" % "|".join(sorted(prefixes)))  # noqa: UP031
    known = {**names.METRICS, **names.HISTOGRAMS, **names.IMAGES}
    found = {}
    root = Path(ebm_dist.__file__).parent
    for path in root.rglob("*.py"):
        if not str(path.relative_to(root)).startswith(LOGGED_BY):
            continue
        for name in literal.findall(path.read_text()):
            found.setdefault(name, path.name)
    assert len(found) > 25
    unknown = {name: file for name, file in found.items() if name not in known}
    assert unknown == {}, f"add to metrics/names.py: {unknown}"


def test_every_name_that_is_declared_is_logged() -> None:
    infos = {
        f"sampler/{field.name}"
        for module in pkgutil.walk_packages(ebm_dist.samplers.__path__, "ebm_dist.samplers.")
        for kind in vars(importlib.import_module(module.name)).values()
        if isinstance(kind, type) and kind.__name__.endswith("Info")
        for field in dataclasses.fields(kind)
    }
    root = Path(ebm_dist.__file__).parent
    sources = [
        path.read_text()
        for path in root.rglob("*.py")
        if path.name != "names.py" and "report" not in path.relative_to(root).parts
    ]
    for name in {**names.METRICS, **names.HISTOGRAMS, **names.IMAGES}:
        prefix, _, rest = name.partition("/")
        spelt = any(f'"{name}"' in source for source in sources)
        joined = any(f'f"{prefix}/{{' in text and f'"{rest}"' in text for text in sources)
        # Distances to other things than samples are named where they are measured.
        key = f'f"{rest[:-1]}{{' if rest.endswith(names.OF_EACH_CLASS) else f'"{rest}": '
        elsewhere = prefix == "fidelity" and any(key in text for text in sources)
        assert spelt or joined or elsewhere or name in infos, f"nothing logs {name}"


def test_every_field_of_a_samplers_info_is_a_metric() -> None:
    fields = {}
    for module in pkgutil.walk_packages(ebm_dist.samplers.__path__, "ebm_dist.samplers."):
        loaded = importlib.import_module(module.name)
        for kind in vars(loaded).values():
            if isinstance(kind, type) and kind.__name__.endswith("Info"):
                for field in dataclasses.fields(kind):
                    fields[f"sampler/{field.name}"] = kind.__name__
    assert "sampler/grad_norm" in fields
    assert names.unknown(fields) == []
