"""The thread that reads ahead, seen from the process that it lives in."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from ebm_dist.data.prefetch import Ahead


class LargeReads:
    """A reader whose batches are large enough for torch to spread them over a pool of threads."""

    def read(self, num: int) -> tuple[Any, Any]:
        return torch.rand(num, 1 << 20).add_(1), None


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # new threads take it over
    LargeReads().read(1)  # this thread's own pool is there from now on
    yield
    torch.set_num_threads(before)


def num_threads_of_the_process() -> int:
    return len(os.listdir("/proc/self/task"))


def test_reading_ahead_adds_its_own_thread_and_no_pool_to_the_process(three_threads: None):
    before = num_threads_of_the_process()
    ahead = Ahead(cast(Any, LargeReads()), 1, 2)
    ahead.take()
    assert num_threads_of_the_process() == before + 1
    ahead.stop()


def test_any_other_thread_that_does_the_same_brings_a_pool(three_threads: None):
    # Or the test above could not fail.
    before = num_threads_of_the_process()
    done, leave = threading.Event(), threading.Event()

    def work() -> None:
        LargeReads().read(1)
        done.set()
        leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    assert num_threads_of_the_process() == before + 3
    leave.set()
    thread.join()


def test_reading_ahead_leaves_the_threads_of_its_caller_alone(three_threads: None):
    ahead = Ahead(cast(Any, LargeReads()), 1, 2)
    ahead.take()
    assert torch.get_num_threads() == 3
    ahead.stop()
