"""What studies find out about machines, kept beside them: one small file for each kind of trial.

A file that cannot be read or written costs the next study the finding out, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medtune.record import read_json, write_json


def file_of(folder: Path, about: Mapping[str, Any]) -> Path:
    """Where what is known of trials like `about` lies; it names at least their model and image_size."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{about['model']}-{about['image_size']}-{digest}.json"


def read(path: Path) -> dict[str, Any]:
    """What is known; empty when nothing is."""
    try:
        return read_json(path) or {}
    except OSError:
        return {}


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Keep it."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)  # not its parents: they are gone where the storage is
        write_json(path, values)
