"""W&B settings and credentials of the environment, found without importing wandb; text that is
shown or logged has its secrets removed."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from ebm_dist.core.errors import UserError
from ebm_dist.metrics.config import TrackingConfig

Mode = Literal["online", "offline", "off"]

# Host names of the hosted service; the client accepts a key for either.
_HOSTED = ("api.wandb.ai", "api.forge.coreweave.com")
_WANDB_MODES: dict[str, Mode] = {
    "disabled": "off",
    "dryrun": "offline",
    "offline": "offline",
    "online": "online",
    "run": "online",
}
_HIDDEN = "***"
_SECRET_KEY = re.compile(r"(api_?key|passw|secret|token$|credential)", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")  # user:password@host
_LIKE_A_KEY = re.compile(r"\blocal-\w{40,}\b|\bwandb_v1_\w+|\b[0-9a-f]{40}\b")


DEFAULT_PROJECT = "ebm_dist"
_VARIABLES = {
    "name": "WANDB_NAME",
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "job_type": "WANDB_JOB_TYPE",
    "notes": "WANDB_NOTES",
}


def with_environment(config: TrackingConfig) -> TrackingConfig:
    """`config` with missing names filled in from W&B's environment variables and settings files.

    Raises:
        UserError: W&B would refuse one of these names.
    """
    found: dict[str, Any] = {}
    for key, variable in _VARIABLES.items():
        if getattr(config, key) or not (said := _setting(variable[6:].lower(), variable)):
            continue
        found[key] = tuple(said.split(",")) if key == "tags" else said
        try:
            TrackingConfig(**{key: found[key]})
        except ValidationError as error:
            raise UserError(f"{variable}: {first_fault(error)}") from None
    if not config.project:
        found.setdefault("project", DEFAULT_PROJECT)
    return config.model_copy(update=found)


def first_fault(error: ValidationError) -> str:
    """The message of the first fault, without pydantic's prefix."""
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def trial_id() -> str | None:
    """The id of the W&B run that a sweep agent has made for this process; None without an agent."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def resolve_mode(config: TrackingConfig) -> tuple[Mode, str]:
    """The W&B mode of this run, and one line that explains it.

    `auto` follows WANDB_MODE if it is set; otherwise it is online if a key is configured.

    Raises:
        UserError: the mode is `online` and no key is configured.
    """
    if "wandb" not in config.sinks:
        return "off", "W&B: off (tracking.sinks)"
    asked, why = config.wandb, "tracking.wandb"
    if asked == "off":
        return "off", "W&B: off"
    if importlib.util.find_spec("wandb") is None:
        return "off", "W&B: not installed; metrics go to metrics.jsonl (pip install wandb)"
    if asked == "auto":
        said = _setting("mode", "WANDB_MODE").lower()
        if said in _WANDB_MODES:
            asked = _WANDB_MODES[said]
            why = f"WANDB_MODE={said}"
    key = find_key()
    if asked == "off":
        return "off", f"W&B: off ({why})"
    if asked == "online" and key is None:
        raise UserError(
            f"{why}: online needs an API key and none is configured; run `wandb login`, set "
            "WANDB_API_KEY, or set tracking.wandb to offline"
        )
    if asked == "offline":
        return "offline", f"W&B: offline ({why})"
    if key is None:
        return "offline", "W&B: offline (no API key)"
    return "online", f"W&B: online (key from {key})"


def find_key() -> str | None:
    """The source of the W&B key ("WANDB_API_KEY" or a file), never the key itself; None if
    there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "WANDB_IDENTITY_TOKEN_FILE"
    base = _setting("base_url", "WANDB_BASE_URL")
    # W&B stores its key under host:port, other programs under the host.
    address = urlsplit(base)
    hosts = [address.netloc, address.hostname or ""] if base else list(_HOSTED)
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entries = netrc(path)
        if any(host and entries.authenticators(host) for host in hosts):
            return str(path)
    except (OSError, NetrcParseError, UnicodeDecodeError):
        pass
    if _setting("api_key", "WANDB_API_KEY"):
        return "wandb settings"
    return None


def _setting(key: str, variable: str) -> str:
    """A W&B setting, from the environment, else the local, else the user's settings file."""
    if os.environ.get(variable):
        return os.environ[variable]
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    for path in (Path("wandb/settings"), home / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
            return parser["default"][key]
        except (KeyError, OSError, configparser.Error, UnicodeDecodeError):
            continue
    return ""


def scrub(text: str) -> str:
    """`text` with keys and passwords hidden; for messages of other libraries."""
    return _LIKE_A_KEY.sub(_HIDDEN, scrub_known(text))


def scrub_known(text: str) -> str:
    """`text` with the environment's key and the passwords in URLs hidden."""
    key = os.environ.get("WANDB_API_KEY")
    if key and len(key) >= 8:
        text = text.replace(key, _HIDDEN)
    return _IN_ADDRESS.sub(_HIDDEN, text)


def scrub_config(value: Any) -> Any:
    """A copy of a run's config that is safe to publish: plain types, secrets hidden."""
    if isinstance(value, dict):
        return {
            str(key): _HIDDEN
            if _SECRET_KEY.search(str(key)) and isinstance(item, str) and item
            else scrub_config(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub_config(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    # Does not use the pattern of a key, which also matches the hash of a commit.
    return scrub_known(str(value))
