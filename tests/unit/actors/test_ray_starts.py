"""Who has started is noted by whichever thread waits for anything."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ebm_dist.cluster.ray_starts import RayHandle, Starts


class Ray:
    """While one thread asks whether a part has started, another notes it."""

    def __init__(self) -> None:
        self.starts: Starts | None = None

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        starts, self.starts = self.starts, None
        if starts is not None:
            starts.note()
        return refs, []

    def get(self, ref: Any, timeout: float) -> tuple[int, str, str]:
        return 7, "127.0.0.1", "node"


class Errors:
    RayError = RuntimeError


def test_two_threads_that_wait_at_once_note_a_start_once(caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray()
    starts = Starts(ray, Errors)
    handle = RayHandle(name="shard-0", actor=None)
    starts.begin(handle, object())  # type: ignore[arg-type]
    ray.starts = starts
    with caplog.at_level(logging.INFO):
        starts.note()
    assert handle.runs_on == "node"
    assert caplog.text.count("shard-0 runs as process 7") == 1
