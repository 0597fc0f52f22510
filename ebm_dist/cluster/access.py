"""Who may reach the Ray that a run joins: this machine alone, or whoever has the token.

Whoever reaches a Ray without a token runs any code as its user. Ray itself joins such a cluster
without a word; a run does not, unless the cluster listens on loopback only. And where a run and
its cluster disagree on the token, Ray says it late and in other words: the run asks first.
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

KNOCK_S = 20.0
"""For a process that imports Ray and asks the cluster one thing: .3 s where nobody is busy."""


def chosen_address(configured: str) -> tuple[str, str]:
    """Where Ray is said to be, and which key says so: RAY_ADDRESS wins over runtime.address.

    Raises:
        UserError: it is Ray Client's or a dashboard's, through which no run is driven.
    """
    outside = os.environ.get("RAY_ADDRESS")
    address, key = (outside, "RAY_ADDRESS") if outside else (configured, "runtime.address")
    if address.startswith("ray://"):
        # Tried with Ray 2.60. The hub, beside the driver, is then on the head and writes the run's
        # files there; the shards are on one node, since Ray's view of the nodes is out of reach;
        # and the parts of a driver that died keep their names from the one that resumes.
        raise UserError(
            f"{key}: {address} is Ray Client, through which a run would write its metrics on the "
            f"head's disk and could not be resumed after a crash; {_INSTEAD}"
        )
    if address.startswith(("http://", "https://")):
        raise UserError(f"{key}: {address} is a dashboard, which takes jobs; {_INSTEAD}")
    return address, key


def refuse_second_ray() -> None:
    """A process has one Ray at most, and one that is there is left as it is.

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
    """What to do for a Ray of the run's own, where `key` says another one."""
    # RAY_ADDRESS wins, so runtime.address would change nothing.
    return "set RAY_ADDRESS=local" if key == "RAY_ADDRESS" else "use runtime.address=local"


def resolved(address: str) -> str:
    """`address`, or for auto the cluster that this user started on this machine, if there is one.

    Ray itself would take any process of the machine for it.
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
    """Have the token shown to the Ray that a run joins, and refuse to join without one.

    Sets RAY_AUTH_MODE where it is not set: `ray start` asks for the token by itself, a driver shows
    it only when told to. A token file of ours that others may read is made private; for a Ray of
    our own that has none, one is made.

    Raises:
        UserError: the cluster is beyond loopback and there is no token, or RAY_AUTH_MODE turns the
            token off, or others may read the token and that cannot be changed; or no run is driven
            through such an address.
    """
    address, key = chosen_address(configured)
    mode = os.environ.get("RAY_AUTH_MODE") or "token"
    if mode not in ("token", "disabled"):
        return  # another way of Ray's to tell who asks
    token = find_token()
    if address == "local":
        with contextlib.suppress(UserError, OSError):  # on loopback, and Ray says what it lacks
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
    """Ask the cluster whether it and this process mean the same token, or both none.

    Raises:
        UserError: they do not.
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
    ours, none = _knock(gcs), _knock(gcs, RAY_AUTH_MODE="disabled")
    if _answer(ours) == _REFUSED:
        none.kill()
        none.wait(KNOCK_S)
        shown = f"shows the wrong one ({token})" if mode == "token" else "shows none"
        what = "put the cluster's token there" if mode == "token" else "set RAY_AUTH_MODE=token"
        raise UserError(
            f"{key}: the Ray at {gcs} wants its token, and this process {shown}; {what}. It is "
            "read from RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or "
            "~/.ray/auth_token"
        )
    if _answer(none) == 0 and mode == "token":
        # It would let this process in, and then find this one's own door shut: "actor died".
        raise UserError(
            f"{key}: the Ray at {gcs} runs without a token, and this process shows one ({token}); "
            "start every node with RAY_AUTH_MODE=token and the same token, or, where nobody else "
            "reaches that Ray, set RAY_AUTH_MODE=disabled here too"
        )


_REFUSED = 3
_KNOCK = f"""
import sys
from ray import exceptions
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except getattr(exceptions, "AuthenticationError", ()):
    sys.exit({_REFUSED})
"""


def _knock(gcs: str, **environment: str) -> subprocess.Popen[bytes]:
    """Ask `gcs` to be let in, by a process of its own: each shows one token, or none, for life."""
    return subprocess.Popen(
        [sys.executable, "-c", _KNOCK, gcs],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _answer(knock: subprocess.Popen[bytes]) -> int | None:
    """0 for in, `_REFUSED`, or something else where nothing can be said."""
    try:
        return knock.wait(KNOCK_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        knock.kill()
        knock.wait(KNOCK_S)


def _listens(gcs: str, key: str) -> bool:
    try:
        socket.create_connection(split_address(gcs, key), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True


def find_token() -> Path | str | None:
    """The token file, the name of the variable that holds the token, or None; as Ray looks."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = _token_path()
    try:
        return path if path.stat().st_size > 0 else None
    except OSError:
        return None


def make_private(token: Path) -> None:
    """Take the token file from everybody else; Ray writes it readable to all."""
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
    """Write a new token where Ray looks for one; it would do so itself, readable to all."""
    path = _token_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        # Unlike a rename it leaves the token of another run, which has started meanwhile, in place.
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink()


def _token_path() -> Path:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine alone; a name counts if it is localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(address: str, key: str) -> str | None:
    """The host that `address` means; of auto, the cluster that Ray noted on this machine."""
    if address != "auto":
        return split_address(address, key)[0]
    try:
        return split_address(noted_cluster(), key)[0]
    except UserError:
        return None
