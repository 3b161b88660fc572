"""A cluster that grows by itself: what it can grow to, and how it learns that more is wanted.

What a trial asks for is tied to machines that are there, so it would never make the cluster grow. Scouts do: placement
groups of a trial's size tied to no machine. One that finds room is taken away at once, and the machine it found counts as
soon as it has told of itself. They end with the driver, whatever way it ends, so that no machine is kept for nobody.
"""

from __future__ import annotations

import time
from typing import Any

from medtune.reservation import Reservation

PAUSE = 5.0
"""Seconds before a scout that found room is sent again: trials have the first go at what it found."""


def growable() -> dict[str, float]:
    """The most of each resource that the cluster's autoscaler may bring it to; empty where there is none."""
    from ray._private.state import state

    return {name: float(amount) for name, amount in (state.get_max_resources_from_cluster_config() or {}).items()}


class Scouts:
    """The placement groups that make the cluster grow."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.groups: list[Any] = []
        self.rest = 0.0

    def send(self, count: int) -> None:
        """Have so many under way, one for each process of a trial that has no place."""
        import ray
        from ray.util.placement_group import placement_group

        back = [group for group in self.groups if group.wait(0)]
        if back:
            self.rest = time.monotonic() + PAUSE
        self._drop(back)
        self._drop(self.groups[count:])
        if time.monotonic() >= self.rest and ray.is_initialized():
            self.groups += [placement_group([self.reservation.bundle()]) for _ in range(count - len(self.groups))]

    def _drop(self, groups: list[Any]) -> None:
        from ray.util.placement_group import remove_placement_group

        for group in list(groups):
            remove_placement_group(group)
            self.groups.remove(group)
