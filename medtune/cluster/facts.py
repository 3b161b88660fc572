"""What one machine tells of itself, in well under a second: nothing is imported that takes long, torch least of all.

This module travels to the nodes by value and runs there whatever version of medtune they have, or none: it must need
nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "ray", "torch", "torchvision", "numpy", "optuna", "pyarrow", "timm", "safetensors", "scikit-learn", "pillow",
    "filelock", "platformdirs", "wandb",
)  # fmt: skip
"""What a trial's process needs, by the names of their distributions."""
KERNELS = {"triton": "triton", "mamba-ssm": "selective_scan_cuda", "causal-conv1d": "causal_conv1d_cuda"}
"""What faster kernels need, each with the module that must be there: Triton for ours, compiled ones for the others."""


def gather(storage: str | None = None, token: str | None = None, name: str = "", in_ray: bool = False) -> dict[str, Any]:
    """All facts, as plain values; bytes are counted in bytes, times in seconds since 1970.

    `storage`: the studies' folder. With a `token`, what the driver left there under `.doctor-TOKEN/driver` is read and
    `.doctor-TOKEN/NAME` is written. `in_ray`: this is Ray's worker process, whose parent knows which GPUs were hidden.
    """
    began = time.time()
    environment = parent_environment() if in_ray else os.environ
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {package: version(package) for package in PACKAGES},
        "torch_cuda": torch_cuda(),
        "driver_cuda": driver_cuda(),
        "gpus": gpus(environment),
        "medtune": package(),
        "packs": packs(),
        "kernels": [kernel for kernel, module in KERNELS.items() if found(module)],
        "compiler": any(name and shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang", "cc")),
        "scan": environment.get("MEDTUNE_SCAN") or None,
        "disks": disks(storage),
        "storage": exchange(Path(storage), token, name) if storage and token else None,
        "cpus": len(os.sched_getaffinity(0)),
        **memory(),
        "began": began,
        "ended": time.time(),
    }


def clock() -> tuple[float, float]:
    """This machine's time, as when something began and ended."""
    now = time.time()
    return now, now


def version(distribution: str) -> str | None:
    """An installed distribution's version."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def found(module: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(module) is not None
    return False


def package() -> dict[str, Any] | None:
    """The medtune that would be imported here: version, folder, digest of all its files, and of each."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("medtune")
        if spec and spec.origin:
            return package_in(Path(spec.origin).parent)
    return None


def package_in(folder: Path) -> dict[str, Any]:
    """The package in a folder. Caches and hidden files are none of its content."""
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p == "__pycache__" or p[0] == "." for p in path.relative_to(folder).parts)
    }
    whole = hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in files.items()).encode())
    init = folder / "__init__.py"
    named = re.search(r'__version__\s*=\s*"([^"]+)"', init.read_text()) if init.exists() else None
    return {
        "version": named[1] if named else None,
        "folder": str(folder),
        "digest": whole.hexdigest(),
        "files": {name: digest[:16] for name, digest in files.items()},
    }


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read without importing torch."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            text = (Path(spec.origin).parent / "version.py").read_text()
            named = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
            return named[1] if named else None
    return None


def driver_cuda() -> str | None:
    """The newest CUDA version that the GPU's driver supports; None without a driver."""
    number = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            return f"{number.value // 1000}.{number.value % 1000 // 10}"
    return None


def parent_environment() -> dict[str, str]:
    """The environment of the process that started this one, as it was when that began."""
    try:
        raw = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition("=") for item in raw.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}


def gpus(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The GPUs that `environment` leaves visible: index, uuid, name, total and free bytes, who holds memory."""
    rows = smi("gpu", "index,uuid,name,memory.total,memory.free")
    cards: list[dict[str, Any]] = [
        {"index": int(index), "uuid": uuid, "name": name, "total": mebibytes(total), "free": mebibytes(free), "holders": []}
        for index, uuid, name, total, free in rows
    ]
    cards = visible(cards, environment.get("CUDA_VISIBLE_DEVICES"))
    if cards:
        for uuid, pid, name, used in smi("compute-apps", "gpu_uuid,pid,process_name,used_memory"):
            for card in cards:
                if card["uuid"] == uuid:
                    card["holders"].append(f"{Path(name).name} (process {pid}, {used} MiB)")
    return cards


def visible(cards: Sequence[dict[str, Any]], named: str | None) -> list[dict[str, Any]]:
    """The cards that CUDA_VISIBLE_DEVICES names, by number or by UUID; all when it is not set."""
    if named is None:
        return list(cards)
    names = [name.strip() for name in named.split(",") if name.strip()]
    return [c for c in cards if any(n == str(c["index"]) or (n[:4] == "GPU-" and c["uuid"].startswith(n)) for n in names)]


def mebibytes(text: str) -> int:
    """Bytes, of a number of MiB; 0 where nvidia-smi does not know."""
    return int(text) * 2**20 if text.isdigit() else 0


def smi(what: str, fields: str) -> list[list[str]]:
    """Rows that nvidia-smi tells; none where there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def cache_folder() -> Path:
    """The user's cache folder for medtune, as `platformdirs` names it on Linux."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "medtune"


def packs() -> list[str]:
    """Keys of the studies' images that this machine has fetched from a driver; others are fetched when needed."""
    return sorted(about.parent.name for about in (cache_folder() / "packs").glob("*/about.json"))


def disks(storage: str | None) -> list[dict[str, Any]]:
    """Free and total bytes of the file systems that are written to, each once, with what is written there."""
    places = {"temporary": Path("/tmp"), "cache": cache_folder(), "home": Path.home()}
    if storage:
        places["storage"] = Path(storage)
    known: dict[int, dict[str, Any]] = {}
    for use, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(there)
            disk = known.setdefault(os.stat(there).st_dev, {"uses": [], "path": str(there)})
            disk |= {"uses": [*disk["uses"], use], "free": usage.free, "total": usage.total}
    return list(known.values())


def memory() -> dict[str, int]:
    """The machine's memory in bytes, all of it and what is left."""
    sizes = {}
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    return {"memory": sizes.get("MemTotal", 0), "memory_free": sizes.get("MemAvailable", 0)}


def exchange(storage: Path, token: str, name: str) -> dict[str, Any]:
    """Read what the driver left in the storage folder, and leave something for it there."""
    folder = storage / f".doctor-{token}"
    reason = "no such folder" if not storage.is_dir() else None
    read = False
    try:
        # A network file system may show a new folder late.
        for _ in range(10):
            if read := (folder / "driver").is_file() and (folder / "driver").read_text() == token:
                break
            time.sleep(0.1)
        if read:
            (folder / name).write_text(token)
    except OSError as error:
        reason = f"{type(error).__name__}: {error.strerror}"
    return {"path": str(storage), "read": read, "reason": reason}
