"""Who may reach the Ray that a run joins: this machine alone, or whoever has the token.

Whoever reaches a Ray without a token runs any code as its user. Ray itself joins such a cluster
without a word; a run does not, unless the cluster listens on loopback only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

from ebm_dist.errors import UserError


def chosen_address(configured: str) -> tuple[str, str]:
    """Where Ray is said to be, and which key says so: RAY_ADDRESS wins over runtime.address."""
    outside = os.environ.get("RAY_ADDRESS")
    return (outside, "RAY_ADDRESS") if outside else (configured, "runtime.address")


def split_address(address: str, key: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or ray://HOST:PORT.

    Raises:
        UserError: it is neither.
    """
    try:
        url = urlsplit(address if "://" in address else f"gcs://{address}")
        host, port = url.hostname, url.port or (10001 if url.scheme == "ray" else 6379)
    except ValueError:
        host, port = None, 0
    if not host:
        raise UserError(
            f"{key}: expected local, auto, HOST:PORT or ray://HOST:PORT, got {address!r}"
        )
    return host, port


def require_token(configured: str) -> None:
    """Have the token shown to the Ray that a run joins, and refuse to join without one.

    Sets RAY_AUTH_MODE where it is not set: `ray start` asks for the token by itself, a driver shows
    it only when told to. A token file of ours that others may read is made private; for a Ray of
    our own that has none, one is made.

    Raises:
        UserError: the cluster is beyond loopback and there is no token, or RAY_AUTH_MODE turns the
            token off, or others may read the token and that cannot be changed.
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
    noted = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        return split_address(noted.read_text().strip(), key)[0]
    except (OSError, UserError):
        return None
