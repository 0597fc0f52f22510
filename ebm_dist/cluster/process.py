"""The process that hosts a part: its threads and memory, and the port where ranks meet."""

from __future__ import annotations

import contextlib
import socket
import sys
import time

from ebm_dist.core.errors import UserError


def tune_process(num_threads: int | None) -> None:
    """Settings of a process that hosts a part: threads, and memory kept instead of returned."""
    # Not imported for it: torch takes two seconds, and a part without torch has no threads to set.
    torch = sys.modules.get("torch")
    if torch is not None and num_threads is not None:
        torch.set_num_threads(num_threads)
    # glibc gives every block past 128 KiB back to the kernel at once, and each sampler step
    # then faults its activations in again: keeping them was 1.4 times faster in eager mode.
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def meeting_point(host: str, port: int | None, *, patience_s: float = 15.0) -> tuple[str, int]:
    """(host, `port`), or with a port that nobody listens on at the moment.

    Raises:
        UserError: `port` was taken for `patience_s` seconds. The process of a predecessor may
            hold it a moment longer than Ray says.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.socket() as probe:
                # As the rendezvous itself does: connections of a predecessor may linger.
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
