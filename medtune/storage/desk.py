"""An actor at the driver's side: it gives trials the storage's credentials, and takes their word of storage that fails.

Credentials are in its memory and nowhere else: they come and go by calls of its methods, so neither Ray's saved
configuration, nor an actor's arguments, nor a trial's configuration or logs hold them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from medtune.storage.bucket import VARIABLES

NAME = "medtune-desk"
LISTEN_SECONDS = 2.0
"""Between two looks of the driver for what was said."""
_ANSWER_SECONDS = 60.0
_hidden: dict[str, str] = {}
"""Keys that are kept out of the environment now."""
_COPIED_BY_TUNE = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")


class Desk:
    """The actor; see the module's docstring."""

    def __init__(self) -> None:
        self._environment: dict[str, str] = {}
        self._words: list[str] = []

    def keep(self, environment: Mapping[str, str]) -> None:
        """What clients of the storage are told."""
        self._environment = dict(environment)

    def environment(self) -> dict[str, str]:
        """What was kept."""
        return self._environment

    def say(self, words: str) -> None:
        """For the driver's screen."""
        self._words.append(words)

    def heard(self) -> list[str]:
        """What was said since the last call."""
        words, self._words = self._words, []
        return words


def desk(here: bool = False) -> Any:
    """The desk of this process's study, begun when it is first asked for; `here`: on this node.

    It lives as long as who began it holds on to what is returned.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy: Any = "DEFAULT"  # not in a trial's own reservation
    if here:
        strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": NAME, "get_if_exists": True, "num_cpus": 0, "scheduling_strategy": strategy}
    return ray.remote(Desk).options(**options).remote()


@functools.cache
def _asked() -> Any:
    """The desk, for a process of a trial, which is of one study as long as it lives."""
    return desk()


def credentials() -> dict[str, str]:
    """What the driver was told of the storage, asked for from a trial's process; nothing where Ray does not run."""
    import ray

    if not ray.is_initialized():
        return {}
    return dict(ray.get(_asked().environment.remote(), timeout=_ANSWER_SECONDS))


def tell(words: str) -> None:
    """Say something on the driver's screen, from any process of the study; without Ray it is not said."""
    import ray

    if ray.is_initialized():
        node = ray.util.get_node_ip_address()
        _asked().say.remote(f"{node}: {words}")


@contextlib.contextmanager
def keys_hidden() -> Iterator[None]:
    """Keep storage keys out of this process's environment while Tune runs.

    Tune copies them into the runtime environment of its actors, which Ray writes into its logs.
    """
    _hidden.update({name: os.environ.pop(name) for name in _COPIED_BY_TUNE if name in os.environ})
    try:
        yield
    finally:
        os.environ.update(_hidden)
        _hidden.clear()


def told() -> dict[str, str]:
    """What this process was told of the storage by its environment, hidden or not."""
    environment = {**os.environ, **_hidden}
    return {name: environment[name] for name in VARIABLES if name in environment}


class Listener:
    """Repeats on the driver's screen what is said at the desk, while a launch lasts."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="desk")

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(LISTEN_SECONDS)

    def _listen(self) -> None:
        import ray

        while not self._end.wait(LISTEN_SECONDS):
            try:
                heard: list[str] = ray.get(ray.get_actor(NAME).heard.remote(), timeout=LISTEN_SECONDS)
            except ValueError:
                continue  # nobody has asked for a desk yet
            except Exception:
                # Ray is going down, or is busy: words are for people, no study depends on them.
                continue
            for words in heard:
                self._say(words)
