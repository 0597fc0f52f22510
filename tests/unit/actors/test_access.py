"""A run joins a Ray beyond loopback only with a token, and keeps the token to itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ebm_dist.cluster import access
from ebm_dist.cluster.access import (
    check_agreement,
    find_token,
    is_loopback,
    make_private,
    make_token,
    require_token,
)
from ebm_dist.core.errors import UserError
from ebm_dist.run.preflight import check_address


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, and nothing about Ray in the environment."""
    for name in [*os.environ]:
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    # Set first, so that what `require_token` sets does not outlive the test.
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def write_token(home: Path, mode: int = 0o600) -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("0" * 64)
    path.chmod(mode)
    return path


def note_cluster(home: Path, address: str) -> None:
    (home / "ray").mkdir()
    (home / "ray" / "ray_current_cluster").write_text(address)


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "head:6379"])
@pytest.mark.parametrize("by", ["config", "environment"])
def test_a_ray_beyond_loopback_is_not_joined_without_a_token(
    address: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        require_token("local" if by == "environment" else address)
    line = str(caught.value)
    assert line.startswith("RAY_ADDRESS: " if by == "environment" else "runtime.address: ")
    assert "no token" in line
    assert "launch/local.sh token" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "is Ray Client"),
        ("ray://head:10001", "is Ray Client"),
        ("http://127.0.0.1:8265", "is a dashboard"),
        ("https://head", "is a dashboard"),
    ],
)
@pytest.mark.parametrize("by", ["config", "environment"])
@pytest.mark.parametrize("ask", [require_token, check_agreement, check_address])
def test_no_run_is_driven_through_ray_client_or_a_dashboard(
    address: str,
    said: str,
    by: str,
    ask: Callable[[str], None],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_token(home)
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=said) as caught:
        ask("local" if by == "environment" else address)
    line = str(caught.value)
    assert line.startswith("RAY_ADDRESS: " if by == "environment" else "runtime.address: ")
    assert "launch/submit.sh" in line
    assert "\n" not in line


def test_auto_means_the_cluster_that_this_machine_noted(home: Path) -> None:
    note_cluster(home, "192.0.2.1:6379")
    with pytest.raises(UserError, match=r"runtime\.address: auto is beyond loopback"):
        require_token("auto")


def test_a_ray_on_loopback_or_none_at_all_needs_no_token(home: Path) -> None:
    require_token("auto")  # no cluster was noted: Ray says so itself
    note_cluster(home, "127.0.0.1:6379")
    for address in ("auto", "127.0.0.1:6379", "localhost:6379", "[::1]:6379", "local"):
        require_token(address)
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_token_that_is_switched_off_counts_as_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_token(home)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE is disabled"):
        require_token("192.0.2.1:6379")


@pytest.mark.parametrize("where", ["home", "file", "variable"])
def test_a_token_is_found_where_ray_looks_and_shown(
    where: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "home":
        write_token(home)
    elif where == "file":
        path = home / "elsewhere"
        path.touch(0o600)
        path.write_text("0" * 64)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    else:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert find_token() is not None
    require_token("192.0.2.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_empty_token_file_is_no_token(home: Path) -> None:
    write_token(home).write_text("")
    assert find_token() is None


@pytest.mark.parametrize("address", ["192.0.2.1:6379", "local"])
def test_a_token_that_ray_left_readable_is_made_private(address: str, home: Path) -> None:
    token = write_token(home, 0o644)
    require_token(address)
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_readable_token_that_cannot_be_changed_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = write_token(home, 0o640)

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(UserError, match="others may read the token"):
        make_private(token)
    with pytest.raises(UserError, match="others may read the token"):
        require_token("192.0.2.1:6379")


def test_a_ray_of_our_own_gets_a_private_token_once(home: Path) -> None:
    require_token("local")
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    text = token.read_text()
    assert len(text) == 64
    require_token("local")
    make_token()  # of a run that found none a moment ago
    assert token.read_text() == text
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_no_token_is_made_where_it_is_switched_off(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    require_token("local")
    assert not (home / ".ray").exists()


@pytest.mark.parametrize(
    ("ours", "none", "mode", "said"),
    [
        (0, 3, "token", None),
        (0, 0, "disabled", None),
        (0, 0, "token", "runs without a token"),
        (3, 3, "token", "shows the wrong one"),
        (3, 3, "disabled", "shows none"),
        # Another version's Ray may end in any way, and says so when it is joined.
        (1, 1, "token", None),
        (None, None, "token", None),
    ],
)
def test_a_cluster_is_asked_whether_it_means_the_same_token(
    ours: int | None,
    none: int | None,
    mode: str,
    said: str | None,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_token(home)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    answers = {None: ours, "disabled": none}
    monkeypatch.setattr(access, "_listens", lambda gcs, key: True)
    monkeypatch.setattr(access, "_probe", lambda gcs, RAY_AUTH_MODE=None: Probe(RAY_AUTH_MODE))
    monkeypatch.setattr(access, "_answer", lambda probe: answers[probe.mode])
    if said is None:
        check_agreement("10.0.0.1:6379")
        return
    with pytest.raises(UserError, match=said) as caught:
        check_agreement("10.0.0.1:6379")
    assert str(caught.value).startswith("runtime.address: the Ray at 10.0.0.1:6379 ")
    assert "0" * 64 not in str(caught.value)


class Probe:
    def __init__(self, mode: str | None) -> None:
        self.mode = mode

    def kill(self) -> None: ...
    def wait(self, timeout: float) -> None: ...


def test_to_show_a_token_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(access, "_listens", lambda gcs, key: True)
    with pytest.raises(UserError, match=r"RAY_AUTH_MODE: is token, but there is none"):
        check_agreement("127.0.0.1:6379")


@pytest.mark.parametrize("address", ["local", "auto", "127.0.0.1:1"])
def test_nobody_is_asked_where_no_ray_listens(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_probe", None)
    check_agreement(address)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_loopback_is_this_machine_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone
