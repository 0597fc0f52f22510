"""The address of the Ray that a run joins, and the token that protects it.

Any process that reaches a Ray without a token can run code as its user. Ray itself joins such a
cluster without a warning; a run refuses it, unless the cluster listens on loopback only. If the
run and its cluster have different tokens, Ray reports it late and unclearly, so the run checks the
token before it starts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ebm_dist.cluster.ray_temp import noted_cluster
from ebm_dist.core.errors import UserError

PROBE_S = 20.0
"""Timeout of a process that imports Ray and connects to the cluster; on an idle machine it takes
.3 s."""


def chosen_address(configured: str) -> tuple[str, str]:
    """The address of Ray, and the key that sets it: RAY_ADDRESS overrides runtime.address.

    Raises:
        UserError: it is the address of Ray Client or of a dashboard, which cannot drive a run.
    """
    outside = os.environ.get("RAY_ADDRESS")
    address, key = (outside, "RAY_ADDRESS") if outside else (configured, "runtime.address")
    if address.startswith("ray://"):
        # Tried with Ray 2.60. The hub then runs on the head node and writes the run's files there;
        # all shards are on one node, because the list of nodes is not available; and the actors of
        # a driver that died keep their names, so a resumed run cannot use them.
        raise UserError(
            f"{key}: {address} is Ray Client, through which a run would write its metrics on the "
            f"head's disk and could not be resumed after a crash; {_INSTEAD}"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(f"{key}: {address} is a dashboard, which takes jobs; {_INSTEAD}")
    return address, key


def refuse_second_ray() -> None:
    """Refuse to run in a process that is connected to a Ray already: a process has one at most.

    Raises:
        UserError: `ray.init` was called before, in a notebook for example.
    """
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
        raise UserError(
            f"runtime.backend: this process has a Ray already ({address}); call ray.shutdown() "
            f"first, or train in another process, with runtime.address={address} to use that Ray"
        )


def instead(key: str) -> str:
    """Advice for a local Ray in place of the one that `key` names."""
    # RAY_ADDRESS overrides runtime.address.
    return "set RAY_ADDRESS=local" if key == "RAY_ADDRESS" else "use runtime.address=local"


def resolved(address: str) -> str:
    """`address`; for `auto`, that of the cluster that this user started here, if there is one.

    Ray's own `auto` would accept a cluster of any user of the machine.
    """
    return (noted_cluster() or address) if address == "auto" else address


_INSTEAD = (
    "hand the run over with launch/submit.sh, or start it on a node of the cluster with "
    "runtime.address=HOST:6379"
)


def split_address(address: str, key: str) -> tuple[str, int]:
    """Host and port of HOST:PORT.

    Raises:
        UserError: it is something else.
    """
    try:
        url = urlsplit(f"gcs://{address}")
        host, port = url.hostname, url.port or 6379
    except ValueError:
        host, port = None, 0
    if not host or "://" in address:
        raise UserError(f"{key}: expected local, auto or HOST:PORT, got {address!r}")
    return host, port


def require_token(configured: str) -> None:
    """Make this process send the token to Ray, and refuse a cluster that has none.

    Sets RAY_AUTH_MODE if it is not set, because a driver sends the token only then. Makes the token
    file private if others can read it. A local Ray without a token gets a new one.

    Raises:
        UserError: the cluster is beyond loopback, and there is no token or RAY_AUTH_MODE turns it
            off; others can read the token, and its mode cannot be changed; or see
            `chosen_address`.
    """
    address, key = chosen_address(configured)
    mode = os.environ.get("RAY_AUTH_MODE") or "token"
    if mode not in ("token", "disabled"):
        return  # another authentication of Ray's
    token = find_token()
    if address == "local":
        with contextlib.suppress(UserError, OSError):  # Ray itself reports what it lacks
            if isinstance(token, Path):
                make_private(token)
            elif token is None and mode == "token":
                make_token()
        return
    if isinstance(token, Path):
        make_private(token)
    if token is not None and mode == "token":
        os.environ["RAY_AUTH_MODE"] = mode
        return
    host = _host_of(address, key)
    if host is None or is_loopback(host):
        return
    why = "RAY_AUTH_MODE is disabled" if mode == "disabled" else "there is no token to show"
    raise UserError(
        f"{key}: {address} is beyond loopback and {why}; whoever reaches a Ray without a token "
        "runs any code as you. Make one with `launch/local.sh token`, copy it to every node, and "
        "set RAY_AUTH_MODE=token on all of them"
    )


def check_agreement(configured: str) -> None:
    """Check that the cluster and this process have the same token, or that neither has one.

    Raises:
        UserError: they differ.
    """
    address, key = chosen_address(configured)
    gcs = noted_cluster() if address == "auto" else address
    mode = os.environ.get("RAY_AUTH_MODE") or "disabled"
    if address == "local" or mode not in ("token", "disabled"):
        return
    if not gcs or not _listens(gcs, key):
        return
    token = find_token()
    if mode == "token" and token is None:
        raise UserError(
            "RAY_AUTH_MODE: is token, but there is none; put the cluster's in ~/.ray/auth_token, "
            "or name its file in RAY_AUTH_TOKEN_PATH"
        )
    ours, none = _probe(gcs), _probe(gcs, RAY_AUTH_MODE="disabled")
    if _answer(ours) == _REFUSED:
        none.kill()
        none.wait(PROBE_S)
        shown = f"shows the wrong one ({token})" if mode == "token" else "shows none"
        what = "put the cluster's token there" if mode == "token" else "set RAY_AUTH_MODE=token"
        raise UserError(
            f"{key}: the Ray at {gcs} wants its token, and this process {shown}; {what}. It is "
            "read from RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or "
            "~/.ray/auth_token"
        )
    if _answer(none) == 0 and mode == "token":
        # The cluster would accept this process, but could not connect back to it: "actor died".
        raise UserError(
            f"{key}: the Ray at {gcs} runs without a token, and this process shows one ({token}); "
            "start every node with RAY_AUTH_MODE=token and the same token, or, where nobody else "
            "reaches that Ray, set RAY_AUTH_MODE=disabled here too"
        )


_REFUSED = 3
_PROBE = f"""
import sys
from ray import exceptions
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except getattr(exceptions, "AuthenticationError", ()):
    sys.exit({_REFUSED})
"""


def _probe(gcs: str, **environment: str) -> subprocess.Popen[bytes]:
    """Connect to `gcs` in a new process, because a process cannot change its token."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROBE, gcs],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _answer(probe: subprocess.Popen[bytes]) -> int | None:
    """0 if the cluster accepted the token, `_REFUSED`, or another value if that is unknown."""
    try:
        return probe.wait(PROBE_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        probe.kill()
        probe.wait(PROBE_S)


def _listens(gcs: str, key: str) -> bool:
    try:
        socket.create_connection(split_address(gcs, key), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def find_token() -> Path | str | None:
    """The token file, the variable that holds the token, or None; in Ray's order of search."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = _token_path()
    try:
        return path if path.stat().st_size > 0 else None
    except OSError:
        return None


def make_private(token: Path) -> None:
    """Make the token file readable by its owner only; Ray creates it readable by all."""
    mode = stat.S_IMODE(token.stat().st_mode)
    if not mode & 0o077:
        return
    try:
        token.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{token}: others may read the token (mode {mode:o}) and it cannot be changed "
            f"({error.strerror}); chmod 600 it, or name another file in RAY_AUTH_TOKEN_PATH"
        ) from None


def make_token() -> None:
    """Write a new token to Ray's path; Ray would create the file readable by all."""
    path = _token_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        # Unlike a rename, a link does not replace the token of a run that started meanwhile.
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()


def _token_path() -> Path:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address or localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(address: str, key: str) -> str | None:
    """The host of `address`; for `auto`, that of the cluster in Ray's note on this machine."""
    if address != "auto":
        return split_address(address, key)[0]
    try:
        return split_address(noted_cluster(), key)[0]
    except UserError:
        return None
