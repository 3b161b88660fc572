"""Where W&B is and whether the user has a key for it, found without importing wandb and without asking anyone.

The same places as wandb's own, in its order: environment, netrc, settings file. One thing differs: wandb 0.31 talks to
api.forge.coreweave.com where nothing is set; here it is api.wandb.ai, the same service under its published name.
"""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medtune.errors import MedtuneError

OFFICIAL_URL = "https://api.wandb.ai"
# `wandb login` of 0.31 stores the key under the second name, older ones under the first.
_SAME_SERVICE = ("api.wandb.ai", "api.forge.coreweave.com")


class TrackingError(MedtuneError):
    """W&B runs that cannot be uploaded as things are."""


class ServerUnreachable(TrackingError):
    """No server, or none that works now: worth another try later."""


class KeyRefused(TrackingError):
    """The server works and does not take the key: no use in trying again."""


@dataclass(frozen=True)
class Account:
    """A W&B server and what opens it."""

    url: str
    key: str | None = field(repr=False)
    """None when an identity token file is used instead."""

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use this account, whatever else the user's environment says."""
        return {"WANDB_BASE_URL": self.url} | ({"WANDB_API_KEY": self.key} if self.key else {})


def base_url() -> str:
    """The server the user set (WANDB_BASE_URL, then wandb's settings file), else the official one."""
    given = os.environ.get("WANDB_BASE_URL") or _settings_file().get("base_url") or OFFICIAL_URL
    return given.rstrip("/")


def find_account() -> Account | None:
    """The server and the key the user has for it, or None without a key."""
    url = base_url()
    key = os.environ.get("WANDB_API_KEY") or _netrc_key(url) or _settings_file().get("api_key")
    if key:
        return Account(url, key)
    return Account(url, None) if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") else None


def user_says_offline() -> bool:
    """Whether the user turned uploading off for all of W&B (WANDB_MODE, `wandb offline`)."""
    mode = os.environ.get("WANDB_MODE") or _settings_file().get("mode", "online")
    return mode in ("offline", "disabled", "dryrun")


def how_to_log_in() -> str:
    """The way out of having no key."""
    return "Set one with `wandb login` or WANDB_API_KEY; for a server of your own set WANDB_BASE_URL as well."


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would rename, redirect or switch off runs that are ours to name and place."""
    kept = "ENTITY USERNAME USER_EMAIL HOST CACHE_DIR CONFIG_DIR DATA_DIR IDENTITY_TOKEN_FILE CREDENTIALS_FILE"
    names = {f"WANDB_{name}" for name in [*kept.split(), "INSECURE_DISABLE_SSL"]}
    rest = {name: value for name, value in environment.items() if not name.startswith("WANDB_") or name in names}
    # Without this wandb reports its own exceptions over the network.
    return rest | {"WANDB_ERROR_REPORTING": "false"}


def check(account: Account) -> None:
    """Ask the server who the key's owner is. Takes 15 s at most; raises TrackingError where uploads would fail."""
    viewer = ask(account, "query Viewer { viewer { id } }").get("viewer")
    if viewer is None and account.key:
        raise KeyRefused(f"{account.url} does not know the key. {how_to_log_in()}")


def ask(account: Account, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The data of a GraphQL answer. Takes 15 s at most; raises TrackingError where there is none."""
    import requests

    auth = ("api", account.key) if account.key else None
    call = {"query": query, "variables": dict(variables or {})}
    try:
        answer = requests.post(f"{account.url}/graphql", json=call, auth=auth, timeout=(5, 10))
    except requests.RequestException as error:
        raise ServerUnreachable(f"{account.url} does not answer ({_root(error)})") from None
    if answer.status_code in (401, 403):
        raise KeyRefused(f"{account.url} refuses the key (HTTP {answer.status_code}). {how_to_log_in()}")
    if answer.status_code != 200:
        raise ServerUnreachable(f"{account.url} answers with HTTP {answer.status_code}")
    try:
        body = answer.json()
        data, errors = body.get("data") or {}, body.get("errors") or []
    except (ValueError, AttributeError):
        raise ServerUnreachable(f"{account.url} does not answer as a W&B server does: check WANDB_BASE_URL") from None
    if errors and not data:
        raise TrackingError(f"{account.url} refuses: {errors[0].get('message', errors[0])}")
    return dict(data)


def app_url(server: str) -> str:
    """Where the pages of a server's API are."""
    return server.replace("://api.", "://", 1)


def _root(error: Exception) -> str:
    """The last cause: what requests says of it repeats the address and names objects."""
    if "timed out" in str(error):
        return "no answer in time"
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return str(reason or error).rpartition(": ")[2]


def _settings_file() -> dict[str, str]:
    folder = os.environ.get("WANDB_CONFIG_DIR")
    path = (Path(folder) if folder else Path("~/.config/wandb")).expanduser() / "settings"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
        return dict(parser.items("default"))
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}


def _netrc_key(url: str) -> str | None:
    given = os.environ.get("NETRC")
    places = [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]
    host = urlsplit(url).netloc
    names = (host, *(n for n in _SAME_SERVICE if n != host)) if host in _SAME_SERVICE else (host,)
    for place in places:
        try:
            # Not authenticators(): its `default` entry is meant for other services.
            hosts = netrc.netrc(place.expanduser()).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        return next((hosts[n][2] for n in names if n in hosts and hosts[n][2]), None)
    return None
