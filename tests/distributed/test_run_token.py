"""A run and a cluster that disagree on the token: one line that says so, and exit code 2.

`ebm-dist doctor` finds the same, and the cluster's size where they agree.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from graph_runs import children, wait_for

pytestmark = pytest.mark.ray

CODE = "import sys; from ebm_dist.cli import main; sys.exit(main())"


def token(path: Path, digit: str) -> dict[str, str]:
    """The environment of who has the token of 64 such digits."""
    path.write_text(64 * digit)
    path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}


def environment(changes: dict[str, str]) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    return clean | {"RAY_USAGE_STATS_ENABLED": "0", **changes}


class Head:
    """A Ray on loopback whose processes have the given environment."""

    def __init__(self, temp_dir: Path, changes: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"127.0.0.1:{server.getsockname()[1]}"
        ray = str(Path(sys.executable).with_name("ray"))
        options = ["--node-ip-address=127.0.0.1", f"--port={self.address.split(':')[1]}"]
        options += ["--num-cpus=1", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
        self.process = subprocess.Popen(
            [ray, "start", "--head", "--block", *options],
            env=environment({**changes, "RAY_TMPDIR": str(temp_dir)}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self.listens, 60, "the head")

    def listens(self) -> bool:
        assert self.process.poll() is None
        host, port = self.address.split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def stop(self) -> None:
        pids = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """It wants the token of "a"."""
    # Ray's sockets must have short paths.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:
        head = Head(Path(short), token(tmp_path_factory.mktemp("guarded") / "a", "a"))
        yield head
        head.stop()


@pytest.fixture(scope="module")
def unguarded() -> Iterator[Head]:
    """It runs without a token."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:
        head = Head(Path(short), NO_TOKEN)
        yield head
        head.stop()


def train(run_dir: Path, address: str, changes: dict[str, str]) -> tuple[int, str, float]:
    """Exit code, what was said on stderr, and seconds."""
    began = time.monotonic()
    overrides = [f"runtime.address={address}", "tracking.wandb=off", "run.steps=2"]
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    done = subprocess.run(
        [sys.executable, "-c", CODE, "train", str(config), *overrides, "--run-dir", str(run_dir)],
        env=environment(changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr, time.monotonic() - began


def assert_refused(answer: tuple[int, str, float], *said: str) -> None:
    code, stderr, seconds = answer
    assert code == 2, stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("error: runtime.address: the Ray at 127.0.0.1:")
    for part in said:
        assert part in stderr
    assert "a" * 64 not in stderr
    assert "b" * 64 not in stderr
    assert seconds < 60


def test_a_cluster_that_wants_its_token_refuses_who_shows_none_or_another_at_once(
    guarded: Head, tmp_path: Path
) -> None:
    shows_none = train(tmp_path / "none", guarded.address, NO_TOKEN)
    assert_refused(shows_none, "wants its token", "shows none", "RAY_AUTH_MODE=token")
    wrong = train(tmp_path / "wrong", guarded.address, token(tmp_path / "b", "b"))
    assert_refused(wrong, "wants its token", f"the wrong one ({tmp_path / 'b'})")
    assert not (tmp_path / "none").exists(), "nothing was begun"


def test_a_cluster_without_a_token_is_not_joined_with_one(unguarded: Head, tmp_path: Path) -> None:
    shown = train(tmp_path / "shown", unguarded.address, token(tmp_path / "a", "a"))
    assert_refused(shown, "runs without a token", "RAY_AUTH_MODE=disabled", str(tmp_path / "a"))


def test_doctor_tells_a_wrong_token_and_none_from_the_right_one(
    guarded: Head, tmp_path: Path
) -> None:
    assert doctor(guarded, NO_TOKEN) == (False, "wants its token, and this process shows none")
    wrong = token(tmp_path / "b", "b")
    said = f"wants its token, and this process shows the wrong one ({tmp_path / 'b'})"
    assert doctor(guarded, wrong) == (False, said)
    assert doctor(guarded, token(tmp_path / "a", "a")) == (True, "1 nodes, 1 CPUs, 0 GPUs")


def test_doctor_tells_a_cluster_without_a_token_from_one_that_has_one(
    unguarded: Head, tmp_path: Path
) -> None:
    shown = doctor(unguarded, token(tmp_path / "a", "a"))
    said = f"runs without a token, and this process shows one ({tmp_path / 'a'})"
    assert shown == (False, said)
    assert doctor(unguarded, NO_TOKEN) == (True, "1 nodes, 1 CPUs, 0 GPUs")


def doctor(head: Head, changes: dict[str, str]) -> tuple[bool, str]:
    """Whether the finding about the cluster is ok, and what it says of it."""
    # The rest of the report, which imports DeepSpeed, is not asked for here.
    code = "from ebm_dist.run.doctor import check_ray_address as c; f = c(); print(f.ok, f.text)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment({**changes, "RAY_ADDRESS": head.address}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ok, _, text = done.stdout.strip().partition(" ")
    assert ok in ("True", "False"), done.stderr
    assert "a" * 64 not in text
    assert "b" * 64 not in text
    found = re.search(rf"{re.escape(head.address)}:? ([^;]*?)(?:;.*)?$", text)
    assert found, text
    return ok == "True", found[1].strip()
