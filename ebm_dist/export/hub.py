"""Downloads exports from the Hugging Face Hub, with its own client, the `hub` extra.

The files are somebody else's: only those that loading reads are taken, each up to a limit of its
size, and the reader then checks them like any other export. Each commit has a directory of its own;
the client's shared cache would hold links.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebm_dist._version import __version__
from ebm_dist.core.errors import RunFailed, UserError, named
from ebm_dist.core.installed import how_to_install
from ebm_dist.export.layout import CONFIG, MAX_DOWNLOADED, WEIGHTS

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# One slash, since `Path` joins the two into one.
_ADDRESS = re.compile(rf"hf://?({REPOSITORY.pattern})(?:@(\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 60


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address of the hub, `hf://USER/NAME[@REVISION]`."""
    return os.fspath(path).startswith("hf:/")


def download(address: str | os.PathLike[str]) -> Path:
    """The directory of the export at `address`, downloaded unless it is there.

    Without a revision it is the newest commit. A commit that was downloaded needs no network if the
    address names it in full.

    Raises:
        UserError: the address is invalid, or names nothing that can be read, or too large a file;
            or the client is not installed.
        RunFailed: the hub did not answer, or the download broke off.
    """
    text = re.sub("^hf://?", "hf://", os.fspath(address))
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UserError(f"{text}: expected hf://USER/NAME or hf://USER/NAME@REVISION")
    repo, revision = found.groups()
    if revision and _COMMIT.fullmatch(revision) and (_folder(repo, revision) / CONFIG).is_file():
        return _folder(repo, revision)
    api = client(text)
    with explained(text):
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        if not _COMMIT.fullmatch(info.sha or ""):
            raise RunFailed(f"{text}: the hub named no commit")
        folder = _folder(repo, info.sha)
        if missing := [name for name in (WEIGHTS, CONFIG) if name not in sizes]:
            raise UserError(f"{text}: not an export of ebm_dist, it has no {missing[0]}")
        # A model may be private, and the umask usually lets everybody read.
        _cache().mkdir(mode=0o700, parents=True, exist_ok=True)
        # config.json is the last, so that a directory which has it has all.
        for name, limit in MAX_DOWNLOADED.items():
            if name not in sizes or (folder / CONFIG).is_file():
                continue
            if sizes[name] is None or sizes[name] > limit:
                raise UserError(
                    f"{text}: {name} has {sizes[name]} bytes; at most {limit >> 20} MiB are "
                    "downloaded, fetch it yourself and give its directory"
                )
            api.hf_hub_download(repo, name, revision=info.sha, local_dir=folder)
    return folder


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ebm_dist" / "hub"


def _folder(repo: str, commit: str) -> Path:
    return _cache() / repo / commit


def client(address: str) -> Any:
    """The API object of the hub's client; raises UserError if it is not installed."""
    try:
        # By name, for it is an optional extra that type checkers need not find.
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise UserError(
            f"{address}: needs huggingface_hub, the extra [hub]: {how_to_install('hub')}"
        ) from None
    return hub.HfApi(library_name="ebm_dist", library_version=__version__)


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Reports failures of the client in one line about `address`, which never holds a token."""
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except (UserError, RunFailed):
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "model"
        raise UserError(
            f"{address}: the hub shows you no such {what}; check the name, and log in with "
            "`hf auth login` if it is private or gated"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{address}: {' '.join(str(error).split())}") from None
    except Exception as error:  # of requests, httpx or httpx2, by the client's version
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{address}: the hub refuses this (HTTP {status}); log in with `hf auth login` and "
                "a token that may do it"
            ) from None
        what = named(error)
        if token := hub.get_token():
            what = what.replace(token, "***")
        raise RunFailed(f"{address}: {what}; the same command tries again") from None
