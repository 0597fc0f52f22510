"""A client's method is like the part's own of that name, or calls fail in another process."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from ebm_dist.actors.auditor import Auditor
from ebm_dist.actors.evaluator import Evaluator
from ebm_dist.actors.learner_rank import LearnerRank
from ebm_dist.actors.worker import Worker
from ebm_dist.buffer.shard import Shard
from ebm_dist.cluster.backend import Ref
from ebm_dist.controller import clients
from ebm_dist.metrics.hub import MetricHub

PARTS: dict[type[clients.Client], type] = {
    clients.ShardClient: Shard,
    clients.WorkerClient: Worker,
    clients.LearnerClient: LearnerRank,
    clients.HubClient: MetricHub,
    clients.EvaluatorClient: Evaluator,
    clients.AuditorClient: Auditor,
}
METHODS = [
    pytest.param(client, name, id=f"{client.__name__}.{name}")
    for client in PARTS
    for name in vars(client)
    if not name.startswith("_")
]


class Recorder:
    """A handle that keeps the call, and answers with as many references as are asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], int]] = []

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        self.calls.append((method, args, num_returns))
        return Ref() if num_returns == 1 else [Ref() for _ in range(num_returns)]

    aside = call


def call(client: type[clients.Client], name: str) -> tuple[str, tuple[Any, ...], int]:
    """What the client's method sends, given a value for each of its arguments."""
    handle = Recorder()
    method = getattr(client(handle), name)  # type: ignore[arg-type]
    given = [["a", "b"] if "ids" in parameter else parameter for parameter in parameters(method)]
    method(*given)
    ((sent, args, num_returns),) = handle.calls
    return sent, args, num_returns


def parameters(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)


@pytest.mark.parametrize(("client", "name"), METHODS)
def test_a_call_fits_the_method_of_that_name_in_the_part(
    client: type[clients.Client], name: str
) -> None:
    sent, args, num_returns = call(client, name)
    assert sent == name
    real = inspect.signature(getattr(PARTS[client], name))
    real.bind(None, *args)
    assert list(real.parameters)[1 : 1 + len(args)] == parameters(getattr(client(None), name))  # type: ignore[arg-type]
    answer = get_type_hints(getattr(PARTS[client], name))["return"]
    # References of a list are as many as its entries, which the caller knows.
    if get_origin(answer) is not list:
        assert num_returns == (len(get_args(answer)) if get_origin(answer) is tuple else 1)


@pytest.mark.parametrize(("client", "name"), METHODS)
def test_what_crosses_the_boundary_has_a_type(client: type[clients.Client], name: str) -> None:
    for owner in (client, PARTS[client]):
        hints = get_type_hints(getattr(owner, name))
        assert set(parameters(getattr(owner, name))) - {"self"} <= hints.keys()
        assert not [key for key, hint in hints.items() if "typing.Any" in str(hint)], owner
