"""Hosts that the launcher's file names and that are not in the cluster: why, found out by one ssh to each."""

from __future__ import annotations

import json
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medtune.cluster.findings import Finding

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""What `ray up` leaves on the head: the user's file, filled in."""
SECONDS = 5
"""For a host to answer."""
_LOOK = (
    "import json, platform, importlib.metadata as m, subprocess as s\n"
    "try: ray = m.version('ray')\n"
    "except m.PackageNotFoundError: ray = None\n"
    "up = s.run(['pgrep', '-x', 'raylet'], capture_output=True).returncode == 0\n"
    "print('medtune ' + json.dumps({'python': platform.python_version(), 'ray': ray, 'raylet': up}))"
)


@dataclass(frozen=True)
class Launcher:
    """What `ray up` was told of an SSH cluster."""

    head: str
    workers: tuple[str, ...]
    user: str
    key: str | None
    container: bool
    """Whether Ray runs in a container, out of an ssh's sight."""


def launcher(path: Path | None = None) -> Launcher | None:
    """What the launcher's file on this head says; None without one, or for a cloud, whose hosts have no names yet."""
    try:
        config = yaml.safe_load((path or BOOTSTRAP.expanduser()).read_text())
        provider, auth = config["provider"], config["auth"]
        if provider["type"] != "local" or not provider.get("worker_ips"):
            return None
        return Launcher(
            head=provider["head_ip"],
            workers=tuple(provider["worker_ips"]),
            user=auth["ssh_user"],
            key=auth.get("ssh_private_key"),
            container=bool(config.get("docker")),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def absent(told: Launcher | None, nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Findings for the hosts the launcher was told of that are not among `ray.nodes()`, in `SECONDS` or a little more."""
    here = {node["NodeManagerAddress"] for node in nodes if node["Alive"]}
    if told is None or _address(told.head) not in here:  # left from another cluster
        return []
    missing = [host for host in told.workers if _address(host) not in here]
    with ThreadPoolExecutor(max(1, len(missing))) as pool:
        reasons = pool.map(lambda host: _why(told, host), missing)
        return [Finding("error", host, *why) for host, why in zip(missing, reasons, strict=True)]


def _address(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _why(told: Launcher, host: str) -> tuple[str, str]:
    """What is wrong with a host, and the remedy."""
    address = _address(host)
    if address is None:
        return "is not in the cluster: there is no host of that name", "Correct worker_ips in cluster.yaml"
    try:
        socket.create_connection((address, 22), timeout=SECONDS).close()
    except OSError as error:
        why = error.strerror or "no answer in time"
        return (
            f"is not in the cluster: nothing answers on its SSH port ({why})",
            "Is it on, and is it this host that worker_ips in cluster.yaml should name?",
        )
    done = _ssh(told, address)
    if done is None or done.returncode == 255:
        said = (done.stderr.strip().splitlines() if done else None) or ["no answer in time"]
        return (
            f"is not in the cluster: ssh as {told.user} fails ({said[-1].rstrip('.')})",
            "Let in the key that cluster.yaml names (ssh_private_key): "
            f"ssh-copy-id -i KEY.pub {told.user}@{host}; then `ray up --no-restart cluster.yaml`",
        )
    return _why_not_joined(told, done.stdout)


def _ssh(told: Launcher, address: str) -> subprocess.CompletedProcess[str] | None:
    options = ["BatchMode=yes", f"ConnectTimeout={SECONDS}", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    options += ["LogLevel=ERROR"]
    key = ["-i", str(Path(told.key).expanduser()), "-o", "IdentitiesOnly=yes"] if told.key else []
    # As the launcher does: with what the user's shell sets up, PATH above all.
    look = f"true && source ~/.bashrc && python -c {shlex.quote(_LOOK)}"
    command = ["ssh", *key, *(word for o in options for word in ("-o", o)), f"{told.user}@{address}"]
    try:
        return subprocess.run(
            [*command, f"bash --login -c -i {shlex.quote(look)}"],
            capture_output=True, text=True, timeout=3 * SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, OSError):
        return None


def _why_not_joined(told: Launcher, said: str) -> tuple[str, str]:
    import ray

    again = "then `ray up --no-restart cluster.yaml` starts it again and kills nothing that runs"
    if told.container:
        return "is not in the cluster, though ssh lets us in", f"Look at Ray's logs in its container; {again}"
    lines = [line.removeprefix("medtune ") for line in said.splitlines() if line.startswith("medtune ")]
    found = json.loads(lines[-1]) if lines else {"python": None}
    if found["python"] != platform.python_version():
        its = f"Python {found['python']}" if found["python"] else "no Python"
        return (
            f"is not in the cluster: it has {its}, the head has {platform.python_version()}, and Ray wants the same",
            f"Install it there, make the environment anew; {again}",
        )
    if found["ray"] != ray.__version__:
        its = f"Ray {found['ray']}" if found["ray"] else "no Ray"
        remedy = f"There: pip install 'ray[tune]=={ray.__version__}'; {again}"
        return f"is not in the cluster: it has {its}, the head has {ray.__version__}", remedy
    if not found["raylet"]:
        return "is not in the cluster: Ray does not run there", f"Look at /tmp/ray/session_latest/logs there; {again}"
    return (
        "is not in the cluster, though Ray runs there",
        "It may be joining now; else it runs in another cluster (`ray stop` there ends that), or a firewall is between them",
    )
