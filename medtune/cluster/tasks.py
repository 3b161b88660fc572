"""Short tasks, each pinned to a node, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def on(node: Mapping[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """Begin a call of `function` on one of `ray.nodes()`; it takes none of what trials reserve."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=there).remote(*arguments)


def answers_of(asked: Sequence[Any], patience: float) -> list[tuple[float, Any]]:
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
