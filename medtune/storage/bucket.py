"""A place in S3 or Google Cloud Storage: whole objects by key, through pyarrow's own clients.

Endpoint, region and credentials are found as usual: `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, `AWS_REGION` (for GCS
`STORAGE_EMULATOR_HOST`), then the variables, the files and the machine's role that AWS's and Google's libraries look for. An
object appears when it is whole.
"""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medtune.errors import ConfigError, StudyError
from medtune.storage.patience import reason

SCHEMES = ("s3", "gs")
VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST",
)  # fmt: skip
"""What clients are told by their environment, as text: a file of Google's keys has to be on each node."""
PARALLEL = 8
"""Small objects read or deleted at a time."""
_ANSWER_SECONDS = 5
"""Without a byte from the server, after which a request is made again."""
_TRIES = 2
_MAPPED = 1 << 20


@dataclass(frozen=True)
class Found:
    """An object in a listing."""

    size: int
    changed: float
    """Seconds since 1970 by the server's clock, in whole seconds with some servers."""


def is_bucket(storage: str | os.PathLike[str] | None) -> bool:
    """Whether a storage is named by a URI, and is no folder. Raises ConfigError for a URI of another kind."""
    scheme, marked, _ = str(storage or "").partition("://")
    if not marked:
        return False
    if scheme not in SCHEMES:
        raise ConfigError(f"storage must be a folder, s3://bucket/prefix or gs://bucket/prefix, got {str(storage)!r}")
    return True


class Bucket:
    """The objects below a URI. Every call raises OSError, with the server's word, when it cannot be done."""

    def __init__(self, uri: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: what the client is told besides this process's environment as it is now, and before it."""
        self.uri = uri.rstrip("/")
        parts = urlsplit(self.uri)
        if parts.scheme not in SCHEMES or not parts.netloc or parts.query or parts.fragment:
            raise ConfigError(f"storage must be s3://bucket/prefix or gs://bucket/prefix, got {uri!r}")
        self.name = parts.netloc
        self.root = f"{parts.netloc}{parts.path}"
        self.environment = {k: os.environ[k] for k in VARIABLES if k in os.environ} | dict(environment or {})
        self._client: Any = None

    @property
    def client(self) -> Any:
        """pyarrow's file system, made when first needed."""
        if self._client is None:
            self._client = _client(urlsplit(self.uri).scheme, tuple(sorted(self.environment.items())))
        return self._client

    def under(self, *keys: str) -> Bucket:
        """The place below this one."""
        return Bucket("/".join((self.uri, *keys)), self.environment)

    def write(self, key: str, data: Any) -> None:
        """Put an object, whole; `data` is anything that holds bytes."""
        stream = self.client.open_output_stream(f"{self.root}/{key}")
        # No `with`: leaving it by an error would close the stream, and so publish what was written so far.
        stream.write(data)
        stream.close()

    def upload(self, path: Path, key: str) -> None:
        """Put a file as it is now; it is not to be changed meanwhile but by appending."""
        import pyarrow

        size = path.stat().st_size
        if size < _MAPPED:
            self.write(key, path.read_bytes())
            return
        with pyarrow.memory_map(str(path)) as source:
            self.write(key, source.read_buffer(size))

    def read(self, key: str) -> bytes | None:
        """An object, or None where there is none."""
        try:
            with self.client.open_input_file(f"{self.root}/{key}") as stream:
                return stream.readall()
        except FileNotFoundError:
            return None

    def download(self, key: str, path: Path) -> bool:
        """Fetch an object into a file, whole or not at all; False where there is none."""
        data = self.read(key)
        if data is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        for_all(self._delete, keys)

    def _delete(self, key: str) -> None:
        try:
            self.client.delete_file(f"{self.root}/{key}")
        except FileNotFoundError:
            return

    def find(self, key: str) -> Found | None:
        """What a listing says of one object."""
        [info] = self.client.get_file_info([f"{self.root}/{key}"])
        return _found(info) if info.is_file else None

    def files(self, prefix: str = "") -> dict[str, Found]:
        """All objects below `prefix/`, by key."""
        return {key: _found(info) for key, info in self._list(prefix, recursive=True) if info.is_file}

    def names(self) -> list[str]:
        """The names right below this place."""
        # pyarrow's client of GCS lists no folder that has no object of its own.
        everything = self.uri.startswith("gs://")
        return sorted({key.split("/")[0] for key, _ in self._list("", recursive=everything) if key})

    def _list(self, prefix: str, recursive: bool) -> list[tuple[str, Any]]:
        from pyarrow.fs import FileSelector

        base = f"{self.root}/{prefix}".rstrip("/")
        infos = self.client.get_file_info(FileSelector(base, recursive=recursive, allow_not_found=True))
        return [(info.path[len(self.root) + 1 :], info) for info in infos]

    def require_usable(self) -> None:
        """Write, read and delete an object. Raises StudyError with the bucket, the server's answer and the way out."""
        key, data = f".medtune-{secrets.token_hex(6)}", secrets.token_bytes(64)
        doing = "write to"
        try:
            self.write(key, data)
            doing = "read from"
            if self.read(key) != data:
                raise OSError("what was read is not what was written")
            doing = "delete from"
            self.delete([key])
        except OSError as error:
            raise StudyError(f"cannot {doing} {self.uri}: {_answer(error)}. {self._way_out(str(error))}") from None

    def _way_out(self, answer: str) -> str:
        if "NO_SUCH_BUCKET" in answer or "NoSuchBucket" in answer:
            return f"Create bucket {self.name!r}, or name another with --storage or $MEDTUNE_STORAGE"
        if self.uri.startswith("gs://"):
            return "Name an account that may, with GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`"
        at = _endpoint(self.environment)
        where = f"the server at {at} (AWS_ENDPOINT_URL)" if at else "AWS (AWS_ENDPOINT_URL names another server)"
        return f"It is {where}; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role, must be let in there"


def for_all(action: Any, keys: Iterable[str]) -> list[Any]:
    """The action's result for each key, some at a time; the first error is raised once all are done."""
    todo = list(keys)
    if len(todo) < 2:
        return [action(key) for key in todo]
    with ThreadPoolExecutor(min(PARALLEL, len(todo))) as pool:
        return [done.result() for done in [pool.submit(action, key) for key in todo]]


@functools.lru_cache(maxsize=8)
def _client(scheme: str, told: tuple[tuple[str, str], ...]) -> Any:
    from pyarrow import fs

    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_TRIES * _ANSWER_SECONDS), **_stand_in(dict(told)))
    about = dict(told)
    options: dict[str, Any] = {}
    if "AWS_ACCESS_KEY_ID" in about and "AWS_SECRET_ACCESS_KEY" in about:
        options = {
            "access_key": about["AWS_ACCESS_KEY_ID"],
            "secret_key": about["AWS_SECRET_ACCESS_KEY"],
            "session_token": about.get("AWS_SESSION_TOKEN"),
        }
    if region := about.get("AWS_REGION") or about.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    if endpoint := _endpoint(about):
        options |= _address(endpoint, "https")
    return fs.S3FileSystem(
        request_timeout=_ANSWER_SECONDS,
        connect_timeout=_ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        allow_delayed_open=True,  # a small object is then one request, not three
        **options,
    )


def _stand_in(about: Mapping[str, str]) -> dict[str, Any]:
    """A server in Google's place, which asks for no key."""
    host = about.get("STORAGE_EMULATOR_HOST")
    return {"anonymous": True, **_address(host, "http")} if host else {}


def _address(endpoint: str, scheme: str) -> dict[str, str]:
    address = urlsplit(endpoint if "://" in endpoint else f"{scheme}://{endpoint}")
    return {"endpoint_override": f"{address.netloc}{address.path.rstrip('/')}", "scheme": address.scheme}


def _endpoint(about: Mapping[str, str]) -> str | None:
    return about.get("AWS_ENDPOINT_URL_S3") or about.get("AWS_ENDPOINT_URL")


def _found(info: Any) -> Found:
    return Found(int(info.size), info.mtime_ns / 1e9 if info.mtime_ns else 0.0)


def _answer(error: OSError) -> str:
    """The server's word without the client's account of its own doing."""
    text = reason(error)
    return text[text.find("AWS Error") :] if "AWS Error" in text else text
