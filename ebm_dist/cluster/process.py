"""The process that hosts a part: its threads and memory, and the port of the ranks' rendezvous."""

from __future__ import annotations

import contextlib
import socket
import sys
import time

from ebm_dist.core.errors import UserError


def tune_process(num_threads: int | None) -> None:
    """Set the number of torch threads, and keep freed memory in this process."""
    # Torch is not imported here: that takes two seconds, and some parts do not need torch.
    torch = sys.modules.get("torch")
    if torch is not None and num_threads is not None:
        torch.set_num_threads(num_threads)
    # glibc returns every freed block above 128 KiB to the kernel at once, so each sampler step
    # takes page faults for its activations. Keeping the memory was 1.4 times as fast, eager.
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def meeting_point(host: str, port: int | None, *, patience_s: float = 15.0) -> tuple[str, int]:
    """(host, `port`), or (host, a free port) if `port` is None.

    Raises:
        UserError: `port` was taken for `patience_s` seconds. The process of a predecessor may hold
            it a little longer than Ray reports.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.socket() as probe:
                # As the rendezvous does: connections of a predecessor may still be closing.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port or 0))
                return host, probe.getsockname()[1]
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"learner.port: {port} cannot be had on {host} ({error.strerror}); choose "
                    "another, or leave it out for a free one"
                ) from None
            time.sleep(0.2)
