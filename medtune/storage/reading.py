"""Reading a study that is kept in a bucket: what is asked for is brought into a folder of this machine first."""

from __future__ import annotations

import json
import os
from pathlib import Path

from medtune.audit import FILE as AUDIT
from medtune.driver import RECORD
from medtune.errors import StudyError
from medtune.record import read_json
from medtune.storage.bucket import Bucket
from medtune.storage.copies import fetch_changed, fetch_records, local_folder
from medtune.storage.home import LEDGER, URI, empty
from medtune.storage.lease import is_driven
from medtune.storage.patience import reason
from medtune.storage.segments import Segments
from medtune.usage import FILE as USAGE


def fetch_study(root: Bucket, name: str) -> Path:
    """The folder with the study's definition and ledger as they are now. Raises StudyError when it cannot be read."""
    bucket, folder = root.under(name), local_folder(root, "reading") / name
    try:
        record = bucket.read("study.json")
        if record is None:
            raise StudyError(f"no study in {bucket.uri}: `medtune studies --storage {root.uri}` lists those there are")
        segments = Segments(bucket.under("ledger"))
        newest = segments.newest()
        ledger = segments.read(newest) if newest else b""
        notes = [(note, data) for note in (USAGE, RECORD, AUDIT) if (data := bucket.read(note)) is not None]
    except OSError as error:
        raise StudyError(f"cannot read {bucket.uri}: {reason(error)}") from None
    folder.mkdir(parents=True, exist_ok=True)
    here = read_json(folder / "study.json")
    if here is not None and here["id"] != json.loads(record)["id"]:
        empty(folder)  # a copy of a study of that name that is no more
    for file, data in (("study.json", record), (LEDGER, ledger), (URI, bucket.uri.encode()), *notes):
        part = folder / f"{file}.{os.getpid()}.part"
        part.write_bytes(data)
        os.replace(part, folder / file)
    return folder


def fetch_again(bucket: Bucket) -> Path:
    """As `fetch_study`, of a study that is known to be there."""
    root, _, name = bucket.uri.rpartition("/")
    return fetch_study(Bucket(root, bucket.environment), name)


def bucket_of(folder: Path) -> Bucket | None:
    """The bucket that a local folder stands for; None for a study that lies in the folder itself."""
    mark = folder / URI
    return Bucket(mark.read_text()) if mark.exists() else None


def driven(bucket: Bucket) -> bool:
    """Whether the study in a bucket is being driven. Raises StudyError."""
    try:
        return is_driven(bucket)
    except OSError as error:
        raise StudyError(f"cannot read {bucket.uri}: {reason(error)}") from None


def fetch_folder(folder: Path, bucket: Bucket, prefix: str) -> None:
    """Bring all that commands left below `prefix`, as it is now. Raises StudyError."""
    try:
        fetch_changed(bucket, folder, prefix, {})
    except OSError as error:
        raise StudyError(f"cannot read {bucket.uri}/{prefix}: {reason(error)}") from None


def fetch_trial(folder: Path, bucket: Bucket, number: int) -> None:
    """Bring the records of a trial's attempts. Raises StudyError."""
    try:
        fetch_records(bucket, folder, f"trials/{number:04d}")
    except OSError as error:
        raise StudyError(f"cannot read trial {number} in {bucket.uri}: {reason(error)}") from None


def fetch_best(folder: Path, bucket: Bucket, number: int, attempt: int) -> None:
    """Bring the best weights of a trial that were kept, if any. Raises StudyError."""
    prefix = f"trials/{number:04d}/attempt-{attempt}/checkpoints"
    try:
        found = bucket.files(prefix)
        best = max((key for key in found if "/best-" in key), default=None)
        if best is not None and not _there(folder / best, found[best].size):
            bucket.download(best, folder / best)
    except OSError as error:
        raise StudyError(f"cannot read {bucket.uri}/{prefix}: {reason(error)}") from None


def _there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size
