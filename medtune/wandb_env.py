"""Where W&B is and whether the user has a key for it, found without importing wandb and without asking anyone.

The same places as wandb's own, in its order: environment, netrc, settings file. One thing differs: wandb 0.31 talks to
api.forge.coreweave.com where nothing is set; here it is api.wandb.ai, the same service under its published name.
"""

from __future__ import annotations

import configparser
import netrc
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from medtune.errors import MedtuneError

OFFICIAL_URL = "https://api.wandb.ai"
# `wandb login` of 0.31 stores the key under the second name, older ones under the first.
_SAME_SERVICE = ("api.wandb.ai", "api.forge.coreweave.com")


class TrackingError(MedtuneError):
    """W&B runs that cannot be uploaded as things are."""


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


def offline_environment() -> None:
    """Prepare this process for offline runs: nothing of the user's W&B set-up may rename, redirect or report them."""
    kept = ("WANDB_ENTITY", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_HOST", "WANDB_USERNAME")
    for name in [n for n in os.environ if n.startswith("WANDB_") and n not in kept]:
        del os.environ[name]
    # Without this wandb reports its own exceptions over the network.
    os.environ["WANDB_ERROR_REPORTING"] = "false"


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
