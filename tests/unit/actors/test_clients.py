"""A client's method is like the part's own of that name, or calls fail in another process."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

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


def value(hint: Any) -> Any:
    """`hint` with the value in place of each reference, and without None.

    A part answers None where there is nothing, which the client's docstring says: nobody reads it.
    """
    if get_origin(hint) is Ref:
        return value(*get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        kinds = {value(one) for one in get_args(hint)} - {type(None)}
        return kinds.pop() if len(kinds) == 1 else frozenset(kinds)
    if get_origin(hint) in (tuple, list):
        return get_origin(hint), *map(value, get_args(hint))
    return hint


@pytest.mark.parametrize(("client", "name"), METHODS)
def test_arguments_and_answer_have_the_parts_own_types(
    client: type[clients.Client], name: str
) -> None:
    ours = get_type_hints(getattr(client, name))
    theirs = get_type_hints(getattr(PARTS[client], name))
    wider = {"values"} if name == "log" else set()  # the hub takes whatever a row may hold
    for key in ours.keys() - wider:
        assert value(ours[key]) == value(theirs[key]), key


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.__name__)
def test_what_a_part_is_made_of_has_a_type(part: type) -> None:
    hints = get_type_hints(part.__init__)
    assert set(parameters(part.__init__)) - {"self"} <= hints.keys()
    assert not [key for key, hint in hints.items() if "typing.Any" in str(hint)]


@pytest.mark.parametrize(("client", "name"), METHODS)
def test_what_crosses_the_boundary_has_a_type(client: type[clients.Client], name: str) -> None:
    for owner in (client, PARTS[client]):
        hints = get_type_hints(getattr(owner, name))
        assert set(parameters(getattr(owner, name))) - {"self"} <= hints.keys()
        assert not [key for key, hint in hints.items() if "typing.Any" in str(hint)], owner


PACKAGE = Path(clients.__file__).parents[1]


def calls_by_name(path: Path) -> list[str]:
    """The calls of a handle, or of Ray's actor, that name the remote method by a literal."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and {"call", "aside"}
        & {part.attr for part in ast.walk(node.func) if isinstance(part, ast.Attribute)}
        and any(isinstance(arg, ast.Constant) and isinstance(arg.value, str) for arg in node.args)
    ]


def test_a_remote_method_is_named_as_a_string_in_the_clients_alone() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if calls_by_name(path)
    }
    assert found == {"controller/clients.py"}
