"""The ranks are replaced together: early where a node took one along, and never used half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ebm_dist.cluster.backend import PartDied
from ebm_dist.controller.clients import LearnerClient
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.core.errors import RunFailed


class FakeRank:
    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.calls: list[str] = []

    def call(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        self.calls.append(method)
        return method if num_returns == 1 else [method] * num_returns

    aside = call


class FakeBackend:
    def __init__(self) -> None:
        self.killed: list[FakeRank] = []
        self.asked_for_port: list[int | None] = []

    def rendezvous(self, handle: FakeRank, port: int | None = None) -> tuple[str, int]:
        self.asked_for_port.append(port)
        return "127.0.0.1", port or 1

    def get(self, ref: Any, timeout: float) -> Any:
        return ref

    def alive(self, handle: FakeRank, timeout: float = 0.5) -> bool:
        return handle.alive

    def kill(self, handle: FakeRank) -> None:
        handle.alive = False
        self.killed.append(handle)


def wait(refs: Sequence[Any], timeout: float, *, each: Callable[[Any], Any] | None = None) -> None:
    """Everything here is done at once."""
    for ref in refs:
        if each is not None:
            each(ref)


def make(num_ranks: int, port: int | None = None) -> tuple[LearnerGroup, FakeBackend]:
    backend = FakeBackend()
    group = LearnerGroup(
        backend,  # type: ignore[arg-type]
        lambda rank, node: LearnerClient(FakeRank(f"learner-{rank}")),  # type: ignore[arg-type]
        num_ranks=num_ranks,
        port=port,
        start_timeout_s=1.0,
        call_timeout_s=1.0,
    )
    group.meet(wait)
    return group, backend


def test_successors_started_early_are_the_ones_that_meet() -> None:
    group, backend = make(2)
    group.renew_if_dead()
    assert not backend.killed, "nobody had died"
    before = list(group.ranks)
    before[1].handle.alive = False
    group.renew_if_dead()
    early = list(group.ranks)
    group.renew_if_dead()
    assert group.ranks == early, "they are started once"
    assert backend.killed == [rank.handle for rank in before], (
        "the others stood in a collective with the dead one"
    )
    assert group.lost()
    assert group.dead() == ["learner-1"]
    group.rebuild(wait)
    assert group.ranks == early
    assert [rank.handle.calls for rank in early] == [["start"], ["start"]]
    assert (group.restarts, group.lost()) == (1, False)


def test_successors_that_have_not_met_are_given_no_work() -> None:
    group, _ = make(2)
    group.ranks[0].handle.alive = False
    group.renew_if_dead()
    for call in (
        lambda: group.update(1, 0.1, 4, None),
        lambda: group.weights(wait),
        lambda: group.state(),
        lambda: group.load({}, None, [None], wait),
    ):
        with pytest.raises(PartDied):
            call()
    assert all(not rank.handle.calls for rank in group.ranks)
    group.rebuild(wait)
    group.state()
    assert [rank.handle.calls for rank in group.ranks] == [["start", "state"]] * 2


@pytest.mark.parametrize(("num_ranks", "asked"), [(1, None), (2, 6384)])
def test_the_pinned_port_is_for_ranks_that_meet(num_ranks: int, asked: int | None) -> None:
    assert make(num_ranks, port=6384)[1].asked_for_port == [asked]


def test_a_rank_that_dies_while_they_meet_is_not_waited_for_by_way_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, backend = make(2)
    seen: list[Any] = []

    def start(self: FakeRank, method: str, *args: Any, num_returns: int = 1) -> Any:
        return f"{self.name} {method}"

    def get(ref: Any, timeout: float) -> Any:
        seen.append(ref)
        if ref == "learner-1 start":
            group.ranks[1].handle.alive = False
            raise PartDied("its process is gone")
        return ref

    monkeypatch.setattr(FakeRank, "call", start)
    monkeypatch.setattr(backend, "get", get)

    def one_after_the_other(
        refs: Sequence[Any], timeout: float, *, each: Callable[[Any], Any] | None = None
    ) -> None:
        for ref in reversed(refs):  # the dead one's fails at once, the others' after their timeout
            if each is not None:
                each(ref)

    with pytest.raises(PartDied, match="learner-1 died while the ranks met"):
        group.meet(one_after_the_other)
    assert "learner-0 start" not in seen
    assert group.lost(), "those that are left have not met"


def test_a_rank_that_dies_beside_a_shard_while_they_meet_is_asked_to_meet_once() -> None:
    """A shard that is replaced within the wait looks for dead ranks too (seen in a soak)."""
    group, _ = make(2)
    group.ranks[1].handle.alive = False
    waits: list[int] = []

    def a_rank_and_a_shard_die(
        refs: Sequence[Any], timeout: float, *, each: Callable[[Any], Any] | None = None
    ) -> None:
        waits.append(len(refs))
        if len(waits) == 1:
            group.ranks[0].handle.alive = False
            group.renew_if_dead()
        elif not group.ranks[0].handle.alive:
            raise PartDied("its process is gone")

    with pytest.raises(PartDied):
        group.rebuild(a_rank_and_a_shard_die)
    group.rebuild(wait)
    assert [rank.handle.calls for rank in group.ranks] == [["start"]] * 2
    assert not group.lost()
    group.state()


def test_a_rank_whose_death_the_others_know_before_ray_does_is_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, backend = make(2)
    asked: list[str] = []

    def get(ref: Any, timeout: float) -> Any:
        if ref == "start":
            raise RunFailed("learner rank 0 of 2 could not join: connection reset by peer")
        return ref

    def alive(handle: FakeRank, timeout: float = 0.5) -> bool:
        asked.append(handle.name)
        return handle.name != "learner-1" or asked.count("learner-1") < 2

    monkeypatch.setattr(backend, "get", get)
    monkeypatch.setattr(backend, "alive", alive)
    with pytest.raises(PartDied, match="learner-1 died while the ranks met"):
        group.meet(wait)
