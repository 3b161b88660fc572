"""Bringing a study's objects from a bucket into a folder of this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medtune.data.folders import user_folder
from medtune.storage.bucket import Bucket, Found, for_all

RECORDS = (".json", ".jsonl", ".npz")
Seen = dict[str, tuple[int, float]]
"""Size and time of what was fetched, by key."""


def local_folder(root: Bucket, kind: str) -> Path:
    """This user's folder for copies of what is in a bucket; `driver` and `reading` are kept apart."""
    return user_folder() / "storage" / hashlib.sha256(root.uri.encode()).hexdigest()[:12] / kind


def fetch(bucket: Bucket, folder: Path, found: dict[str, Found]) -> None:
    """Bring those objects below `folder`, each whole or not at all, and not those that are there in that size."""

    def one(key: str) -> None:
        path = folder / key
        if not path.exists() or path.stat().st_size != found[key].size:
            bucket.download(key, path)

    for_all(one, found)


def fetch_records(bucket: Bucket, folder: Path, prefix: str) -> None:
    """Bring the records, of an attempt or of several, below `prefix`; checkpoints stay where they are."""
    fetch(bucket, folder, {key: found for key, found in bucket.files(prefix).items() if key.endswith(RECORDS)})


def fetch_changed(bucket: Bucket, folder: Path, prefix: str, seen: Seen) -> Seen:
    """Bring what is below `prefix` and is not as it was `seen`; returns what is seen now."""
    now = {key: (found.size, found.changed) for key, found in bucket.files(prefix).items()}
    for_all(lambda key: bucket.download(key, folder / key), sorted(key for key in now if seen.get(key) != now[key]))
    return now
