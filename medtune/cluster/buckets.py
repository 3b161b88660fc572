"""Whether each node can work in the bucket that a study is kept in, with what the driver knows of it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from medtune.cluster.tasks import answers_of, on
from medtune.errors import MedtuneError
from medtune.storage.bucket import Bucket


def try_bucket(uri: str, nodes: Sequence[Mapping[str, Any]], patience: float) -> dict[str, dict[str, Any]]:
    """By node id, the fact `storage` of each of some of `ray.nodes()`: of the same form as a shared folder's.

    Raises StudyError where this process cannot work in the bucket itself.
    """
    import ray

    from medtune.storage.desk import desk, told

    environment = told()
    keeper = desk(here=True)  # credentials travel by calls of its methods alone
    ray.get(keeper.keep.remote(environment))
    bucket = Bucket(uri, environment)
    bucket.require_usable()
    token = secrets.token_hex(8)
    key = f".doctor-{token}"
    bucket.write(key, token.encode())
    try:
        tried = answers_of([on(node, use_bucket, uri, key) for node in nodes], patience)
    finally:
        bucket.delete([key])
    return {
        node["NodeID"]: {"storage": {"path": uri, "read": reason is None, "reason": reason}}
        for node, (_, reason) in zip(nodes, tried, strict=True)
    }


def use_bucket(uri: str, key: str) -> str | None:
    """On a node: read what the driver wrote, write something of one's own; returns what is wrong."""
    from medtune.storage.desk import credentials

    try:
        bucket = Bucket(uri, credentials())
        bucket.require_usable()
        return None if bucket.read(key) == key.removeprefix(".doctor-").encode() else "what the driver wrote is not there"
    except (MedtuneError, OSError) as error:
        return str(error)
