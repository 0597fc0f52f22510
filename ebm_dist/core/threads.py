"""How many helper threads an operation has in a thread of ours beside the one that computes."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def without_helpers() -> None:
    """Let operations of the calling thread run in it alone.

    They would get a pool of OpenMP threads of their own, for as long as this thread lives. With
    more such threads than cores libgomp lets none of them spin between two operations, those of
    the process's main work neither: waking them cost a sampler half of its time again, and a
    learner a third.
    """
    # torch sets a thread's number at its first question, so that comes first;
    # torch.set_num_threads would reach MKL's pool in every thread.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
