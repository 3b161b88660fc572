"""What a trial's process knows of its cluster: whether it is still there, and whether this machine is about to leave it.

A machine that is cut off keeps its processes, and its trials go on elsewhere meanwhile. So a process that cannot reach the
cluster's head for half a minute ends. Two threads, because a question to a head that is gone can hang.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from medtune.errors import Leaving

PATIENCE = 30.0
"""Seconds without the head after which a process ends."""
EVERY = 5.0
"""Seconds between looks."""
_TIMEOUT = 2.0
_LAST_WORDS = 5.0


class Lifeline:
    """Watches the head at `address` (host:port) from this process; never ends but with it.

    `draining`: asks whether this machine is about to leave; it may hang or raise when the head is gone. `every`: seconds
    between looks; `patience`: seconds without the head after which the process ends, by `end`.
    """

    def __init__(
        self,
        address: str,
        draining: Callable[[], bool],
        *,
        every: float,
        patience: float,
        end: Callable[[], object] = lambda: os._exit(1),
    ) -> None:
        host, _, port = address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._draining = draining
        self._every = every
        self._patience = patience
        self._end = end
        self.leaving = False
        """Whether this machine takes no more trials and its processes should save what they have."""
        self.note: Callable[[str], object] = lambda words: None
        """Where the reason for an end is written down."""

    def start(self) -> None:
        """Begin to watch."""
        for watch in (self._watch_head, self._watch_drain):
            threading.Thread(target=watch, name=f"medtune{watch.__name__}", daemon=True).start()

    def require_staying(self) -> None:
        """Raises Leaving when this machine is about to."""
        if self.leaving:
            raise Leaving("this machine is about to leave the cluster and takes no more trials")

    def _watch_head(self) -> None:
        reached = time.monotonic()
        while True:
            if self._reachable():
                reached = time.monotonic()
            elif time.monotonic() - reached >= self._patience:
                self._give_up(time.monotonic() - reached)
                return
            time.sleep(self._every)

    def _reachable(self) -> bool:
        try:
            with socket.create_connection(self._address, _TIMEOUT):
                return True
        except OSError:
            return False

    def _give_up(self, seconds: float) -> None:
        words = f"the cluster's head {':'.join(map(str, self._address))} could not be reached for {seconds:.0f} s"
        # The storage may be what is gone: writing to it could hang for ever.
        last_words = threading.Thread(target=self.note, args=(words,), daemon=True)
        last_words.start()
        last_words.join(_LAST_WORDS)
        self._end()

    def _watch_drain(self) -> None:
        while not self.leaving:
            try:
                self.leaving = self._draining()
            except Exception:
                # Of Ray's, of many kinds: the other thread knows whether the head is gone.
                self.leaving = False
            time.sleep(self._every)


def to_this_cluster() -> Lifeline:
    """A lifeline from this Ray worker to the head of its cluster, begun."""
    import ray
    from ray._private.state import state  # ray.nodes() says nothing of draining

    context = ray.get_runtime_context()
    node = context.get_node_id()
    line = Lifeline(context.gcs_address, lambda: node in state.get_draining_nodes(), every=EVERY, patience=PATIENCE)
    line.start()
    return line
