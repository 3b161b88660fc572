"""A file that grows, kept in a bucket as pieces: the study's ledger.

`GENERATION/OFFSET` holds the bytes from that offset on. Each driver begins a generation of its own with the whole file, and
appends pieces to it; readers take the newest. So what a driver writes that was thought dead is never mixed with what another
one wrote. Pieces are merged so that there are few of them, however long the study.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from medtune.storage.bucket import Bucket, for_all

_MERGED = 8
"""Pieces of like size that become one."""
_KEPT = 2
"""Generations: the newest, and the one before it, which a reader may be at."""


class Segments:
    """The pieces of one file. One thread at a time."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.generation = ""
        # One for all tries to begin: a first piece whose arrival was not heard of is written again, not beside it.
        self._token = secrets.token_hex(4)
        self.pieces: list[tuple[int, int]] = []
        """(offset, size) of those that this driver wrote."""

    @property
    def length(self) -> int:
        """Bytes of the file that are in the bucket."""
        return sum(self.pieces[-1]) if self.pieces else 0

    def newest(self) -> str | None:
        """The newest generation that has a beginning."""
        return max((key.split("/")[0] for key in self.bucket.files() if key.endswith("/" + _name(0))), default=None)

    def read(self, generation: str) -> bytes:
        """The file as that generation has it. Raises FileNotFoundError when it is gone."""
        for _ in range(3):
            listed = sorted((int(key.split("/")[-1]), key) for key in self.bucket.files(generation))
            data = b""
            parts = for_all(self.bucket.read, [key for _, key in listed])
            for (offset, _), part in zip(listed, parts, strict=True):
                if part is None or offset > len(data):
                    break  # merged into an earlier one meanwhile: look again
                data += part[len(data) - offset :]
            else:
                if data or listed:
                    return data
        raise FileNotFoundError(f"{self.bucket.uri}/{generation} is not whole")

    def begin(self, path: Path, after: str | None) -> str:
        """Begin the generation after `after` with the whole lines of the file."""
        number = int(after.split("-")[0]) + 1 if after else 1
        self.generation = f"{number:06d}-{self._token}"
        self.pieces = []
        self._put(0, _lines(path, 0))
        old = sorted({key.split("/")[0] for key in self.bucket.files()} - {self.generation})
        for generation in old[: max(0, len(old) - _KEPT + 1)]:
            self.bucket.delete(f"{generation}/{key.split('/')[-1]}" for key in self.bucket.files(generation))
        return self.generation

    def append(self, path: Path) -> int:
        """Put the whole lines that the file has grown by; returns how many bytes they are."""
        data = _lines(path, self.length)
        if data:
            self._put(self.length, data)
        return len(data)

    def _put(self, offset: int, data: bytes) -> None:
        self.bucket.write(f"{self.generation}/{_name(offset)}", data)
        self.pieces.append((offset, len(data)))

    def merge(self, path: Path) -> None:
        """Make one piece of the newest ones of like size, when they are many."""
        first, total = len(self.pieces), 0
        while first and self.pieces[first - 1][1] <= 2 * total + 4096:
            first -= 1
            total += self.pieces[first][1]
        if len(self.pieces) - first < _MERGED:
            return
        offset = self.pieces[first][0]
        with path.open("rb") as file:
            file.seek(offset)
            self.bucket.write(f"{self.generation}/{_name(offset)}", file.read(total))
        gone = [f"{self.generation}/{_name(at)}" for at, _ in self.pieces[first + 1 :]]
        self.pieces[first:] = [(offset, total)]
        self.bucket.delete(gone)


def _name(offset: int) -> str:
    return f"{offset:015d}"


def _lines(path: Path, offset: int) -> bytes:
    """What a file holds from there on, without a last line that is not whole."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]
