"""What must not travel: Ray writes an actor's environment into the logs of every node."""

from __future__ import annotations


def keep_keys_home() -> None:
    """Tune gives its actors the driver's AWS keys by their environment, which Ray logs: leave them out.

    Whoever needs them in a trial's process hands them over by a call. Raises RuntimeError where Ray has changed so that
    this cannot be had.
    """
    from ray.tune.execution import class_cache

    names = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", None)
    if not isinstance(names, set | frozenset):
        raise RuntimeError("this version of Ray passes on the driver's environment in a way medtune does not know")
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
