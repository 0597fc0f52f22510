"""Where learner ranks meet: at the port that the config names, or at a free one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ebm_dist.cluster.process import meeting_point
from ebm_dist.core.errors import UserError

HERE = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.create_server((HERE, 0)) as listener:
        yield listener


def test_a_port_left_out_is_a_free_one() -> None:
    host, port = meeting_point(HERE, None)
    with socket.create_server((host, port)) as listener:
        assert listener.getsockname() == (HERE, port)


def test_the_port_that_is_named_is_used(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    taken.close()
    assert meeting_point(HERE, port) == (HERE, port)


def test_a_port_that_stays_taken_is_one_line_that_names_the_key(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=rf"^learner\.port: {port} cannot be had on 127\.0\.0\.1"):
        meeting_point(HERE, port, patience_s=0.3)


def test_the_port_of_a_predecessor_that_is_just_ending_is_waited_for(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    threading.Timer(0.5, taken.close).start()
    began = time.monotonic()
    assert meeting_point(HERE, port) == (HERE, port)
    assert time.monotonic() - began >= 0.4
