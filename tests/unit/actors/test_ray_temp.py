"""A Ray of the run's own keeps its sockets where nobody else can enter, or says why it cannot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ebm_dist.cluster.access import refuse_second_ray
from ebm_dist.cluster.ray_temp import MAX_SOCKET_PATH, SOCKET, noted_cluster, private_temp_dir
from ebm_dist.core.errors import UserError
from ebm_dist.run.preflight import check_address

OURS = f"ebm_dist-{os.geteuid()}"


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short directory that everybody may write to, as /tmp is, for Ray's sessions."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path_factory.mktemp("t")
    root.chmod(0o1777)
    monkeypatch.setattr(
        "ebm_dist.cluster.ray_temp.MAX_SOCKET_PATH", len(str(root)) + 30 + len(SOCKET)
    )
    monkeypatch.setenv("TMPDIR", str(root))
    return root


def test_sessions_lie_in_a_directory_that_only_this_user_may_enter(root: Path) -> None:
    assert private_temp_dir() == root / OURS / "ray"
    assert (root / OURS).stat().st_mode & 0o777 == 0o700


def test_a_directory_of_this_users_alone_is_taken_as_it_is(root: Path) -> None:
    root.chmod(0o700)
    assert private_temp_dir() == root / "ray"
    assert not (root / OURS).exists()


def test_a_directory_that_somebody_else_may_have_made_is_refused(root: Path) -> None:
    (root / OURS).mkdir()
    (root / OURS).chmod(0o777)
    with pytest.raises(UserError, match="nobody else may enter"):
        check_address("local")


@pytest.mark.parametrize("key", ["TMPDIR", "RAY_TMPDIR"])
def test_a_path_too_long_for_a_socket_is_one_line_and_its_advice_works(
    key: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = root / ("scratch_local_jobs_" + "x" * 40)
    long.mkdir()
    monkeypatch.setenv(key, str(long))
    with pytest.raises(UserError, match="set RAY_TMPDIR to a shorter directory") as caught:
        check_address("local")
    assert str(caught.value).startswith(f"{key}: {long} is too long")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_TMPDIR", str(root))
    check_address("local")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_the_longest_socket_fits_under_tmp() -> None:
    assert len(f"/tmp/ebm_dist-4294967295{SOCKET}") <= MAX_SOCKET_PATH == 107


def note(path: Path, text: str) -> None:
    (path / "ray").mkdir(parents=True)
    (path / "ray" / "ray_current_cluster").write_text(text)


def test_auto_is_the_cluster_of_this_user_and_nobody_elses(root: Path) -> None:
    with pytest.raises(UserError, match="this user has started no Ray on this machine"):
        check_address("auto")
    note(root, "192.0.2.1:6379")
    assert noted_cluster() == "192.0.2.1:6379"
    if os.geteuid() == 0:
        os.chown(root / "ray" / "ray_current_cluster", 12345, 12345)
        assert noted_cluster() == ""
    note(root / OURS, "127.0.0.1:6379")  # by launch/local.sh
    assert noted_cluster() == "127.0.0.1:6379"
    (root / OURS / "ray" / "ray_current_cluster").unlink()
    (root / OURS / "ray" / "ray_current_cluster").symlink_to(root / "elsewhere")
    (root / "elsewhere").write_text("192.0.2.2:6379")
    assert noted_cluster() in ("", "192.0.2.1:6379")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_advice_on_ray_address_works_when_followed(
    address: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"or set RAY_ADDRESS=local$") as caught:
        check_address("local")
    assert str(caught.value).startswith("RAY_ADDRESS: ")
    assert "runtime.address=local" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    check_address("local")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match=r"or use runtime\.address=local$") as caught:
        check_address(address)
    assert str(caught.value).startswith("runtime.address: ")
    check_address("local")


def test_a_process_that_has_a_ray_is_told_to_end_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(gcs_address="127.0.0.1:6379")
    stand_in = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", stand_in)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"call ray\.shutdown\(\) first") as caught:
        refuse_second_ray()
    assert "runtime.address=127.0.0.1:6379" in str(caught.value)
    stand_in.is_initialized = lambda: False
    refuse_second_ray()
