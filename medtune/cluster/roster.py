"""Which nodes may take trials: those that are alive, were found fit, and are not about to leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from medtune.cluster.facts import package
from medtune.cluster.findings import Finding, diagnose, in_words
from medtune.cluster.nodes import Node, ask, here, staying

FRESH = 1.0
"""Seconds for which what Ray said of its nodes is believed."""
AGAIN = 60.0
"""Seconds after which an unfit node is looked at again: someone may have mended it."""


class Roster:
    """The study's nodes. Those that join are asked for their facts, in the background, before they may take trials."""

    def __init__(
        self,
        fit: Iterable[str],
        *,
        storage: str | None = None,
        say: Callable[[str], None] = lambda line: None,
        ask: Callable[..., list[Node]] = ask,
    ) -> None:
        """`fit`: ids of the nodes that were found fit, or that need no look; `say` is called in `fit_nodes` alone."""
        self._fit = set(fit)
        self._storage = storage
        self._say = say
        self._ask = ask
        self._package = package()  # as it is now: what the driver runs
        self._reference: Node | None = None
        self._looked: dict[str, float] = {}
        self._said: dict[str, str] = {}
        self._found: SimpleQueue[tuple[Node, list[Finding]]] = SimpleQueue()
        self._asking: threading.Thread | None = None
        self._seen: list[dict[str, Any]] = []
        self._until = 0.0
        self._closed = False

    def fit_nodes(self) -> list[dict[str, Any]]:
        """The entries of `ray.nodes()` that may take trials now. Costs a call to Ray once a second, and never waits."""
        now = time.monotonic()
        if now >= self._until:
            self._seen = staying()
            self._until = now + FRESH
        self._hear()
        self._look_at([n for n in self._seen if n["NodeID"] not in self._fit])
        return [n for n in self._seen if n["NodeID"] in self._fit]

    def _hear(self) -> None:
        while not self._found.empty():
            node, findings = self._found.get()
            if all(finding.severity != "error" for finding in findings):
                self._fit.add(node.id)
            told = in_words(findings)
            if told and told != self._said.get(node.id):
                if node.id not in self._fit:
                    self._say(f"{node.label} has joined and takes no trials until this is mended:")
                self._say(told)
            self._said[node.id] = told

    def close(self) -> None:
        """Before Ray is shut down: asks no more. Waits for what is under way for some seconds at most."""
        self._closed = True
        if self._asking is not None:
            self._asking.join(5.0)

    def _look_at(self, nodes: list[dict[str, Any]]) -> None:
        now = time.monotonic()
        due = [n for n in nodes if now >= self._looked.get(n["NodeID"], 0.0)]
        if due and not self._closed and (self._asking is None or not self._asking.is_alive()):
            self._looked.update((n["NodeID"], now + AGAIN) for n in due)
            self._asking = threading.Thread(target=self._examine, args=(due,), daemon=True)
            self._asking.start()

    def _examine(self, nodes: list[dict[str, Any]]) -> None:
        if self._reference is None:
            local = here()
            self._reference = replace(local, facts={**local.facts, "medtune": self._package})
        try:
            answers = self._ask(nodes, self._storage)
        except Exception as error:
            if self._closed:  # Ray was shut down meanwhile
                return
            why = f"could not be asked: {type(error).__name__}: {error}"
            answers = [Node(id=n["NodeID"], ip=n["NodeManagerAddress"], silence=why) for n in nodes]
        for node in answers:
            self._found.put((node, diagnose([node], self._reference)))
