"""Asks nodes for their facts: by a short task pinned to each, all at once, whatever version of medtune they have."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtune.cluster import facts
from medtune.cluster.buckets import try_bucket
from medtune.cluster.tasks import answers_of, on
from medtune.storage.bucket import is_bucket

PATIENCE = 45.0
"""Seconds a node may take to answer: starting a process there, and once in a while a job's environment."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node and what it told of itself."""

    id: str
    ip: str
    gpus: float = 0.0
    """GPUs that Ray counts there."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """`medtune.cluster.facts.gather`; empty when there was no answer."""
    silence: str | None = None
    """Why there was no answer."""
    skew: tuple[float, float] = (0.0, 0.0)
    """Seconds its clock is ahead of the driver's: at least and at most."""
    storage_seen: bool = True
    """Whether the driver read what this node wrote into the storage folder."""

    @property
    def label(self) -> str:
        """`w1 (10.0.0.12)`, or the address alone when it did not say its name."""
        name = self.facts.get("hostname")
        return f"{name} ({self.ip})" if name and name != self.ip else self.ip

    @property
    def ahead(self) -> float:
        """Seconds that its clock is ahead of the driver's for certain; negative: behind."""
        least, most = self.skew
        return least if least > 0 else min(most, 0.0)


def here(storage: str | None = None) -> Node:
    """This process's own facts, without Ray."""
    return Node(id="", ip="this machine", facts=facts.gather(None if is_bucket(storage) else storage))


def staying() -> list[dict[str, Any]]:
    """The entries of `ray.nodes()` that are alive and not about to leave, by address."""
    import ray
    from ray._private.state import state

    leaving = state.get_draining_nodes()
    nodes = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return sorted(nodes, key=lambda node: node["NodeManagerAddress"])


def ask(nodes: Sequence[Mapping[str, Any]], storage: str | None = None, patience: float = PATIENCE) -> list[Node]:
    """The facts of some of `ray.nodes()`, in their order; needs a driver that Ray is attached to.

    `storage`: the studies' folder or bucket, which each node reads from and writes to while it is asked.
    """
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(facts)
    bucket = storage if storage is not None and is_bucket(storage) else None
    shared = None if bucket else storage
    token = secrets.token_hex(8)
    with _left(shared, token) as folder:
        sent = time.time()
        asked = [on(node, facts.gather, shared, token, node["NodeID"], True) for node in nodes]
        answers = answers_of(asked, patience)
        heard = {
            node["NodeID"]: _bounds(sent, at, answer["began"], answer["ended"])
            for node, (at, answer) in zip(nodes, answers, strict=True)
            if isinstance(answer, dict)
        }
        # Starting a process took most of the first round trip, so it says little of the clock; the second finds it warm.
        well = [node for node in nodes if node["NodeID"] in heard]
        sent = time.time()
        for node, (at, times) in zip(well, answers_of([on(node, facts.clock) for node in well], patience), strict=True):
            if isinstance(times, tuple):
                first, second = heard[node["NodeID"]], _bounds(sent, at, *times)
                heard[node["NodeID"]] = (max(first[0], second[0]), min(first[1], second[1]))
        tried = try_bucket(bucket, well, patience) if bucket else {}
        return [
            Node(
                id=node["NodeID"],
                ip=node["NodeManagerAddress"],
                gpus=node["Resources"].get("GPU", 0.0),
                facts={**answer, **tried.get(node["NodeID"], {})} if isinstance(answer, dict) else {},
                silence=None if isinstance(answer, dict) else str(answer),
                skew=heard.get(node["NodeID"], (0.0, 0.0)),
                storage_seen=folder is None or _read(folder / node["NodeID"]) == token,
            )
            for node, (_, answer) in zip(nodes, answers, strict=True)
        ]


def _bounds(sent: float, heard: float, began: float, ended: float) -> tuple[float, float]:
    """How far a clock that read `began` and `ended` in between is ahead of ours, at least and at most."""
    return ended - heard, began - sent


@contextlib.contextmanager
def _left(storage: str | None, token: str) -> Any:
    """Leaves a token in the storage folder while nodes are asked; yields where, or None without a folder."""
    if storage is None:
        yield None
        return
    folder = Path(storage) / f".doctor-{token}"
    folder.mkdir(parents=True)
    (folder / "driver").write_text(token)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> str | None:
    try:
        # A network file system may show a new file late.
        for _ in range(10):
            if path.is_file():
                return path.read_text()
            time.sleep(0.1)
    except OSError:
        pass
    return None
