"""Brings a pack (medtune.data.pack) from the driver's machine to each machine that trains, once.

The first process of a machine that needs it fetches it, the others wait; an interrupted copy goes on where it ended.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from medtune.data.pack import ABOUT, fresh_part, held, open_pack, packs_folder, settle, sha256_of
from medtune.data.pair import PairData
from medtune.errors import MachineFault

CHUNK = 8 * 2**20
"""Bytes a call carries."""
_NAME = "medtune-courier"


class Courier:
    """Hands out the files of one pack, on the machine that has it."""

    def __init__(self, key: str, folder: Path) -> None:
        self.text = (folder / key / ABOUT).read_text()
        # Held open: another study may clear the pack away while this one runs.
        self.files = {name: open(folder / key / name, "rb") for name in json.loads(self.text)["files"]}  # noqa: SIM115

    def about(self) -> str:
        """The pack's about.json."""
        return self.text

    def chunk(self, name: str, offset: int) -> bytes:
        """The bytes of a file from `offset` on, at most `CHUNK`."""
        return os.pread(self.files[name].fileno(), CHUNK, offset)


def start_courier(key: str, folder: Path | None = None) -> Any:
    """Serve a pack to the nodes of this Ray cluster from this one, for as long as the returned handle is kept."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 3, "name": f"{_NAME}-{key}"}
    return ray.remote(Courier).options(scheduling_strategy=here, **options).remote(key, folder or packs_folder())


class RayCourier:
    """The courier of a pack as a trial's process reaches it; the same calls as `Courier`."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._actor: Any = None

    def about(self) -> str:
        """See `Courier`. Raises MachineFault where the courier does not answer."""
        return str(self._ask("about"))

    def chunk(self, name: str, offset: int) -> bytes:
        """See `Courier`. Raises MachineFault where the courier does not answer."""
        return bytes(self._ask("chunk", name, offset))

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray
        from ray.exceptions import RayError

        try:
            self._actor = self._actor or ray.get_actor(f"{_NAME}-{self.key}")
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=120)
        except (RayError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            raise MachineFault(f"the study's images did not reach this machine: {type(error).__name__}: {why}") from None


def fetched(key: str, courier: Courier | RayCourier | None = None, folder: Path | None = None) -> PairData:
    """The pair in the pack of that key, fetched first where this machine has none.

    Raises MachineFault when the courier does not answer, what it sends is damaged twice, or the disk refuses.
    """
    folder = folder or packs_folder()
    try:
        if (data := open_pack(key, folder)) is None:
            with held(folder, key):
                if (data := open_pack(key, folder)) is None:
                    shutil.rmtree(folder / key, ignore_errors=True)
                    _fetch(key, courier or RayCourier(key), folder)
                    data = open_pack(key, folder)
    except OSError as error:
        raise MachineFault(f"cannot keep the study's images in {folder}: {error.strerror or error}") from None
    assert data is not None
    return data


def _fetch(key: str, courier: Courier | RayCourier, folder: Path) -> None:
    text = courier.about()
    part = folder / f"{key}.part"
    if not _begun_from(part, text):
        part = fresh_part(folder, key)
        (part / ABOUT).write_text(text)
    for name, file in json.loads(text)["files"].items():
        _fetch_file(courier, part / name, int(file["bytes"]), file["sha256"])
    settle(folder, key)


def _begun_from(part: Path, text: str) -> bool:
    """Whether an interrupted copy is of this pack as it is served now."""
    about = part / ABOUT
    return about.exists() and about.read_text() == text


def _fetch_file(courier: Courier | RayCourier, path: Path, size: int, sha256: str) -> None:
    """Raises MachineFault when a file that was begun anew does not have its digest either."""
    for _ in range(2):
        with open(path, "ab") as out:
            if size > out.tell():
                _require_space(path.parent, size - out.tell())
            while (at := out.tell()) < size and (chunk := courier.chunk(path.name, at)):
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if path.stat().st_size == size and sha256_of(path) == sha256:
            return
        path.unlink()
    raise MachineFault(f"{path.name} of the study's images arrived damaged twice: its SHA-256 is not the one it should have")


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{size / 2**20:.0f} MiB are needed there, {free / 2**20:.0f} are free")
