"""A pair packed on one machine and fetched by others: whole, once, and the same images."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from medtune.data import PairData
from medtune.data.courier import Courier, fetched
from medtune.data.pack import KEPT, PACKED, open_pack, or_packed, pack, pack_digest
from medtune.data.pair import digest
from medtune.errors import DataError, DataMissing, MachineFault
from medtune.record import write_json


@pytest.fixture
def served(tiny_data: PairData, tmp_path: Path) -> tuple[str, Path]:
    """A pack on the driver's machine: its key and folder."""
    return pack(tiny_data, tmp_path / "driver"), tmp_path / "driver"


class Counting(Courier):
    """A courier that counts its calls, gives little at a time and stops where it is told to."""

    calls = 0
    until = 10**9

    def chunk(self, name: str, offset: int) -> bytes:
        """As a courier, in pieces of 5 kB."""
        self.calls += 1
        if self.calls > self.until:
            raise MachineFault("the courier is gone")
        return super().chunk(name, offset)[:5000]


def plain(data: PairData) -> dict[str, object]:
    return {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name not in SPLITS}


SPLITS = ("train", "val", "test", "external")


def test_what_arrives_is_what_was_packed(served: tuple[str, Path], tiny_data: PairData, tmp_path: Path) -> None:
    key, folder = served
    data = fetched(key, Counting(key, folder), tmp_path / "node")
    assert plain(data) == plain(tiny_data)
    for name in SPLITS:
        assert digest(getattr(data, name)) == digest(getattr(tiny_data, name))
    assert pack_digest(key, tmp_path / "node") == pack_digest(key, folder) is not None
    data.train.images[0] = 0  # a process may write into its copy
    assert pack_digest(key, tmp_path / "node") is not None


def test_it_is_made_and_fetched_once(served: tuple[str, Path], tiny_data: PairData, tmp_path: Path) -> None:
    key, folder = served
    made = (folder / key / "about.json").stat().st_mtime_ns
    assert pack(tiny_data, folder) == key and (folder / key / "about.json").stat().st_mtime_ns == made
    courier = Counting(key, folder)
    for _ in range(2):
        fetched(key, courier, tmp_path / "node")
    once = courier.calls
    fetched(key, Counting(key, folder), tmp_path / "other")
    assert courier.calls == once > 8


def fetch_slowly(key: str, folder: Path, node: Path, calls: Path) -> None:
    class Slow(Counting):
        def chunk(self, name: str, offset: int) -> bytes:
            time.sleep(0.002)
            with open(calls, "a") as file:
                file.write(f"{os.getpid()}\n")
            return super().chunk(name, offset)

    assert len(fetched(key, Slow(key, folder), node).train) == 49


def test_processes_of_a_machine_do_not_race(served: tuple[str, Path], tmp_path: Path) -> None:
    key, folder = served
    work = multiprocessing.get_context("fork")
    rest = (key, folder, tmp_path / "node", tmp_path / "calls")
    processes = [work.Process(target=fetch_slowly, args=rest) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(set((tmp_path / "calls").read_text().split())) == 1


def test_an_interrupted_copy_goes_on_and_a_damaged_one_begins_anew(served: tuple[str, Path], tmp_path: Path) -> None:
    key, folder = served
    whole = Counting(key, folder)
    fetched(key, whole, tmp_path / "other")
    first = Counting(key, folder)
    first.until = 9
    with pytest.raises(MachineFault, match="gone"):
        fetched(key, first, tmp_path / "node")
    assert open_pack(key, tmp_path / "node") is None
    second = Counting(key, folder)
    fetched(key, second, tmp_path / "node")
    assert second.calls == whole.calls - 9

    third = Counting(key, folder)
    third.until = 4
    with pytest.raises(MachineFault, match="gone"):
        fetched(key, third, tmp_path / "third")
    (part,) = (tmp_path / "third").glob("*.part/*.npy")
    part.write_bytes(b"x" * part.stat().st_size)
    fetched(key, Counting(key, folder), tmp_path / "third")
    assert pack_digest(key, tmp_path / "third") == pack_digest(key, folder)


def test_damage_on_the_way_is_found(served: tuple[str, Path], tmp_path: Path) -> None:
    class Noisy(Courier):
        def chunk(self, name: str, offset: int) -> bytes:
            return bytes(255 - byte for byte in super().chunk(name, offset))

    key, folder = served
    with pytest.raises(MachineFault, match=r"train\.images\.npy .* arrived damaged twice"):
        fetched(key, Noisy(key, folder), tmp_path / "node")
    assert pack_digest(key, tmp_path / "node") is None and open_pack(key, tmp_path / "node") is None


def test_a_damaged_pack_of_the_drivers_is_made_anew(served: tuple[str, Path], tiny_data: PairData) -> None:
    key, folder = served
    was = pack_digest(key, folder)
    file = folder / key / "val.labels.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert pack_digest(key, folder) is None
    assert pack(tiny_data, folder) == key and pack_digest(key, folder) == was


def test_other_images_are_another_pack_even_without_digests_of_their_own(tiny_data: PairData, tmp_path: Path) -> None:
    unknown = dataclasses.replace(tiny_data, fingerprint={})
    darker = dataclasses.replace(unknown, val=dataclasses.replace(unknown.val, images=unknown.val.images // 2))
    assert len({pack(data, tmp_path) for data in (tiny_data, unknown, darker)}) == 3
    assert pack(darker, tmp_path) == pack(darker, tmp_path)
    renamed = dataclasses.replace(tiny_data, verified_cpn=True)
    assert pack(renamed, tmp_path) != pack(tiny_data, tmp_path)


def test_the_last_few_stay_and_what_a_courier_serves_is_served_on(tiny_data: PairData, tmp_path: Path) -> None:
    keys = []
    couriers = []
    for n in range(KEPT + 2):
        keys.append(pack(dataclasses.replace(tiny_data, name=f"pair {n}"), tmp_path / "driver"))
        couriers.append(Counting(keys[-1], tmp_path / "driver"))
        os.utime(tmp_path / "driver" / keys[-1], (n, n))
    assert {path.name for path in (tmp_path / "driver").iterdir() if path.is_dir()} == set(keys[2:])
    assert np.array_equal(fetched(keys[0], couriers[0], tmp_path / "node").val.labels, tiny_data.val.labels)


def test_a_machine_without_the_files_reads_what_it_trained_on(
    served: tuple[str, Path], tiny_data: PairData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study's pack where there is one, and only where the files are missing."""
    key, folder = served
    monkeypatch.setattr("medtune.data.pack.packs_folder", lambda: folder)

    def missing() -> PairData:
        raise DataMissing("pneumoniamnist.npz is not here")

    with pytest.raises(DataMissing, match="not here"):
        or_packed(missing, tmp_path)
    write_json(tmp_path / PACKED, {"pack": "of another machine"})
    with pytest.raises(DataMissing, match="not here"):
        or_packed(missing, tmp_path)
    write_json(tmp_path / PACKED, {"pack": key})
    assert digest(or_packed(missing, tmp_path).val) == digest(tiny_data.val)
    assert or_packed(lambda: tiny_data, tmp_path) is tiny_data


def test_a_folder_that_cannot_be_written_to_is_named(served: tuple[str, Path], tiny_data: PairData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep the images for other machines in .*file.*XDG_CACHE_HOME"):
        pack(tiny_data, tmp_path / "file" / "packs")
    with pytest.raises(MachineFault, match=r"cannot keep the study's images in .*file"):
        fetched(served[0], Courier(*served), tmp_path / "file" / "packs")
