"""A Ray cluster of several nodes in one machine, which nobody else's studies find."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ray.cluster_utils import Cluster


@contextlib.contextmanager
def private_cluster(**head: Any) -> Iterator[Cluster]:
    """A cluster with its head; `add_node` adds others. Studies attach to it by `RAY_ADDRESS` alone.

    Its address is not left in Ray's file for that, which every process of this machine that starts Ray would follow.
    """
    with mock.patch("ray._private.utils.write_ray_address"):
        cluster = Cluster()
        try:
            cluster.add_node(include_dashboard=False, **head)
            yield cluster
        finally:
            cluster.shutdown()
