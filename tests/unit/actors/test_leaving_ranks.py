"""Learner ranks leave nodes that are about to go: with the state as it is, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import curve, run

from ebm_dist.cluster.backend import DEFAULTS, ActorOptions, Node, PartDied
from ebm_dist.cluster.inline import InlineBackend, InlineHandle
from ebm_dist.controller.learners import LearnerGroup
from ebm_dist.controller.parts import Parts, Relocation
from ebm_dist.controller.retry import MAX_STARTS
from ebm_dist.run import assembly
from ebm_dist.run.placement.gpu_shares import Shares
from ebm_dist.run.placement.placer import Placer
from ebm_dist.run.placement.plan import Plan


class Nodes:
    """Two nodes, made of one process: each rank is on one, and its node may be draining."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, room: bool = True) -> None:
        self.room = room
        self.asked = 0
        self.drain_at = 3
        """The look, one before each update, from which on the first node is draining."""
        real, kill = assembly.assemble, InlineBackend.kill

        def wired(config: Any, *args: Any) -> Parts:
            parts = real(config, *args)
            parts.relocation = Relocation(self.draining, lambda index: None, self.place)
            return parts

        def end(backend: InlineBackend, handle: InlineHandle) -> None:
            kill(backend, handle)
            if hasattr(handle.part, "close"):
                handle.part.close()  # as its process would: one engine a process

        def where(backend: InlineBackend, handle: InlineHandle) -> str | None:
            return handle.node

        def spawn(
            backend: InlineBackend,
            make: Callable[..., object],
            name: str,
            options: ActorOptions = DEFAULTS,
        ) -> InlineHandle:
            handle = create(backend, make, name, options)
            drained = self.asked >= self.drain_at
            handle.node = options.node or ("second" if drained else "first")  # as Ray chooses
            return handle

        create = InlineBackend.spawn
        monkeypatch.setattr("ebm_dist.run.train.assemble", wired)
        monkeypatch.setattr("ebm_dist.controller.draining.ranks.DRAIN_CHECK_S", 0.0)
        # `asked` counts the checks for ranks alone: those for shards depend on the time.
        monkeypatch.setattr("ebm_dist.controller.draining.shards.DRAIN_CHECK_S", math.inf)
        monkeypatch.setattr(InlineBackend, "kill", end)
        monkeypatch.setattr(InlineBackend, "where", where)
        monkeypatch.setattr(InlineBackend, "spawn", spawn)

    def draining(self) -> set[str]:
        self.asked += 1
        return {"first"} if self.asked >= self.drain_at else set()

    def place(self, held: Sequence[str | None]) -> list[str] | None:
        return ["second"] * len(held) if self.room else None


def weights(run_dir: Path) -> dict[str, Any]:
    return load_file(run_dir / "export" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert all((left[name] == right[name]).all() for name in left)


def test_a_moved_group_goes_on_bit_for_bit_with_every_update_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("run.steps=8", "tracking.log_every=1")
    run(tmp_path / "stayed", *options)
    Nodes(monkeypatch)
    _, screen = run(tmp_path / "moved", *options)
    assert "learner-0 left the node" in screen
    assert "go on from update 2" in screen
    assert screen.count("left the node") == 1
    assert_same(tmp_path / "stayed", tmp_path / "moved")
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    for name in ("loss/total", "weights/version"):
        assert curve(stayed, name) == curve(moved, name)
    assert set(curve(moved, "fault/restarts").values()) == {0.0}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_starts_that_are_hit_on_the_way_are_tried_again_from_the_same_state(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("run.steps=8", "checkpoint.every=1000", f"flow.mode={mode}")
    run(tmp_path / "stayed", *options)
    Nodes(monkeypatch)
    real, hits = LearnerGroup.load, []

    def load(self: LearnerGroup, *args: Any, **kwargs: Any) -> None:
        hits.append(None)
        if len(hits) < 4:
            raise PartDied("killed by the test")
        real(self, *args, **kwargs)

    monkeypatch.setattr(LearnerGroup, "load", load)
    result, screen = run(tmp_path / "moved", *options)
    assert result.finished
    assert len(hits) == 4
    assert "going back" not in screen
    if mode == "sync":
        assert_same(tmp_path / "stayed", tmp_path / "moved")


def test_a_group_that_never_starts_elsewhere_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes(monkeypatch)

    def load(self: LearnerGroup, *args: Any, **kwargs: Any) -> None:
        raise PartDied("killed by the test")

    monkeypatch.setattr(LearnerGroup, "load", load)
    with pytest.raises(RuntimeError, match=f"started {MAX_STARTS} times"):
        run(tmp_path / "run", "run.steps=8")


def test_without_room_elsewhere_the_ranks_stay_and_the_run_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(monkeypatch, room=False)
    result, screen = run(tmp_path / "run", "run.steps=8")
    assert result.finished
    assert nodes.asked > 4
    assert screen.count("no room for the learner ranks elsewhere") == 1
    assert "left the node" not in screen


def node(name: str, gpus: float = 0.0, *, draining: bool = False) -> Node:
    # Of four devices, so that those not free are somebody else's.
    return Node(name, draining, {"CPU": 4.0, "GPU": gpus}, {"CPU": 4.0, "GPU": 4.0})


@pytest.mark.parametrize(
    ("nodes", "held", "num_gpus", "expected"),
    [
        # Those on a node that stays keep it; the others go where the fewest are.
        ([node("a", draining=True), node("b"), node("c")], "ab", 0.0, ["c", "b"]),
        ([node("a", draining=True), node("b")], "ab", 0.0, ["b", "b"]),
        ([node("a", draining=True), node("b", draining=True)], "ab", 0.0, None),
        # What a rank claims on a node that stays is its successor's.
        ([node("a", draining=True), node("b", 0.0), node("c", 1.0)], "ab", 1.0, ["c", "b"]),
        ([node("a", draining=True), node("b", 1.0)], "ab", 1.0, ["b", "b"]),
        ([node("a", 4.0, draining=True), node("b", 0.0)], "ab", 1.0, None),
        ([node("a", draining=True), node("b", 1.0), node("c", 0.5)], "aa", 1.0, None),
    ],
)
def test_ranks_are_placed_on_nodes_that_stay_where_all_of_them_fit(
    nodes: list[Node], held: str, num_gpus: float, expected: list[str] | None
) -> None:
    plan = Plan("cuda", 1, 1, 0.5, Shares(num_gpus, num_gpus, 9, num_gpus))
    made = Placer(
        lambda: nodes, [], [], plan, cpus_per_worker=1.0, num_workers=9, num_ranks=len(held)
    )
    ranks = made.for_ranks(list(held))
    assert (ranks and [place.node for place in ranks.places]) == expected
