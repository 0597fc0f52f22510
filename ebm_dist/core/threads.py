"""Disables OpenMP helper threads in our background threads."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def without_helpers() -> None:
    """Run the operations of the calling thread without OpenMP helper threads.

    Otherwise each Python thread gets its own OpenMP pool. If there are more OpenMP threads than
    cores, libgomp no longer lets any of them spin between operations, including those of the main
    thread. Waking them then made a sampler 1.5 times and a learner 1.3 times as slow.
    """
    # torch initialises a thread's number of helpers at the first query, so the query comes first.
    # torch.set_num_threads would change MKL's pool in every thread.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
