"""Where data lie: the folders that are looked at, and where decoded arrays may be kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs

DATA_VARIABLE = "MEDTUNE_DATA"
EXTERNAL_VARIABLE = "MEDTUNE_EXTERNAL_DIR"
AGENT = "Mozilla/5.0 (compatible; medtune)"  # Mendeley Data answers 403 to agents that look like no browser


def user_folder() -> Path:
    """The user's cache folder for medtune; it need not exist."""
    return platformdirs.user_cache_path("medtune")


def data_folder(data_dir: Path | None = None) -> Path:
    """Folder with the data files: `data_dir`, else $MEDTUNE_DATA, else the user's cache folder."""
    return data_places(data_dir)[0][1]


def data_places(data_dir: Path | None = None) -> list[tuple[str, Path]]:
    """What is looked at for the data folder, in order, as (what says so, folder); the first one counts."""
    places: list[tuple[str, Path]] = []
    if data_dir is not None:
        places.append(("--data-dir", Path(data_dir).expanduser().absolute()))
    if named := os.environ.get(DATA_VARIABLE):
        places.append((f"${DATA_VARIABLE}", Path(named).expanduser().absolute()))
    places.append(("user cache folder", user_folder() / "data"))
    return places


def external_folder(external_dir: Path | None = None) -> Path | None:
    """Folder or archive of the external set: `external_dir`, else $MEDTUNE_EXTERNAL_DIR, else None."""
    if external_dir is not None:
        return Path(external_dir).expanduser().absolute()
    named = os.environ.get(EXTERNAL_VARIABLE)
    return Path(named).expanduser().absolute() if named else None


def get_command(pair: str, folder: Path, native_size: int = 28) -> str:
    """The command that downloads a pair's files, of this size, into `folder`."""
    command = f"medtune data get --pair {pair}"
    if native_size != 28:
        command += f" --native-size {native_size}"
    return command if folder == data_folder() else f"{command} --data-dir {folder}"


def is_writable(folder: Path) -> bool:
    """Whether files may be made in `folder`, or in the nearest parent that exists if it does not.

    Permission bits count for root too: a folder that someone made read-only is left alone.
    """
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return False
    return bool(folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def decoded_folders(data_dir: Path | None = None) -> list[Path]:
    """Folders that may hold decoded arrays, in the order they are tried."""
    beside, own = data_folder(data_dir) / "decoded", user_folder() / "decoded"
    return [beside, own] if is_writable(beside) or beside.is_dir() else [own]
