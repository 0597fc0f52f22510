"""A signal undoes what is half done, waits for an import to end, or asks the loop to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ebm_dist.core.signals import STOPPING, asking, interrupting


@pytest.fixture(autouse=True)
def without_nohup():
    """The tests may have been started under `nohup`, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPPING)
def test_each_signal_runs_what_undoes_a_half_done_thing(number):
    before = signal.getsignal(number)
    undone = False

    def half_done() -> None:
        nonlocal undone
        with interrupting():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                undone = True

    with pytest.raises(KeyboardInterrupt):
        half_done()
    assert undone
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_asks_to_stop_and_the_second_interrupts(number):
    stop = threading.Event()

    def loop() -> None:
        with asking(stop):
            os.kill(os.getpid(), number)
            assert stop.wait(10)
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupting():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_an_import_comes_after_it(tmp_path):
    (tmp_path / "slow_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nwhole = 1\n"
    )
    script = (
        "import sys, time; from ebm_dist.core.signals import interrupting\n"
        "try:\n"
        "    with interrupting():\n"
        "        import slow_module\n"
        "        time.sleep(10)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(0 if slow_module.whole else 1)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0
