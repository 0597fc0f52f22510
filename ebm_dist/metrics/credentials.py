"""What the environment says about W&B, without importing it and without reading a key out."""

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

# The hosted service's names; a key for either serves the client.
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
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
}


def with_environment(config: TrackingConfig) -> TrackingConfig:
    """`config` with the names that it leaves out as W&B's own variables and settings have them.

    Raises:
        UserError: W&B would not take a name that they hold.
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
    """What a name of `TrackingConfig` lacks."""
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def run_name(name: str) -> str:
    """The name of the run on its page: WANDB_NAME, or else `name`."""
    return os.environ.get("WANDB_NAME") or name


def resolve_mode(config: TrackingConfig) -> tuple[Mode, str]:
    """The mode that `config` means here, and one line that says so.

    `auto` follows WANDB_MODE where it is set, then goes online where a key is configured.

    Raises:
        UserError: `online` was asked for and no key is configured.
    """
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
    """Where a W&B key is configured ("WANDB_API_KEY", a file), or None; never the key."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "WANDB_IDENTITY_TOKEN_FILE"
    base = _setting("base_url", "WANDB_BASE_URL")
    # W&B looks its key up under host:port, other programs under the host.
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
    """A W&B setting: the environment first, then the local and the user's settings file."""
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
    """`text` with keys and passwords hidden; for messages that others wrote."""
    return _LIKE_A_KEY.sub(_HIDDEN, scrub_known(text))


def scrub_known(text: str) -> str:
    """`text` with this environment's key, and passwords in addresses, hidden."""
    key = os.environ.get("WANDB_API_KEY")
    if key and len(key) >= 8:
        text = text.replace(key, _HIDDEN)
    return _IN_ADDRESS.sub(_HIDDEN, text)


def scrub_config(value: Any) -> Any:
    """A copy of a run's config fit to be shown to others: secrets hidden, plain types only."""
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
    # Not by the look of a key here: a commit's hash has that look too.
    return scrub_known(str(value))
