"""Which processes of ended trials Ray Tune keeps for the next ones."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ray.tune.utils.object_cache import _ObjectCache


class WarmProcesses(_ObjectCache):
    """Keeps each process until Tune has asked for the trial that may take its place.

    Tune's own cache drops it as soon as a trial with another request is being started: with requests that are tied to
    machines that is nearly always so on a cluster, and a process takes seconds to start.
    """

    def __init__(self) -> None:
        super().__init__(may_keep_one=True)
        self._new: list[Any] = []

    def cache_object(self, key: Any, obj: Any) -> bool:
        """Keep it, in any case."""
        self._cached_objects[key].append(obj)
        self._num_cached_objects += 1
        self._new.append(obj)
        return True

    def flush_cached_objects(self, force_all: bool = False) -> Generator[Any, None, None]:
        """Let go of those that were there at the last flush and that no trial waits for, but for the last one."""
        spared, self._new = ([] if force_all else self._new), []
        expected = any(count > 0 for count in self._max_num_objects.values())
        for key, objects in self._cached_objects.items():
            for obj in list(objects):
                last = self._num_cached_objects == 1 and not expected and not force_all
                needed = not force_all and len(objects) <= self._max_num_objects[key]
                if obj in spared or last or needed:
                    continue
                objects.remove(obj)
                self._num_cached_objects -= 1
                yield obj
