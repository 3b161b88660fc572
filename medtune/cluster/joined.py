"""`python -m medtune.cluster.joined HEAD:PORT`: is this machine a living node of the cluster there? For cluster/*.yaml.

The launcher runs a node's start commands again whenever the files of the head changed. `ray stop` would kill the trials
there, so the commands ask this first. A raylet alone says nothing: one outlives its head for up to a minute.
"""

from __future__ import annotations

import socket
import sys

TIMEOUT = 10.0
"""Seconds that the head has for its answer."""


def is_joined(address: str, timeout: float = TIMEOUT) -> bool:
    """Whether the cluster at `address` counts this machine among its living nodes; False where nothing answers."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=timeout).values()
    except Exception:  # whatever the reason: then this node has to be started
        return False
    # The address by which this machine reaches the head is the one its raylet registers.
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        own = probe.getsockname()[0]
    return any(node.node_manager_address == own and node.state == 0 for node in nodes)


if __name__ == "__main__":
    sys.exit(0 if is_joined(sys.argv[1]) else 1)
