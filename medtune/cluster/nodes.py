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
    return Node(id="", ip="this machine", facts=facts.gather(storage))


def ask(nodes: Sequence[Mapping[str, Any]], storage: str | None = None, patience: float = PATIENCE) -> list[Node]:
    """The facts of some of `ray.nodes()`, in their order; needs a driver that Ray is attached to.

    `storage`: the studies' folder, which each node reads from and writes to while it is asked.
    """
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(facts)
    gather, clock = (_task(function) for function in (facts.gather, facts.clock))
    token = secrets.token_hex(8)
    with _left(storage, token) as folder:
        sent = time.time()
        asked = [
            gather.options(**_pinned(node)).remote(storage, token, node["NodeID"], True) for node in nodes
        ]
        answers = _answers(asked, patience)
        heard = {
            node["NodeID"]: _bounds(sent, at, answer["began"], answer["ended"])
            for node, (at, answer) in zip(nodes, answers, strict=True)
            if isinstance(answer, dict)
        }
        # Starting a process took most of the first round trip, so it says little of the clock; the second finds it warm.
        well = [node for node in nodes if node["NodeID"] in heard]
        sent = time.time()
        for node, (at, times) in zip(
            well, _answers([clock.options(**_pinned(node)).remote() for node in well], patience), strict=True
        ):
            if isinstance(times, tuple):
                first, second = heard[node["NodeID"]], _bounds(sent, at, *times)
                heard[node["NodeID"]] = (max(first[0], second[0]), min(first[1], second[1]))
        return [
            Node(
                id=node["NodeID"],
                ip=node["NodeManagerAddress"],
                gpus=node["Resources"].get("GPU", 0.0),
                facts=answer if isinstance(answer, dict) else {},
                silence=None if isinstance(answer, dict) else str(answer),
                skew=heard.get(node["NodeID"], (0.0, 0.0)),
                storage_seen=folder is None or _read(folder / node["NodeID"]) == token,
            )
            for node, (_, answer) in zip(nodes, answers, strict=True)
        ]


def _task(function: Any) -> Any:
    import ray

    return ray.remote(num_cpus=0, max_retries=0)(function)


def _pinned(node: Mapping[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _answers(asked: Sequence[Any], patience: float) -> list[tuple[float, Any]]:
    """When each answer came, and the answer, or the reason why there is none."""
    import ray

    left, until = list(asked), time.monotonic() + patience
    came: dict[Any, tuple[float, Any]] = {}
    while left and (rest := until - time.monotonic()) > 0:
        done, left = ray.wait(left, num_returns=1, timeout=rest)
        for ref in done:
            try:
                came[ref] = (time.time(), ray.get(ref))
            except Exception as error:  # whatever befell it there is the node's answer
                came[ref] = (time.time(), _last_line(error))
    for ref in left:
        ray.cancel(ref, force=True)
    return [came.get(ref, (time.time(), f"no answer within {patience:.0f} s")) for ref in asked]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"


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
