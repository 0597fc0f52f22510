"""`ebm-dist doctor`: every finding is ok or says what to do, and no secret is shown."""

from __future__ import annotations

import socket
from collections import namedtuple

import pytest

from ebm_dist.run import doctor

Usage = namedtuple("Usage", "total used free")


def test_a_full_shared_memory_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64, 64, 0))
    finding = doctor.check_shared_memory("/tmp")
    assert not finding.ok
    assert "--shm-size" in finding.todo


def test_a_full_disk_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64, 64, 2**20))
    finding = doctor.check_disk(tmp_path / "not" / "yet")
    assert not finding.ok
    assert "run.dir" in finding.todo


def test_an_address_that_does_not_answer_is_a_finding(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    finding = doctor.check_ray_address()
    assert not finding.ok
    assert str(port) in finding.text
    assert "RAY_ADDRESS" in finding.todo


def test_ray_client_is_a_finding_that_says_what_to_do_instead(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    finding = doctor.check_ray_address()
    assert not finding.ok
    assert finding.text.startswith("RAY_ADDRESS: ray://127.0.0.1:10001 is Ray Client")
    assert "launch/submit.sh" in finding.text


def test_the_wandb_key_is_found_and_never_shown(monkeypatch, tmp_path):
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "offline" in doctor.check_wandb().text
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    (tmp_path / "netrc").chmod(0o600)
    in_file = doctor.check_wandb()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", key)
    in_environment = doctor.check_wandb()
    for finding in (in_file, in_environment):
        assert "online" in finding.text
        assert key not in finding.text + finding.todo


def test_a_missing_package_names_the_command_that_installs_it():
    finding = doctor.check_package("no-such-package-here", "train")
    assert not finding.ok
    assert finding.todo.startswith("pip install 'ray>=")


def test_a_port_in_use_is_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor, "RAY_PORTS", {server.getsockname()[1]: "Ray head"})
        finding = doctor.check_ports()
    assert finding.ok
    assert "Ray head" in finding.text


def test_a_check_that_breaks_is_a_finding_and_the_rest_goes_on(monkeypatch, tmp_path):
    def check_python():
        raise RuntimeError("no idea")

    for name in ("check_deepspeed", "check_torch", "check_accelerator"):
        monkeypatch.setattr(doctor, name, lambda: doctor.Finding("x", True, "fine"))
    monkeypatch.setattr(doctor, "check_python", check_python)
    findings = list(doctor.examine(tmp_path))
    assert not findings[0].ok
    assert "no idea" in findings[0].text
    assert len(findings) == 12


@pytest.mark.parametrize(
    ("script", "timeout", "answer"),
    [
        ("print('noise'); print('[1, 2]')", 30, [1, 2]),
        ("raise SystemExit('no luck')", 30, "no luck"),
        ("import time; time.sleep(9)", 1, "no answer within 1 s"),
    ],
)
def test_a_script_answers_in_json_or_says_why_not(script, timeout, answer):
    assert doctor.run_script(script, timeout) == answer
