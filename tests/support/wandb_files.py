"""Reads a `.wandb` file: records in LevelDB's log framing, each a protobuf message of wandb's."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class Written:
    """What a file says of its run."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    machine: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    plots: set[str] = field(default_factory=set)
    exit_code: int | None = None

    @property
    def epochs(self) -> list[int]:
        return [row["epoch"] for row in self.history]


def records(path: Path) -> Iterator[bytes]:
    """The records of a file, up to the first that is not whole."""
    data = path.read_bytes()
    position, parts = 7, b""  # a header of 7 bytes: ":W&B", magic, version
    while position + _HEADER.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _HEADER.size:
            position += room
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        if kind == 0:
            position += room
            continue
        body = data[position + _HEADER.size : position + _HEADER.size + length]
        if len(body) < length:
            return
        assert zlib.crc32(bytes([kind]) + body) == checksum, f"{path} is damaged at {position}"
        position += _HEADER.size + length
        parts = body if kind in (_WHOLE, _FIRST) else parts + body
        if kind in (_WHOLE, _LAST):
            yield parts


def read(path: Path) -> Written:
    """All that the tests ask about."""
    from wandb.proto import wandb_internal_pb2 as messages

    written = Written()
    for raw in records(path):
        record = messages.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        written.kinds.add(kind)
        if kind == "run":
            written.run = record.run
            written.config |= _items(record.run.config.update)
        elif kind == "config":
            written.plots |= set(_items(record.config.update).get("_wandb", {}).get("visualize", {}))
        elif kind == "history":
            written.history.append(_items(record.history.item))
        elif kind == "summary":
            written.summary |= _items(record.summary.update)
        elif kind == "metric":
            written.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "stats":
            written.machine |= {item.key for item in record.stats.item}
        elif kind == "exit":
            written.exit_code = record.exit.exit_code
    return written


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *folders, name = item.nested_key or [item.key]
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = json.loads(item.value_json)
    return found
