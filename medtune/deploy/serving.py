"""`medtune serve`: a bundle behind HTTP, its replicas in a Ray of their own on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from medtune import __version__
from medtune.deploy.bundle import Bundle
from medtune.deploy.front import Fleet, Front, Limits, ReplicaLost
from medtune.deploy.patience import Patience
from medtune.errors import ConfigError, MedtuneError, ServeError
from medtune.launch import start_local_ray

TOKEN = "MEDTUNE_SERVE_TOKEN"
"""Environment variable with the token."""
SHORTEST_TOKEN = 16
APP = "medtune"
LOOK = 0.5
"""Seconds between two looks at the replicas."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a bundle is served; see `medtune serve --help`."""

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    threads: int | None = None
    batch: int = 16
    batch_wait_ms: float = 5.0
    max_mb: float = 20.0
    waiting: int = 64
    seconds: float = 30.0
    token_file: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535), ("replicas", 1, 256), ("batch", 1, 1024), ("batch_wait_ms", 0, 1000),
            ("max_mb", 0.001, 200), ("waiting", 1, 4096), ("seconds", 0.1, 3600),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")

    def threads_each(self) -> int:
        """Threads that a replica computes with: as asked, else its share of this machine's cores."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.replicas)


def serve(config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve a bundle until a signal ends it; what was started is gone then.

    Raises BundleError for a bundle that is damaged and ConfigError for what cannot be served so, both before anything is
    started; ServeError when Ray or the replicas cannot be started, or Ray is gone.
    """
    bundle = Bundle.open(config.bundle)
    token = read_token(config.token_file)
    require_token(config.host, token)
    with ended_by_signals() as arm, contextlib.ExitStack() as ends:
        listener = ends.enter_context(listen(config.host, config.port))
        fleet = Fleet(config.replicas)
        limits = Limits(max_bytes=round(config.max_mb * 1e6), waiting=config.waiting, seconds=config.seconds)
        front = Front(fleet, limits, about(bundle, limits), token)
        finish = ends.enter_context(answering(front, listener))
        say(f"{bundle.model}, bundle {bundle.version}: the replicas are starting")
        ends.enter_context(own_ray())
        arm()  # Ray has put a handler of its own in place
        start_replicas(config, bundle, fleet)
        ends.callback(finish)  # before the replicas go
        say(f"serving on {address(listener)} (Ctrl-C ends it)")
        watch(fleet, say)


def about(bundle: Bundle, limits: Limits) -> dict[str, Any]:
    """What GET /version answers."""
    return {
        "bundle": bundle.version,
        "medtune": __version__,
        "model": bundle.model,
        "image_size": bundle.image_size,
        "classes": list(bundle.classes),
        "positive": None if bundle.positive is None else bundle.classes[bundle.positive],
        "threshold": bundle.threshold,
        "temperature": bundle.temperature,
        "limits": {"max_bytes": limits.max_bytes, "waiting": limits.waiting, "seconds": limits.seconds},
        "caveats": CAVEATS,
    }


CAVEATS = [
    "Not a medical device: for research, not for the diagnosis or treatment of anybody.",
    "A probability is one among images like those it was trained and calibrated on; an image that is marked as unlike "
    "them gets figures that say little.",
]


def read_token(file: Path | None) -> str | None:
    """The token that requests must bring: a file's, else $MEDTUNE_SERVE_TOKEN's, which no process started later sees."""
    given = os.environ.pop(TOKEN, None)
    source = f"${TOKEN}"
    if file is not None:
        source = str(file)
        try:
            given = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token file {file}: {error}") from None
    if given is None:
        return None
    token = given.strip()
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        rule = f"at least {SHORTEST_TOKEN} printable ASCII characters without spaces"
        raise ConfigError(f"the token in {source} must have {rule}: `openssl rand -hex 32` makes one")
    return token


def require_token(host: str, token: str | None) -> None:
    """Refuse an address that others can reach where nothing keeps them out."""
    try:
        found = {ipaddress.ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is no address of this machine: {error}") from None
    if token is None and not all(ip.is_loopback for ip in found):
        raise ConfigError(
            f"host {host} lets other machines in, and there is no token to keep strangers out: give one in --token-file "
            f"or ${TOKEN}, or stay on 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError for a port that is taken or not ours to take."""
    family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}. --port takes another") from None
    return listener


def address(listener: socket.socket) -> str:
    """Where a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def answering(front: Front, listener: socket.socket) -> Iterator[Callable[[], None]]:
    """Answer HTTP in a thread. Yields what ends it; requests that are under way get a second more."""
    settings = uvicorn.Config(
        front.app(),
        http=Patience,  # on h11: its limit on headers, and what comes after an early answer is read: the client sees it
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)

    def finish() -> None:
        server.should_exit = True
        thread.join(10)

    thread.start()
    try:
        yield finish
    finally:
        finish()


@contextlib.contextmanager
def own_ray() -> Iterator[None]:
    """A Ray for the replicas alone, whatever cluster this machine is part of."""
    import ray

    import psutil  # isort: skip  # Ray brings it, and lets it be imported

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray").setLevel(logging.ERROR)
    others = set(psutil.Process().children(recursive=True))
    try:
        _start()
        yield
    finally:
        started = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        # Ray's agents that have only just begun do not notice that it is gone.
        for process in psutil.wait_procs(started, timeout=3)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _start() -> None:
    try:
        start_local_ray()
    except MedtuneError:
        raise
    except Exception as error:  # Ray raises the class itself where its processes take too long to start
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ServeError(f"Ray does not start: {why} On a busy machine a second try may help") from None


def start_replicas(config: ServeConfig, bundle: Bundle, fleet: Fleet) -> None:
    """Have the bundle's replicas up; they end with Ray. Raises ServeError where they do not start."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from medtune.deploy.replica import DEPLOYMENT

    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # its import has set another
    gpus = ray.cluster_resources().get("GPU", 0)
    replica = DEPLOYMENT.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 0, "num_gpus": gpu_share(gpus, config.replicas)},
        max_ongoing_requests=2 * config.batch,
        health_check_period_s=1,
        health_check_timeout_s=10,
    )
    wait = config.batch_wait_ms / 1000
    where = str(config.bundle.resolve())
    app = replica.bind(where, bundle.version, batch=config.batch, wait=wait, threads=config.threads_each())
    ray_serve.start(proxy_location="Disabled", logging_config=LoggingConfig(enable_access_log=False))
    try:
        fleet.ask = asker(ray_serve.run(app, name=APP, route_prefix=None))
    except RuntimeError as error:
        raise ServeError(f"the replicas do not start: {error}") from None
    fleet.note(*look())


def gpu_share(gpus: float, replicas: int) -> float:
    """Share of a GPU for each replica, so that all find room: 3 on 2 GPUs take half a GPU each."""
    return 1 / -(-replicas // int(gpus)) if gpus >= 1 else 0


def asker(handle: Any) -> Callable[[bytes, bool], Any]:
    """How the front asks a replica."""
    from ray.exceptions import RayActorError

    async def ask(image: bytes, heat_map: bool) -> tuple[int, dict[str, Any]]:
        response = handle.remote(image, heat_map)
        try:
            return await response
        except RayActorError:
            raise ReplicaLost from None
        finally:
            response.cancel()  # nothing where it is done; else nobody waits for it any more

    return ask


def watch(fleet: Fleet, say: Callable[[str], None]) -> None:
    """Keep what is known of the replicas fresh, and say when it changes. Raises ServeError when Ray is gone."""
    from ray.exceptions import RayError

    while True:
        try:
            up, reason = look()
        except RayError as error:
            raise ServeError(f"Ray is gone: {str(error).splitlines()[0]}") from None
        if up != fleet.up:
            say(f"{up} of {fleet.wanted} replicas up")
        fleet.note(up, reason)
        time.sleep(LOOK)


def look() -> tuple[int, str]:
    """Replicas that are up, and why not all are."""
    from ray import serve as ray_serve
    from ray.serve._private.common import ReplicaState

    app = ray_serve.status().applications[APP]
    deployment = app.deployments["Replica"]
    return deployment.replica_states.get(ReplicaState.RUNNING, 0), deployment.message or "the replicas are starting again"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM end what is inside, and a second one does not disturb its clearing up.

    Yields what puts the handlers in place again.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def arm() -> None:
        for each in numbers:
            signal.signal(each, end)

    old = {each: signal.getsignal(each) for each in numbers}
    arm()
    try:
        yield arm
    except KeyboardInterrupt:
        pass
    except SystemExit as error:
        if error.code != signal.SIGTERM:  # so Ray's own handler ends it while Ray starts
            raise
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
