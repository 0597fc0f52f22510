"""The thread that reads ahead, seen from the process that it lives in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from ebm_dist.data.stream.prefetch import Ahead


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


class CountedReads:
    """Batches 0, 1, … and how many were read."""

    def __init__(self) -> None:
        self.num = 0

    def read(self, num: int) -> tuple[Any, Any]:
        self.num += 1
        return self.num - 1, None


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 9])
def test_it_reads_up_to_its_depth_once_a_third_is_left_and_not_before(depth: int):
    reader = CountedReads()
    ahead = Ahead(cast(Any, reader), 1, depth)
    few = min(depth - 1, max(1, depth // 3))
    taken = 0
    for _ in range(3):
        wait_until(lambda taken=taken: reader.num - taken == depth)
        for left in range(depth - 1, few - 1, -1):
            read = reader.num
            time.sleep(0.02)
            assert reader.num == read, "nothing is read while more than a third is there"
            assert ahead.take()[0] == taken
            taken += 1
            assert reader.num - taken == left or left == few
    wait_until(lambda: reader.num - taken == depth)
    ahead.stop()


def test_a_reader_faster_or_slower_than_its_taker_never_leaves_it_waiting_for_ever():
    for pause in (0.0, 0.0002):
        ahead = Ahead(cast(Any, CountedReads()), 1, 4)
        for index in range(2000):
            assert ahead.take()[0] == index
            if pause and index % 7 == 0:
                time.sleep(pause)
        ahead.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
