"""A Ray cluster of several nodes on this machine, each with a user cache folder of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._common import utils as common_utils
from ray._private import utils as private_utils
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

QUICK = {
    "health_check_initial_delay_ms": 3000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
"""As the templates in cluster/ set it: a node is found dead within seconds."""


class Nodes:
    """A head that trains nothing, where the driver is, and nodes that come and go."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        # It would have every study of this machine's user attach to this cluster.
        patch.setattr(private_utils, "write_ray_address", lambda *_: None)
        patch.setattr(common_utils, "reset_ray_address", lambda *_: None)
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "_system_config": QUICK, "include_dashboard": False},
        )
        self.named: dict[str, Any] = {}
        patch.setenv("RAY_ADDRESS", self.cluster.address)

    def add(self, name: str, cpus: int = 1) -> None:
        """A further node."""
        env = {"XDG_CACHE_HOME": str(self.folder / name)}
        self.named[name] = self.cluster.add_node(num_cpus=cpus, env_vars=env, resources={name: 1})

    def remove(self, name: str) -> None:
        """End a node."""
        self.cluster.remove_node(self.named.pop(name))

    def id(self, name: str) -> str:
        """Ray's id of a node."""
        return str(self.named[name].node_id)

    def kill_raylet(self, name: str) -> None:
        """SIGKILL, as when the machine's power goes."""
        os.kill(self._raylet(name), signal.SIGKILL)

    def kill_trial(self, name: str) -> int:
        """SIGKILL to a process of a node that trains; returns how many there were."""
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in _children(self._raylet(name))}
        found = [pid for pid, title in titles.items() if b"Trainable" in title or b"Tiny" in title]
        assert found, titles
        os.kill(found[0], signal.SIGKILL)
        return len(found)

    def drain(self, name: str, seconds: float) -> None:
        """As a cloud's notice that a spot machine goes in so many seconds."""
        client = ray._raylet.GcsClient(address=self.cluster.address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = client.drain_node(self.id(name), reason, "spot notice", int((time.time() + seconds) * 1000))
        assert accepted, why

    def down(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()

    def _raylet(self, name: str) -> int:
        return int(self.named[name].all_processes["raylet"][0].process.pid)

    def cache(self, name: str) -> Path:
        """A node's user cache folder."""
        return self.folder / name / "medtune"


def _children(pid: int) -> list[int]:
    """A process's children, whichever of its threads started them."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
