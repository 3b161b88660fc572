"""A cluster that grows by itself: what it can grow to, and how it learns that more is wanted.

What a trial asks for is tied to machines that are there, so it would never make the cluster grow. Scouts do: placement
groups of a trial's size tied to no machine. One that finds room keeps it until the machine has told of itself and may take
trials, or the autoscaler would take it for idle. They end with the driver, whatever way it ends, so that no machine is kept
for nobody.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medtune.reservation import Reservation

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where a pod reads which namespace it is in."""
HOLD = 120.0
"""Seconds that a scout keeps a machine that may not take trials, and before another is sent then."""
PAUSE = 5.0
"""Seconds before a scout that found room is sent again: trials have the first go at what it found."""


Machine = dict[str, float]
"""What a machine would have, in Ray's words."""


def addable() -> list[Machine]:
    """The machines that the cluster's autoscaler may add or has added; none where there is no autoscaler that says so."""
    found = autoscaling() or {}
    types = found.get("available_node_types", {})
    workers = [about for name, about in types.items() if name != found.get("head_node_type")]
    most = int(found.get("max_workers", 0))
    machines = [
        {name: float(amount) for name, amount in about.get("resources", {}).items()}
        for about in workers
        for _ in range(min(most, int(about.get("max_workers", most))))
    ]
    # Of several kinds not all may come at once: those with the most GPUs.
    return sorted(machines, key=lambda machine: (machine.get("GPU", 0), machine.get("CPU", 0)), reverse=True)[:most]


def head(nodes: Sequence[Mapping[str, Any]]) -> Machine:
    """Of `ray.nodes()`, what the one has that the autoscaler does not count among the machines it adds."""
    return next((dict(node["Resources"]) for node in nodes if "node:__internal_head__" in node["Resources"]), {})


def autoscaling() -> dict[str, Any] | None:
    """The configuration of the autoscaler of the cluster that is attached, as far as this machine can see it.

    Ray's autoscaler tells the cluster nothing of what it may add. So: the file that the autoscaler on this machine was
    started with, as `ray up` does on the head; in a pod of KubeRay's, what Ray makes of the RayCluster there.
    """
    path = autoscalers_file()
    if path is not None:
        with contextlib.suppress(OSError, yaml.YAMLError):
            found = yaml.safe_load(path.read_text())
            return found if isinstance(found, dict) else None
    return kuberays()


def autoscalers_file() -> Path | None:
    """What the attached cluster's autoscaler was started with, if it runs on this machine."""
    # Ray brings it along, and it can be imported once Ray is.
    import psutil
    import ray

    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if address in line and (named := [word for word in line if word.startswith(option)]):
            return Path(named[0].removeprefix(option)).expanduser()
    return None


def kuberays() -> dict[str, Any] | None:
    """What KubeRay's autoscaler works by; None outside a pod of a cluster that grows."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not NAMESPACE.exists():
        return None
    import requests
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    try:
        client = node_provider.KubernetesHttpApiClient(namespace=NAMESPACE.read_text().strip())
        resource = client.get(f"rayclusters/{name}")
        grows = resource["spec"].get("enableInTreeAutoscaling", False)
        return autoscaling_config._derive_autoscaling_config_from_ray_cr(resource) if grows else None
    except (requests.RequestException, KeyError, OSError):
        return None  # a pod that may not read it


class Scouts:
    """The placement groups that make the cluster grow."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.groups: dict[Any, float | None] = {}
        """Those under way, with the time when they found room."""
        self.rest = 0.0

    def send(self, count: int, fit: Collection[str]) -> None:
        """Have so many under way, one for each process of a trial that has no place. `fit`: machines that take trials."""
        import ray
        from ray.util.placement_group import placement_group

        now = time.monotonic()
        for group, since in list(self.groups.items()):
            if since is None and group.wait(0):
                self.groups[group] = since = now
            if since is not None and (_node(group) in fit or now - since > HOLD):
                self.rest = now + (PAUSE if now - since <= HOLD else HOLD)
                self._drop(group)
        for group in list(self.groups)[count:]:
            self._drop(group)
        if now >= self.rest and ray.is_initialized():
            self.groups |= {placement_group([self.reservation.bundle()]): None for _ in range(count - len(self.groups))}

    def _drop(self, group: Any) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(group)
        del self.groups[group]


def _node(group: Any) -> str | None:
    from ray.util.placement_group import placement_group_table

    nodes = (placement_group_table(group) or {}).get("bundles_to_node_id") or {}
    return next(iter(nodes.values()), None)
