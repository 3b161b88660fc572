"""Who drives a study that is kept in a bucket: one object, renewed while the driver lives.

A driver whose lease was not renewed for `STALE` seconds may be replaced, so one that could not renew it for `HELD` seconds
writes nothing until it has seen that the lease is still its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medtune.errors import StorageFault, StudyError
from medtune.storage.bucket import Bucket

RENEW = 10.0
HELD = 30.0
STALE = 60.0
_SETTLE = 1.0
_KEY = "lease.json"


class Replaced(StorageFault):
    """A driver that finds another in its place."""


class Lease:
    """This process's claim to drive the study in `bucket`."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.bucket = bucket
        self.name = name
        self.mine = {"token": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()} | _machine()
        self.renewed = 0.0

    def acquire(self, say: Callable[[str], object]) -> None:
        """Take the lease, waiting for a driver that may be dead. Raises StudyError when one lives."""
        holder = self._holder()
        if holder is not None and not _dead(holder):
            self._outlast(holder, say)
        self.mine["since"] = time.time()
        self._write()
        time.sleep(_SETTLE)  # two that take it at the same moment: the later to write has it
        other = self._holder()
        if other is None or other["token"] != self.mine["token"]:
            raise StudyError(driven(self.name, other or {}))

    def _outlast(self, holder: dict[str, Any], say: Callable[[str], object]) -> None:
        left = STALE - self._age()
        if left > 0:
            say(f"  study {self.name} was driven by {_who(holder)}; waiting up to {left:.0f} s to see whether it lives")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(1.0, left))
            now = self._holder()
            if now is None:
                return
            if now != holder:
                raise StudyError(driven(self.name, now))

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the server's own clock."""
        key = f".clock-{self.mine['token']}"
        self.bucket.write(key, b"?")
        now, then = self.bucket.find(key), self.bucket.find(_KEY)
        self.bucket.delete([key])
        return now.changed - then.changed if now and then else STALE

    def require(self) -> None:
        """Be sure of the lease before something is written. Raises Replaced."""
        if time.monotonic() - self.renewed > HELD:
            self.renew()

    def renew(self) -> None:
        """Raises Replaced when another driver has it."""
        holder = self._holder()
        if holder is None or holder["token"] != self.mine["token"]:
            now = f"is driven by {_who(holder)} now, which" if holder else "was driven to its end by another process, which"
            raise Replaced(
                f"study {self.name!r} {now} took over when this driver did not answer: this one ends, and what it decided "
                "meanwhile does not count"
            )
        self._write()

    def _write(self) -> None:
        started = time.monotonic()
        self.bucket.write(_KEY, json.dumps({**self.mine, "renewed": time.time()}).encode())
        self.renewed = started

    def _holder(self) -> dict[str, Any] | None:
        return holder(self.bucket)

    def release(self) -> None:
        """Give it back, if it is still this process's."""
        found = self._holder()
        if found is not None and found["token"] == self.mine["token"]:
            self.bucket.delete([_KEY])


def holder(bucket: Bucket) -> dict[str, Any] | None:
    """Who has the lease of the study in a bucket, alive or not."""
    data = bucket.read(_KEY)
    return json.loads(data) if data else None


def is_driven(bucket: Bucket) -> bool:
    """Whether some driver renewed the lease lately, by this machine's clock."""
    found = holder(bucket)
    return found is not None and not _dead(found) and time.time() - found["renewed"] < STALE


def driven(name: str, found: dict[str, Any]) -> str:
    """The message for a second driver."""
    return (
        f"study {name!r} is being run by {_who(found)}. "
        "Wait for it, stop it, or start another study with --new or --name."
    )


def _who(found: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"])) if "since" in found else "an unknown time"
    return f"process {found.get('pid', '?')} on {found.get('host', '?')} since {since}"


def _machine() -> dict[str, str]:
    """What tells this machine's processes from all others: the kernel's start, its process numbers, this one's start."""
    boot, numbers = _line("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")
    return {"boot": boot, "numbers": numbers, "began": _began(os.getpid())}


def _dead(found: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that is no more; others are not seen from here."""
    here = _machine()
    if not here["boot"] or any(found.get(name) != here[name] for name in ("boot", "numbers")):
        return False
    return _began(int(found["pid"])) != found.get("began")


def _began(pid: int) -> str:
    stat = _line(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
