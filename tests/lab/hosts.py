"""Several hosts on one machine: namespaces of their own, joined by a bridge, each with sshd. Needs root.

    with Lab(folder) as lab:                        # hosts cli (the user's laptop), head, w1, w2
        lab.install("cli")                          # this checkout as ~/medtune
        print(lab.run("cli", "cd medtune && ray up -y cluster.yaml").stdout)
        lab.cut("w1"); lab.heal("w1"); lab.kill_process("w2", "raylet/raylet"); lab.kill_host("w2"); lab.start_host("w2")

A host has /root, /tmp, /dev/shm and /run of its own, sees the folder /mnt/shared that all share, and the rest of the machine
read-only. There is no route out of the lab. Its `~/medtune/.venv` is as `make env` would have left it. Nothing has a name on
the machine, so that labs run side by side, with the same addresses.

`python tests/lab/hosts.py FOLDER` brings a lab up, says how to enter its hosts, and takes it down at Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOOT = Path(__file__).with_name("boot.sh")
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync")
NOT_CODE = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "*.egg-info")
# However the test ends, no host outlives it.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


def why_not() -> str | None:
    """Why no lab can be brought up here, or None."""
    if os.name != "posix" or os.getuid() != 0:
        return "the lab needs root (network namespaces)"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"the lab needs {', '.join(missing)}: apt-get install openssh-server openssh-client rsync iproute2"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"], capture_output=True
    )
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


def wait_until(true: Callable[[], Any], seconds: float, what: str, every: float = 0.1) -> Any:
    """What `true` returns once it is true. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while True:
        if found := true():
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)


def address(host: str) -> str:
    """10.77.0.1 is cli, .11 head, then w1, w2, ..."""
    return {"cli": "10.77.0.1", "head": "10.77.0.11"}.get(host) or f"10.77.0.{11 + int(host[1:])}"


class Lab:
    """Hosts on this machine; a context manager. `folder` holds their disks and the shared folder."""

    def __init__(self, folder: Path, hosts: Sequence[str] = ("cli", "head", "w1", "w2")) -> None:
        self.folder = folder.resolve()
        self.hosts = tuple(hosts)
        self.shared = self.folder / "shared"
        self.outer: dict[str, subprocess.Popen[bytes]] = {}
        self.started: list[subprocess.Popen[str]] = []
        self.switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Bring all hosts up; returns once each of them answers on its SSH port."""
        self.shared.mkdir(parents=True, exist_ok=True)
        for key in ("key", "host_key"):
            if not (self.folder / key).exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        lines = ["127.0.0.1 localhost", *(f"{address(name)} {name}" for name in (*self.hosts, "w3", "w4"))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        self.switch = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "infinity"])
        wait_until(lambda: self._own_network(self.switch.pid), 10, "the lab's switch")  # type: ignore[union-attr]
        self._on_switch("ip link add bridge type bridge && ip link set bridge up")
        try:
            for host in self.hosts:
                self._boot(host)
            for host in self.hosts:
                self._wait_booted(host)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End every process of every host, and the hosts."""
        for process in self.started:
            process.kill()
        for host in list(self.outer):
            self.kill_host(host)
        if self.switch is not None:
            self.switch.kill()
            self.switch.wait()
            self.switch = None
        for process in self.started:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self.started.clear()

    def start_host(self, host: str) -> None:
        """Boot a host that was killed, with the disk it had, or a further one (w3, w4)."""
        self._boot(host)
        self._wait_booted(host)

    def kill_host(self, host: str) -> None:
        """Power off: no process of it gets a word in."""
        outer = self.outer.pop(host)
        outer.kill()  # unshare --kill-child: the host's first process goes with it, and with that all others
        outer.wait()
        # The kernel removes a network some time after its last process; the next boot needs the name on the switch.
        self._on_switch(f"ip link del v-{host} 2>/dev/null || true")

    def wipe(self, host: str) -> None:
        """Forget the disk of a host that is off: what boots next is another machine of that name."""
        assert host not in self.outer, f"{host} is on"
        shutil.rmtree(self.disk(host))

    def cut(self, host: str) -> None:
        """Pull the network cable."""
        self._on_switch(f"ip link set v-{host} down")

    def heal(self, host: str) -> None:
        """Plug it in again."""
        self._on_switch(f"ip link set v-{host} up")

    def install(self, *hosts: str) -> None:
        """This checkout as ~/medtune on each, as `git clone` or the launcher would have put it there."""
        excludes = [f"--exclude={pattern}" for pattern in NOT_CODE]
        for host in hosts:
            target = self.disk(host) / "root" / "medtune"
            subprocess.run(["rsync", "-a", *excludes, f"{ROOT}/", f"{target}/"], check=True)
            (target / ".venv" / ".installed").touch()  # newer than pyproject.toml: `make env` has nothing to do

    def disk(self, host: str, path: str = "") -> Path:
        """Where the machine sees a host's disk, or a file in its /root or /tmp."""
        return self.folder / "disks" / host / path.lstrip("/")

    def run(
        self,
        host: str,
        command: str,
        *,
        timeout: float = 120,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line of bash on a host, in ~, with the environment's programs on the path.

        Raises RuntimeError with all it said if it fails and `check` is set; subprocess.TimeoutExpired.
        """
        done = subprocess.run(
            self._entering(host, command, env), input=stdin or "", capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"{host}: {command!r} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def popen(
        self, host: str, command: str, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command line on a host; `down` ends it. Options as for subprocess.Popen."""
        process = subprocess.Popen(self._entering(host, command, env), text=True, **{"stdin": subprocess.DEVNULL} | options)
        self.started.append(process)
        return process

    def pids(self, host: str, pattern: str) -> list[int]:
        """Processes of a host, by its own numbers, whose command line matches."""
        # Brackets: the shell that runs pgrep must not find itself.
        found = self.run(host, f"pgrep -f '[{pattern[0]}]{pattern[1:]}'", check=False)
        return [int(line) for line in found.stdout.split()]

    def kill_process(self, host: str, pattern: str, number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to the host's processes whose command line matches; returns their numbers."""
        pids = self.pids(host, pattern)
        if pids:
            self.run(host, f"kill -{int(number)} {' '.join(map(str, pids))}", check=False)
        return pids

    def first_process(self, host: str) -> int:
        """The machine's number for a host's first process, for nsenter."""
        outer = self.outer[host].pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(children[0]) if children else 0

    def _boot(self, host: str) -> None:
        assert self.switch is not None, "the lab is down"
        assert host not in self.outer, f"{host} is on"
        self.disk(host).mkdir(parents=True, exist_ok=True)
        packages = sysconfig.get_paths()["purelib"]
        script = ["bash", str(BOOT), host, address(host), str(self.folder), packages, sys.base_prefix, packages]
        base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        with open(self.folder / f"{host}.log", "ab") as log:
            spaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc")
            self.outer[host] = subprocess.Popen(
                [*DIES_WITH_US, "unshare", *spaces, "--fork", "--kill-child", *script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHON": str(base)},
                start_new_session=True,
            )
        pid = wait_until(lambda: self.first_process(host), 10, f"{host} to boot", every=0.01)
        self._on_switch(f"ip link add v-{host} type veth peer name eth0 netns {pid}")
        self._on_switch(f"ip link set v-{host} master bridge up")
        # A host that boots again has the network card it had: others remember its hardware address.
        card = f"02:00:{':'.join(f'{int(part):02x}' for part in address(host).split('.'))}"
        inside = f"link set eth0 address {card}\naddr add {address(host)}/24 dev eth0\nlink set eth0 up\nlink set lo up\n"
        subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"], input=inside, text=True, check=True)

    def _wait_booted(self, host: str) -> None:
        def answers() -> bool:
            if self.outer[host].poll() is not None:
                raise RuntimeError(f"{host} did not boot:\n{(self.folder / f'{host}.log').read_text()}")
            test = f"test -e /run/booted && exec 3<>/dev/tcp/{address(host)}/22"
            return self.run(host, test, check=False).returncode == 0

        wait_until(answers, 30, f"{host} to answer on its SSH port")

    def _entering(self, host: str, command: str, env: Mapping[str, str] | None) -> list[str]:
        inside = {
            "HOME": "/root",
            "USER": "root",
            "LOGNAME": "root",
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "PATH": "/root/medtune/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": "/root/medtune",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
            **(env or {}),
        }
        enter = ["nsenter", "-t", str(self.first_process(host)), "-n", "-m", "-p", "-u", "-i", "--wdns=/root"]
        return [*enter, "env", "-i", *(f"{k}={v}" for k, v in inside.items()), "bash", "-c", command]

    def _on_switch(self, command: str) -> None:
        assert self.switch is not None, "the lab is down"
        subprocess.run(["nsenter", "-t", str(self.switch.pid), "-n", "bash", "-c", command], check=True)

    @staticmethod
    def _own_network(pid: int) -> bool:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")


def _stay_up(folder: Path) -> None:
    """Bring a lab up and keep it until Ctrl-C."""
    with Lab(folder) as lab:
        lab.install("cli")
        for host in lab.hosts:
            print(f"{host:5} {address(host):12} {' '.join(lab._entering(host, 'exec bash', None))}")
        print("Ctrl-C takes it down", flush=True)
        signal.pause()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with contextlib.suppress(KeyboardInterrupt):
        _stay_up(Path(sys.argv[1]))
