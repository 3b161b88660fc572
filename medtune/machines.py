"""The machines of the cluster as placement knows them: Ray's nodes, and what a look at each one's GPUs told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medtune.cluster import facts
from medtune.placement import Machine

FRESH = 0.5
"""Seconds for which an answer of Ray's about its nodes is used again."""

Gpu = tuple[str, float]
"""Name and bytes of memory."""


def look(in_ray: bool = False) -> Gpu | None:
    """The kind of the GPUs of the machine this runs on; None where NVIDIA's tool does not tell.

    `in_ray`: this is Ray's worker process.
    """
    found = facts.gpus(facts.parent_environment() if in_ray else os.environ)
    return (found[0]["name"], float(found[0]["total"])) if found else None


class Machines:
    """Those that may take trials now; calling it lists them. A machine with GPUs counts once it told what they are."""

    def __init__(self, nodes: Callable[[], Sequence[Mapping[str, Any]]], gpus: bool = True) -> None:
        """`nodes`: entries of `ray.nodes()` that may take trials. `gpus`: whether their GPUs are used."""
        self._nodes = nodes
        self._use = gpus
        self._gpus: dict[str, Gpu | None] = {}
        self._asked: dict[str, Any] = {}
        self._found: list[Machine] = []
        self._until = 0.0

    def __call__(self) -> list[Machine]:
        """The machines, as of half a second ago at most."""
        if time.monotonic() >= self._until:
            self._found = [machine for node in self._nodes() if node["Alive"] and (machine := self._machine(node))]
            self._until = time.monotonic() + FRESH
        return self._found

    def settle(self, seconds: float = 30.0) -> None:
        """Wait until those that are there now have told of themselves."""
        deadline = time.monotonic() + seconds
        self._until = 0.0
        self()
        while self._asked and time.monotonic() < deadline:
            time.sleep(0.1)
            self._until = 0.0
            self()

    def _machine(self, node: Mapping[str, Any]) -> Machine | None:
        have = node["Resources"]
        cards = int(have.get("GPU", 0)) if self._use else 0
        machine = Machine(node["NodeID"], node["NodeManagerHostname"], float(have.get("CPU", 0)), cards)
        if not cards:
            return machine
        if machine.id not in self._gpus and not self._ask(machine.id):
            return None
        gpu = self._gpus[machine.id]
        name = (node.get("Labels") or {}).get("ray.io/accelerator-type") or "GPU"
        kind, memory = gpu if gpu is not None else (name, None)
        return Machine(machine.id, machine.host, machine.cores, cards, kind, memory)

    def _ask(self, node: str) -> bool:
        """Whether a machine has told what its GPUs are; asks it if need be."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node == ray.get_runtime_context().get_node_id():
            self._gpus[node] = look()
            return True
        if node not in self._asked:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked: Any = ray.remote(look).options(num_cpus=0, scheduling_strategy=there)
            self._asked[node] = asked.remote(in_ray=True)
        done, _ = ray.wait([self._asked[node]], timeout=0)
        if not done:
            return False
        try:
            self._gpus[node] = ray.get(self._asked.pop(node))
        except RayError:
            return False  # it went while it was asked; if it did not, it is asked again
        return True
