"""The launch scripts do what they say, with stand-ins for ray, srun and the training command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "launch"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the launch scripts are for Linux"
)

STUBBORN = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: (asked.append(1), signal.signal(15, signal.SIG_DFL)))
pathlib.Path(sys.argv[1]).touch()
while not asked:
    time.sleep(0.02)
time.sleep(0.3)
pathlib.Path(sys.argv[1] + ".saved").touch()
sys.exit(75)
"""
"""Stands in for training: the first SIGTERM asks for a checkpoint, a second one kills."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "bin").mkdir()
    # Short, for Ray's sockets; by this name for `environment`.
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        Path(short).chmod(0o1777)
        (tmp_path / "short").symlink_to(short)
        yield tmp_path


def environment(home: Path, **extra: str) -> dict[str, str]:
    base = {"HOME": str(home), "PATH": f"{home / 'bin'}:/usr/bin:/bin", "TMPDIR": str(home)}
    base["RAY_TMPDIR"] = os.readlink(home / "short")
    return base | {"EBM_DIST_STATE": str(home / "state")} | extra


def stand_in(home: Path, name: str, body: str) -> None:
    path = home / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def run(home: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / command[0]), *command[1:]],
        env=environment(home, **extra),
        capture_output=True,
        text=True,
        timeout=30,
    )


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def write_token(home: Path, mode: int = 0o600) -> None:
    (home / ".ray").mkdir(exist_ok=True)
    token = home / ".ray" / "auth_token"
    token.write_text("0" * 64)
    token.chmod(mode)


RAY = """
printf '%s\\n' "$*" >>"$HOME/ray.calls"
env | grep -E '^RAY_' | sort >"$HOME/ray.env"
[[ $1 == start ]] || exit 0
echo 'Ray runtime started.'
exec sleep 60
"""


def test_head_binds_loopback_and_makes_a_private_token(home: Path) -> None:
    stand_in(home, "ray", RAY)
    done = run(home, "local.sh", "start", "--num-cpus=1")
    assert done.returncode == 0, done.stderr
    call = (home / "ray.calls").read_text()
    assert "--node-ip-address=127.0.0.1" in call
    assert "--dashboard-host=127.0.0.1" in call
    assert "--num-cpus=1" in call
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    env = (home / "ray.env").read_text()
    assert "RAY_AUTH_MODE=token" in env
    assert "RAY_health_check_failure_threshold=18" in env
    assert token.read_text() not in done.stdout + done.stderr + call + env
    assert "RAY_worker_niceness=0" in env
    private = Path(os.readlink(home / "short")) / f"ebm_dist-{os.getuid()}"
    assert f"--temp-dir={private}/ray " in call
    shared = os.statvfs("/dev/shm")
    assert f"--object-store-memory={shared.f_blocks * shared.f_frsize // 2} " in call
    assert private.stat().st_mode & 0o777 == 0o700
    pid = int((home / "state" / "ray.pid").read_text().split()[0])
    assert run(home, "local.sh", "start").returncode == 2
    assert run(home, "local.sh", "stop").returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    # `ray stop` would have ended every Ray of this user.
    assert "stop" not in (home / "ray.calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "extra", "mode", "said"),
    [
        (("start", "--host", "192.0.2.1"), {}, None, "no token"),
        (("start", "--host=192.0.2.1"), {"RAY_AUTH_MODE": "disabled"}, 0o600, "RAY_AUTH_MODE"),
        (("start", "--host", "192.0.2.1"), {}, 0o644, "others may read it"),
        (("start",), {"RAY_AUTH_MODE": "disabled"}, 0o600, "RAY_AUTH_MODE"),
        (("join", "192.0.2.1", "--host", "192.0.2.2"), {}, None, "no token"),
        (("join", "192.0.2.1"), {}, 0o600, "--host"),
        (("join",), {}, 0o600, "HEAD[:PORT]"),
    ],
)
def test_ray_is_not_started_unsafely(
    home: Path, arguments: tuple[str, ...], extra: dict[str, str], mode: int | None, said: str
) -> None:
    stand_in(home, "ray", RAY)
    if mode is not None:
        write_token(home, mode)
    done = run(home, "local.sh", *arguments, **extra)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (home / "ray.calls").exists()


def test_a_ray_that_does_not_start_is_said_and_leaves_nothing(home: Path) -> None:
    stand_in(home, "ray", "echo 'port 6379 is taken' >&2; exit 1")
    done = run(home, "local.sh", "start")
    assert done.returncode == 2
    assert "port 6379 is taken" in done.stderr
    assert not (home / "state" / "ray.pid").exists()


def test_train_joins_the_ray_that_was_started(home: Path) -> None:
    stand_in(home, "ray", RAY)
    stand_in(home, "ebm-dist", 'printf "%s %s" "$RAY_ADDRESS" "$*"')
    assert run(home, "local.sh", "train", "configs/digits.yaml").returncode == 2
    assert run(home, "local.sh", "start").returncode == 0
    done = run(home, "local.sh", "train", "configs/digits.yaml", "learner.lr=1e-4")
    run(home, "local.sh", "stop")
    assert done.stdout == "127.0.0.1:6379 train configs/digits.yaml learner.lr=1e-4"


def test_submission_uploads_the_config_alone_and_resumes(home: Path) -> None:
    write_token(home)
    body = '[[ $2 == status ]] && exit; printf "%s\\n" "$@" >"$HOME/ray.calls"\n'
    body += 'ls -A "${6}" >"$HOME/uploaded"'
    stand_in(home, "ray", body)
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(home, "submit.sh", "--run-dir", "/runs/digits", config, "run.seed=1")
    assert done.returncode == 0, done.stderr
    call = (home / "ray.calls").read_text().split("\n")
    assert call[:4] == ["job", "submit", "--address", "http://127.0.0.1:8265"]
    start = call.index("--")
    assert call[start + 1 : -1] == (
        [
            "ebm-dist",
            "train",
            "config.yaml",
            "run.seed=1",
            "--run-dir",
            "/runs/digits",
            "--resume",
            "auto",
        ]
    )
    assert (home / "uploaded").read_text() == "config.yaml\n"
    assert not Path(call[5]).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run-dir", "runs/x", "CONFIG"], "absolute path"),
        (["CONFIG"], "absolute path"),
        (["--run-dir", "/runs/x"], "expected CONFIG"),
        (["--run-dir", "/runs/x", "absent.yaml"], "no such file"),
        (["--run-dir", "/runs/x", "--adress", "x", "CONFIG"], "--adress"),
        (["--run-dir", "/runs/x", "--address", "http://192.0.2.1:8265", "CONFIG"], "in the clear"),
        (["--run-dir", "/runs/x", "--address", "192.0.2.1:8265", "CONFIG"], "https://HOST:PORT"),
    ],
)
def test_a_wrong_submission_is_refused_in_one_line(
    home: Path, arguments: list[str], said: str
) -> None:
    write_token(home)
    stand_in(home, "ray", 'touch "$HOME/called"')
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(home, "submit.sh", *[config if a == "CONFIG" else a for a in arguments])
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (home / "called").exists()


@pytest.mark.parametrize(
    ("submitted", "status", "code"),
    [
        (0, "Job '$NAME' succeeded", 0),
        (0, "Job '$NAME' was stopped", 75),
        (1, "Status message: Job entrypoint command failed with exit code 75, last logs", 75),
        (1, "Status message: Job entrypoint command failed with exit code 2, last logs", 2),
        (1, "Status message: Job entrypoint command failed with exit code 1, last logs", 1),
        (1, "Status message: Job supervisor actor died", 1),
    ],
)
def test_a_submission_exits_as_the_run_does(
    home: Path, submitted: int, status: str, code: int
) -> None:
    write_token(home)
    stand_in(
        home,
        "ray",
        f'[[ $2 == submit ]] && exit {submitted}\nNAME=${{@: -1}}; echo "{status}"',
    )
    config = str(ROOT / "configs" / "digits.yaml")
    assert run(home, "submit.sh", "--run-dir", "/runs/x", config).returncode == code
    without = run(home, "submit.sh", "--run-dir", "/runs/x", "--no-wait", config)
    assert without.returncode == submitted


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("ray.exceptions.AuthenticationError: Invalid authentication token", "another token"),
        ("ConnectionError: Failed to connect to Ray at address: http://x", "no dashboard answers"),
        ("Job with submission_id mine already exists.", "--submission-id: "),
    ],
)
def test_what_ray_tells_by_a_traceback_is_one_line(home: Path, stderr: str, said: str) -> None:
    write_token(home)
    body = f'echo "Traceback (most recent call last):" >&2; echo "{stderr}" >&2; exit 1'
    stand_in(home, "ray", body)
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(home, "submit.sh", "--run-dir", "/runs/x", "--submission-id", "mine", config)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_job_out_of_sight_is_said_to_go_on_perhaps(home: Path) -> None:
    write_token(home)
    stand_in(home, "ray", "exit 1")
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(home, "submit.sh", "--run-dir", "/runs/x", "--submission-id", "mine", config)
    assert done.returncode == 1
    assert "may go on" in done.stderr
    assert "ray job logs -f mine" in done.stderr


def test_submission_without_a_token_is_refused(home: Path) -> None:
    stand_in(home, "ray", 'touch "$HOME/called"')
    config = str(ROOT / "configs" / "digits.yaml")
    done = run(home, "submit.sh", "--run-dir", "/runs/x", config)
    assert done.returncode == 2
    assert "no token" in done.stderr
    assert not (home / "called").exists()


@pytest.mark.parametrize("code", [0, 1, 7])
def test_driver_exits_as_its_command_does(home: Path, code: int) -> None:
    assert run(home, "driver.sh", "bash", "-c", f"exit {code}").returncode == code


def test_drained_driver_is_left_to_finish_and_asks_to_be_tried_again(home: Path) -> None:
    mark = home / "started"
    driver = subprocess.Popen(
        [str(LAUNCH / "driver.sh"), sys.executable, "-c", STUBBORN, str(mark)],
        env=environment(home),
    )
    eventually(mark.exists)
    drains = [
        subprocess.Popen([str(LAUNCH / "drain.sh"), "20"], env=environment(home)) for _ in range(2)
    ]
    assert [drain.wait(20) for drain in drains] == [0, 0]
    assert driver.wait(20) == 75
    assert Path(f"{mark}.saved").exists()
    assert not any((home / f"ebm_dist-drivers-{os.getuid()}").iterdir())


def test_signal_to_all_processes_of_a_job_reaches_the_command_once(home: Path) -> None:
    # What `ray job stop` does.
    mark = home / "started"
    driver = subprocess.Popen(
        [str(LAUNCH / "driver.sh"), sys.executable, "-c", STUBBORN, str(mark)],
        env=environment(home),
        start_new_session=True,
    )
    eventually(mark.exists)
    os.killpg(driver.pid, signal.SIGTERM)
    assert driver.wait(20) == 75
    assert Path(f"{mark}.saved").exists()


def test_drain_gives_up_in_time(home: Path) -> None:
    mark = home / "started"
    endless = f"trap : TERM; touch {mark}; while :; do sleep 0.1; done"
    driver = subprocess.Popen(
        [str(LAUNCH / "driver.sh"), "bash", "-c", endless],
        env=environment(home),
        start_new_session=True,
    )
    eventually(mark.exists)
    began = time.monotonic()
    done = run(home, "drain.sh", "1")
    assert done.returncode == 1
    assert "still runs" in done.stderr
    assert time.monotonic() - began < 5
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(10)


def foreign(home: Path) -> Path:
    """A directory of drivers as another user would make it, for all to enter."""
    made = home / f"ebm_dist-drivers-{os.getuid()}"
    made.mkdir()
    made.chmod(0o777)
    return made


def test_a_directory_of_drivers_that_somebody_else_may_have_made_is_not_trusted(home: Path) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    named = foreign(home)
    for _ in range(2):
        done = run(home, "drain.sh", "1")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {named}: expected a directory of this user")
        assert len(done.stderr.splitlines()) == 1
        mark = home / "ran"
        done = run(home, "driver.sh", "touch", str(mark))
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {named}: ")
        assert not mark.exists()
        named.rmdir() if named.is_dir() and not named.is_symlink() else named.unlink()
        named.symlink_to(elsewhere)


@pytest.mark.parametrize("text", ["-1", "0", "1", "{pid}", "{pid} 1", "-{pid} {birth}", "x", ""])
def test_only_a_process_that_is_what_it_was_is_signalled(home: Path, text: str) -> None:
    other = subprocess.Popen(["sleep", "60"])
    birth = Path(f"/proc/{other.pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
    mine = home / f"ebm_dist-drivers-{os.getuid()}" / "x"
    mine.mkdir(parents=True)
    mine.parent.chmod(0o700)
    (mine / "pid").write_text(text.format(pid=other.pid, birth=birth) + "\n")
    calls = 'kill() { printf \'%s\\n\' "$*" >>"$HOME/kills"; }; export -f kill; '
    done = subprocess.run(
        ["bash", "-c", f"{calls}{LAUNCH / 'drain.sh'} 5"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (home / "kills").exists()
    other.kill()
    other.wait(10)


def test_stop_leaves_a_process_that_got_the_number_of_a_ray_before_a_restart(home: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    (home / "state").mkdir()
    (home / "state" / "ray.pid").write_text(f"{other.pid} 1\n")
    assert run(home, "local.sh", "stop").returncode == 0
    assert other.poll() is None
    other.kill()
    other.wait(10)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.255.1.9", True),
        ("localhost", True),
        ("::1", True),
        ("127.0.0.1.evil.example", False),
        ("127.evil.example", False),
        ("127.0.0.256", False),
        ("127.0.0", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, alone: bool) -> None:
    script = f"source {LAUNCH / 'common.sh'}; is_loopback {host}"
    assert (subprocess.run(["bash", "-c", script]).returncode == 0) == alone


def test_a_ray_keeps_its_sockets_where_nobody_else_can_enter_or_does_not_start(home: Path) -> None:
    stand_in(home, "ray", RAY)
    root = Path(os.readlink(home / "short"))
    private = root / f"ebm_dist-{os.getuid()}"
    private.mkdir()
    private.chmod(0o777)
    done = run(home, "local.sh", "start")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {private}: expected a directory of this user")
    long = root / ("x" * 60)
    long.mkdir()
    done = run(home, "local.sh", "start", RAY_TMPDIR=str(long))
    assert done.returncode == 2
    assert "set RAY_TMPDIR to a shorter directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (home / "ray.calls").exists()
    root.chmod(0o700)
    assert run(home, "local.sh", "start").returncode == 0
    run(home, "local.sh", "stop")
    assert f"--temp-dir={root}/ray " in (home / "ray.calls").read_text()


SRUN = """
while [[ $1 == --* ]]; do shift; done
printf '%s\\n' "$@" >"$HOME/srun.calls"
stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$HOME/token.mode"
while [[ $1 != -- ]]; do shift; done
shift
exec "$@"
"""


def slurm(home: Path, **extra: str) -> dict[str, str]:
    stand_in(home, "srun", SRUN)
    stand_in(home, "ray", ":")
    stand_in(home, "scontrol", 'echo "$*" >>"$HOME/scontrol.calls"; echo localhost')
    return environment(
        home,
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="42",
        SLURM_JOB_NUM_NODES="1",
        SLURM_CPUS_ON_NODE="2",
        SLURM_JOB_NODELIST="node-1",
        EBM_DIST_HEAD="127.0.0.1",
        **extra,
    )


def test_slurm_job_trains_through_symmetric_run_and_leaves_no_token(home: Path) -> None:
    env = slurm(home)
    stand_in(home, "ebm-dist", 'printf "%s|%s\\n" "$RAY_ADDRESS" "$*"; exit 3')
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm" / "train.sbatch"), "configs/digits.yaml", "run.seed=1"],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == (
        "127.0.0.1:6379|train --resume auto configs/digits.yaml learner.port=6384 run.seed=1\n"
    )
    assert done.returncode == 3
    call = (home / "srun.calls").read_text().split()
    assert call[:6] == ["ray", "symmetric-run", "--address", "127.0.0.1:6379", "--min-nodes", "1"]
    assert "--min-worker-port=10100" in call
    assert any(option.startswith("--object-store-memory=") for option in call)
    assert (home / "token.mode").read_text() == "600\n"
    assert not (home / ".ray" / "ebm_dist-42").exists()


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_signal_writes_a_checkpoint_before_the_job_is_given_up(
    home: Path, number: signal.Signals, requeued: bool
) -> None:
    env = slurm(home)
    mark = home / "started"
    (home / "train.py").write_text(STUBBORN)
    stand_in(home, "ebm-dist", f'exec {sys.executable} "$HOME/train.py" {mark}')
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm" / "train.sbatch"), "configs/digits.yaml"], env=env
    )
    eventually(mark.exists)
    job.send_signal(number)
    assert job.wait(20) == 75
    assert Path(f"{mark}.saved").exists()
    calls = home / "scontrol.calls"
    assert (calls.exists() and "requeue 42" in calls.read_text()) == requeued


def test_slurm_job_whose_ray_did_not_start_fails(home: Path) -> None:
    env = slurm(home)
    stand_in(home, "srun", "exit 0")  # what `ray symmetric-run` makes of it
    stand_in(home, "ebm-dist", ":")
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm" / "train.sbatch"), "configs/digits.yaml"],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "no training ran" in done.stderr


def test_slurm_refuses_a_head_that_other_nodes_cannot_reach(home: Path) -> None:
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm" / "train.sbatch"), "configs/digits.yaml"],
        env=slurm(home) | {"SLURM_JOB_NUM_NODES": "2"} | {"PATH": f"{home}/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    # Without ebm-dist on PATH that is said first; with it, the address.
    stand_in(home, "ebm-dist", ":")
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm" / "train.sbatch"), "configs/digits.yaml"],
        env=slurm(home) | {"SLURM_JOB_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "EBM_DIST_INTERFACE" in done.stderr
    assert not (home / "srun.calls").exists()
