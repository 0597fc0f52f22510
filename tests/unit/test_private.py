"""What lies in a directory where everybody may make names is trusted only where it is ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ebm_dist.core.errors import UserError
from ebm_dist.data.sources.prepare import materialise
from ebm_dist.files.private import scratch
from ebm_dist.samplers.compile.compiler import take_own_cache

OURS = f"ebm_dist-{os.geteuid()}"


def test_the_scratch_directory_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert scratch(tmp_path) == tmp_path / OURS
    assert (tmp_path / OURS).stat().st_mode & 0o777 == 0o700


def test_one_that_others_could_only_read_is_made_private(tmp_path: Path) -> None:
    (tmp_path / OURS).mkdir(mode=0o755)
    assert scratch(tmp_path).stat().st_mode & 0o777 == 0o700


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user's")
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize("made", [open_to_all, link, Path.touch, of_another_user])
def test_what_somebody_else_may_have_made_is_refused_in_one_line(
    made: Callable[[Path], None], tmp_path: Path
) -> None:
    made(tmp_path / OURS)
    with pytest.raises(UserError, match=r"set TMPDIR to a directory of yours$") as caught:
        scratch(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / OURS}: ")


def test_data_without_a_home_is_not_read_from_a_cache_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be made below it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_to_all(tmp_path / OURS)
    with pytest.raises(UserError, match="nobody else may enter"):
        materialise("toy:ring", None, toy_samples=16)
    (tmp_path / OURS).rmdir()
    made = materialise("toy:ring", None, toy_samples=16)
    assert made.parent == tmp_path / OURS / "data"
    assert (tmp_path / OURS).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("made", [None, open_to_all, link, of_another_user])
def test_code_that_somebody_else_may_have_compiled_is_not_loaded(
    made: Callable[[Path], None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = pytest.importorskip("torch._inductor.runtime.cache_dir_utils")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    named = Path(cache.default_cache_dir())
    # As torch does itself when some of its modules are imported.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(named))
    if made is not None:
        made(named)
    take_own_cache()
    expected = named if made is None else tmp_path / OURS / "torchinductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)
    assert cache.cache_dir() == str(expected)
