"""Downloads that survive cuts, races and wrong files: resumed, verified, then moved into place in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from medtune.data.folders import AGENT, is_writable
from medtune.errors import DataError

_HEADERS = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_BLOCK = 1 << 16  # what a broken connection can lose

Verify = Callable[[Path], None]


class Unreachable(DataError):
    """No address could be reached at all: there is no network, or the servers are down."""


class _Retry(Exception):
    """Worth another attempt; the message says what happened."""

    def __init__(self, reason: str, answered: bool = True) -> None:
        super().__init__(reason)
        self.answered = answered


@dataclass(frozen=True)
class Effort:
    """How hard to try: attempts per address, seconds before the second (doubling), connect and read timeouts in s."""

    attempts: int = 4
    pause: float = 1.0
    timeout: tuple[float, float] = (10.0, 60.0)


def fetch(urls: Sequence[str], target: Path, verify: Verify, effort: Effort | None = None) -> str | None:
    """Download `target` from the first address that gives it; returns that address, None if it was there already.

    Data go to `target.part`, which a later call continues; `verify` sees the whole file before it is moved into
    place and raises DataError to refuse it. Processes that want the same file, on any node that shares the folder,
    wait for the first. Raises DataError that names every address and what it answered; Unreachable if none did.
    """
    if target.exists():
        return None
    if not is_writable(target.parent):
        raise DataError(f"{target.parent} cannot be written to: name another folder for {target.name} with --data-dir")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            return None if target.exists() else _from_any(urls, target, verify, effort or Effort())
    except OSError as error:
        raise DataError(f"cannot write {target}: {error}") from None


def md5_is(expected: str) -> Verify:
    """A check for `fetch`: the file has this MD5."""

    def verify(path: Path) -> None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != expected:
            start = path.read_bytes()[:40] if path.stat().st_size < 1 << 20 else b""
            page = ": a web page, not the file" if start.lstrip()[:1] == b"<" else ""
            raise DataError(f"got {path.stat().st_size} bytes with MD5 {found}, expected MD5 {expected}{page}")

    return verify


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        Console(stderr=True).print(f"another process is downloading {target.name}: waiting for it", soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _from_any(urls: Sequence[str], target: Path, verify: Verify, effort: Effort) -> str:
    part = _Part(target)
    failures: list[tuple[str, DataError]] = []
    for url in sorted(urls, key=lambda address: address != part.origin.get("url")):  # where we left off, first
        try:
            _from_one(url, part, verify, effort)
        except DataError as error:
            failures.append((url, error))
            continue
        part.path.replace(target)
        part.tag.unlink(missing_ok=True)
        return url
    kept = f"{part.size()} bytes are kept and the next try continues there. " if part.size() else ""
    kind = Unreachable if all(isinstance(error, Unreachable) for _, error in failures) else DataError
    reasons = "\n  ".join(f"{url}: {error}" for url, error in failures)
    raise kind(f"{target.name} cannot be downloaded:\n  {reasons}\n{kept}Or get it elsewhere and put it at {target}")


class _Part:
    """A download that is under way: its bytes, and the address and version they came from."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(target.name + ".part")
        self.tag = target.with_name(target.name + ".part.json")
        try:
            self.origin: dict[str, str] = json.loads(self.tag.read_text())
        except (OSError, ValueError):
            self.origin = {}

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, url: str, version: str) -> None:
        self.path.write_bytes(b"")
        self.origin = {"url": url, "version": version}
        self.tag.write_text(json.dumps(self.origin))

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)
        self.origin = {}


def _from_one(url: str, part: _Part, verify: Verify, effort: Effort) -> None:
    answered, reason = False, ""
    for attempt in range(effort.attempts):
        if attempt:
            time.sleep(effort.pause * 2 ** (attempt - 1))
        try:
            continued = _transfer(url, part, effort)
            answered = True
        except _Retry as error:
            reason, answered = str(error), answered or error.answered
            if not answered and attempt >= 1:
                break
            continue
        try:
            return verify(part.path)
        except DataError as error:
            part.drop()
            if not continued:
                raise
            reason = str(error)  # two halves of different files: once more from the start
    if not answered:
        raise Unreachable(reason)
    raise DataError(f"{reason} (gave up after {effort.attempts} attempts)")


def _transfer(url: str, part: _Part, effort: Effort) -> bool:
    """One request; True if it continued what was there. Raises _Retry or DataError."""
    at = part.size() if part.origin.get("url") == url else 0
    headers = dict(_HEADERS)
    if at:
        headers["Range"] = f"bytes={at}-"
        if version := part.origin.get("version"):
            headers["If-Range"] = version
    answered = False
    try:
        with requests.get(url, headers=headers, stream=True, timeout=effort.timeout) as response:
            answered = True
            return _receive(response, url, part, at)
    except requests.RequestException as error:
        where = urlsplit(url).netloc
        what = f"connection to {where} broke" if answered else f"{where} does not answer"
        raise _Retry(f"{what} ({_root(error)})", answered) from None


def _receive(response: requests.Response, url: str, part: _Part, at: int) -> bool:
    status, length = response.status_code, int(response.headers.get("Content-Length", -1))
    content_range = response.headers.get("Content-Range", "")
    if status == 416 and at and content_range == f"bytes */{at}":
        return True  # everything is there already
    if status == 206 and at and content_range.startswith(f"bytes {at}-"):
        continued = True
    elif status == 200:
        continued = False
        etag = response.headers.get("ETag", "")
        part.begin(url, etag if not etag.startswith("W/") else "")
    elif status in (206, 416):
        part.drop()
        raise _Retry(f"HTTP {status} with an unexpected range {content_range!r}")
    elif status in _TRANSIENT:
        raise _Retry(f"HTTP {status} {response.reason}")
    else:
        raise DataError(f"HTTP {status} {response.reason}")
    expected = part.size() + length if length >= 0 else None
    free = shutil.disk_usage(part.path.parent).free
    if length > free:
        raise DataError(f"needs {length} more bytes, {part.path.parent} has {free} free")
    _store(response, part, expected)
    return continued


def _store(response: requests.Response, part: _Part, expected: int | None) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    with progress, open(part.path, "ab") as file:
        task = progress.add_task(part.path.name.removesuffix(".part"), total=expected, completed=part.size())
        for block in response.iter_content(_BLOCK):
            file.write(block)
            progress.advance(task, len(block))


def _root(error: BaseException) -> str:
    """The innermost reason of a requests error, in one line."""
    while True:
        inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        inner = inner or getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
