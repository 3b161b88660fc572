"""The contract of every pair, and MedMNIST sets with external folders: found, checked, cached, refused."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medtune.config import TrialConfig
from medtune.data import PairData, available_pairs, cli, image_folder, limit, load_pair, medmnist_npz
from medtune.errors import ConfigError, DataError, DataMissing

CPN = "pneumoniamnist-cpn"
Write = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path, write_npz: Write) -> Path:
    return write_npz(tmp_path / "data").parent


@pytest.fixture
def xrays(tmp_path: Path, write_xrays: Write) -> Path:
    return write_xrays(tmp_path / "xrays")


BUSI = "breastmnist-busi"
SETS = {"pneumoniamnist-cpn": "pneumoniamnist", BUSI: "breastmnist"}
POSITIVE = {"pneumoniamnist": "pneumonia", "breastmnist": "malignant"}


def medmnist_of(pair: str) -> str:
    return SETS.get(pair, pair.removeprefix("medmnist:"))


@pytest.fixture
def place(tmp_path: Path, write_npz: Write, write_folders: Write, small_medmnist: None) -> Callable[..., dict[str, Path]]:
    """Where the data of a pair are, once made: what `load_pair` is given."""

    def make(name: str, native_size: int = 28, **changes: Any) -> dict[str, Path]:
        if name == "synthetic":
            return {}
        places = {"data_dir": write_npz(tmp_path / "data", native_size, name=medmnist_of(name), **changes).parent}
        if name in SETS:
            classes = ("NORMAL", "PNEUMONIA") if name == CPN else ("normal", "benign", "malignant")
            places["external_dir"] = tmp_path / "outside"
            if not places["external_dir"].exists():
                write_folders(places["external_dir"], {label: 3 for label in classes})
        return places

    return make


def test_pairs_are_those_of_medmnists_table() -> None:
    from medmnist import INFO

    fit = [name for name, info in INFO.items() if not name.endswith("3d") and "multi-label" not in info["task"]]
    assert set(available_pairs()) == {CPN, BUSI, "synthetic", *(f"medmnist:{name}" for name in fit)}
    assert len(fit) == 11


@pytest.mark.parametrize("name", available_pairs())
def test_contract(name: str, place: Callable[..., dict[str, Path]]) -> None:
    places = place(name)
    pair = load_pair(name, **places)
    known = medmnist_npz.source(medmnist_of(name), 28) if places else None
    assert pair.name == name and len(pair.classes) == (len(known.classes) if known else 2)
    if medmnist_of(name) in POSITIVE:
        assert pair.classes[pair.positive] == POSITIVE[medmnist_of(name)]
    assert not pair.verified_cpn
    channels = known.channels if known else 1
    for key in ("train", "val", "test", "external"):
        split = getattr(pair, key)
        assert split.images.dtype == np.uint8 and split.images.ndim == 4 and split.images.shape[1] == channels
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int64 and split.labels.shape == (len(split.images),)
        assert set(np.unique(split.labels)) == set(range(len(pair.classes)))
        assert pair.fingerprint[key]
        outside = key == "external" and not name.startswith("medmnist:")
        assert split.images.shape[2:] == (256, 256) if outside else (28, 28)
    if name.startswith("medmnist:"):
        assert pair.external is pair.test and pair.external_name == f"{medmnist_of(name)}-test"
        assert pair.fingerprint["external"] == pair.fingerprint["test"]
    again = load_pair(name, **places)
    assert again.fingerprint == pair.fingerprint
    assert np.array_equal(again.train.images, pair.train.images)


@pytest.mark.parametrize("name", ["medmnist:dermamnist", "medmnist:octmnist", "medmnist:breastmnist"])
@pytest.mark.parametrize("native_size", [28, 64])
def test_arrays_are_the_files(name: str, native_size: int, place: Callable[..., dict[str, Path]]) -> None:
    """Colour goes to the front; BreastMNIST's labels are turned round; blocks are put together in order."""
    places = place(name, native_size)
    medmnist = medmnist_npz.source(medmnist_of(name), native_size)
    pair = load_pair(name, native_size=native_size, **places)
    with np.load(places["data_dir"] / medmnist.file) as npz:
        for key in ("train", "val", "test"):
            images, labels = npz[f"{key}_images"], npz[f"{key}_labels"][:, 0]
            labels = 1 - labels.astype(np.int64) if name.endswith("breastmnist") else labels
            wanted = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
            assert np.array_equal(getattr(pair, key).images, wanted)
            assert np.array_equal(getattr(pair, key).labels, labels)


def test_large_files_are_read_block_by_block(
    place: Callable[..., dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_pair("medmnist:dermamnist", **place("medmnist:dermamnist"))
    sizes: list[int] = []
    real = medmnist_npz._blocks

    def watched(*args: Any) -> Iterator[Any]:
        for block in real(*args):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(medmnist_npz, "_BLOCK", 5 * 28 * 28 * 3)
    monkeypatch.setattr(medmnist_npz, "_blocks", watched)
    path = place("medmnist:dermamnist")["data_dir"] / "dermamnist.npz"
    os.utime(path, (1, 1))
    again = load_pair("medmnist:dermamnist", data_dir=path.parent)
    assert sizes == [5, 5, 5, 5, 5, 3, 5, 5, 4, 5, 5, 4]
    assert again.fingerprint == whole.fingerprint


def test_sets_that_models_cannot_take_are_refused_with_the_reason() -> None:
    for name, reason in (("chestmnist", "ChestMNIST has several labels an image"), ("nodulemnist3d", "NoduleMNIST3D has")):
        with pytest.raises(DataError, match=reason):
            load_pair(f"medmnist:{name}")
        with pytest.raises(ConfigError, match=reason):
            TrialConfig(pair=f"medmnist:{name}")
    with pytest.raises(ConfigError, match=r"unknown pair 'medmnist:pathmnst'\. Did you mean 'medmnist:pathmnist'"):
        TrialConfig(pair="medmnist:pathmnst")
    assert TrialConfig(pair="medmnist:pathmnist").pair == "medmnist:pathmnist"


def test_importing_the_package_is_light() -> None:
    code = "import sys, medtune.data; medtune.data.available_pairs(); print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "torchvision", "medmnist", "requests", "PIL"]
    out = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_unknown_pair_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'pneumoniamnist-cnp'.*Did you mean 'pneumoniamnist-cpn'"):
        load_pair("pneumoniamnist-cnp")
    with pytest.raises(DataError, match="native_size must be one of 28, 64, 128, 224, got 32"):
        load_pair(CPN, native_size=32)


def test_the_addresses_are_medmnists_own() -> None:
    from medmnist import INFO

    for name in medmnist_npz.names():
        for size, suffix in ((28, ""), (64, "_64"), (128, "_128"), (224, "_224")):
            source = medmnist_npz.source(name, size)
            assert source.url == INFO[name][f"url{suffix}"]
            assert source.md5 == INFO[name][f"MD5{suffix}"]
            assert source.file == f"{name}{suffix}.npz"
            assert source.counts == INFO[name]["n_samples"] and source.channels == INFO[name]["n_channels"]
            labels = [INFO[name]["label"][str(label)] for label in range(len(source.classes))]
            assert list(source.classes) == (labels[::-1] if name == "breastmnist" else labels)
    for name, counts in medmnist_npz.CLASS_COUNTS.items():
        assert {split: sum(n) for split, n in counts.items()} == INFO[name]["n_samples"]


MEDMNIST_PAIRS = [CPN, BUSI, "medmnist:dermamnist"]
Places = Callable[..., dict[str, Path]]


def npz_warnings(pair: PairData) -> list[str]:
    return [warning for warning in pair.warnings if "MD5" in warning]


@pytest.mark.parametrize("name", MEDMNIST_PAIRS)
def test_another_md5_is_used_with_a_warning_that_names_both(name: str, place: Places) -> None:
    places = place(name)
    pair, source = load_pair(name, **places), medmnist_npz.source(medmnist_of(name), 28)
    found = hashlib.md5((places["data_dir"] / source.file).read_bytes()).hexdigest()
    (warning,) = npz_warnings(pair)
    assert found in warning and source.md5 in warning
    assert {key: sum(pair.counts()[key]) for key in source.counts} == source.counts


@pytest.mark.parametrize("name", MEDMNIST_PAIRS)
def test_the_official_md5_gives_no_warning(name: str, place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places, source = place(name), medmnist_npz.source(medmnist_of(name), 28)
    md5 = hashlib.md5((places["data_dir"] / source.file).read_bytes()).hexdigest()
    monkeypatch.setattr(medmnist_npz, "source", lambda name, size: dataclasses.replace(source, md5=md5))
    pair = load_pair(name, **places)
    assert not npz_warnings(pair) and (pair.warnings == () or name == BUSI)


@pytest.mark.parametrize("name", MEDMNIST_PAIRS)
def test_larger_files_are_read_by_their_names(name: str, place: Places) -> None:
    places = place(name, native_size=64)
    pair = load_pair(name, native_size=64, **places)
    assert pair.train.images.shape[2:] == (64, 64) and pair.native_size == 64
    with pytest.raises(DataMissing, match=rf"{medmnist_of(name)}_128\.npz is missing.*get --pair {name} --native-size 128"):
        load_pair(name, native_size=128, **places)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop": ("val_labels",)}, "lacks val_images or val_labels"),
        ({"train_images": np.zeros((4708, 29, 28), np.uint8)}, r"train_images must be uint8 \(4708, 28, 28\)"),
        ({"train_images": np.zeros((4708, 28, 28), np.float32)}, "found float32"),
        ({"test_images": np.zeros((600, 28, 28), np.uint8)}, r"found uint8 \(600, 28, 28\)"),
        ({"val_labels": np.full((524, 1), 2, np.uint8)}, "must be 524 labels 0 to 1"),
        ({"val_labels": np.zeros((524, 2), np.uint8)}, "must be 524 labels 0 to 1, found 1048"),
        ({"val_labels": np.array([None] * 524)}, "not a readable npz file.*as objects"),
        ({"val_labels": np.zeros((524, 1), np.uint8)}, r"val must have \(135, 389\).*found \(524, 0\)"),
    ],
)
def test_another_content_is_refused(
    tmp_path: Path, write_npz: Write, xrays: Path, change: dict[str, object], says: str
) -> None:
    path = write_npz(tmp_path / "data", **change)
    with pytest.raises(DataError, match=says) as caught:
        load_pair(CPN, data_dir=path.parent, external_dir=xrays)
    assert str(path) in str(caught.value)
    assert f"medtune data get --pair pneumoniamnist-cpn --data-dir {path.parent}" in str(caught.value)


def test_another_content_of_a_larger_set_is_refused(place: Places) -> None:
    name = "medmnist:dermamnist"
    for change, says in (
        ({"test_images": np.zeros((14, 28, 28), np.uint8)}, r"must be uint8 \(14, 28, 28, 3\), found uint8 \(14, 28, 28\)"),
        ({"train_labels": np.full((28, 1), 7)}, "must be 28 labels 0 to 6"),
        ({"drop": ("test_images",)}, "lacks test_images or test_labels"),
    ):
        with pytest.raises(DataError, match=says):
            load_pair(name, **place(name, **change))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
@pytest.mark.parametrize("name", MEDMNIST_PAIRS)
def test_a_damaged_file_is_refused(name: str, place: Places, kept: float) -> None:
    places, source = place(name), medmnist_npz.source(medmnist_of(name), 28)
    path = places["data_dir"] / source.file
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(DataError, match=rf"{source.file} is not a readable npz file.*{source.md5}.*get --pair {name}"):
        load_pair(name, **places)
    assert not list((path.parent / "decoded").glob("*/")), "nothing half done is kept"


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_an_image_is_noticed(place: Places, at: float) -> None:
    places = place("medmnist:dermamnist")
    path = places["data_dir"] / "dermamnist.npz"
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable npz file"):
        load_pair("medmnist:dermamnist", **places)
    assert not cli.check(pair="medmnist:dermamnist", data_dir=path.parent)


def test_missing_files_name_file_expectation_and_command(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataMissing) as caught:
        load_pair(CPN, data_dir=tmp_path / "nowhere")
    for part in ("nowhere/pneumoniamnist.npz", "28209eda62fecd6e6a2d98b1501bb15f", "medtune data get --pair"):
        assert part in str(caught.value)
    with pytest.raises(DataMissing) as caught:
        load_pair(CPN, data_dir=data)
    for part in ("data/cpn-xray.zip", "1802 NORMAL and 1800 PNEUMONIA images of 256x256", "medtune data get --pair"):
        assert part in str(caught.value)
    with pytest.raises(DataMissing, match=r"gone, the external set's folder named by --external-dir, does not exist"):
        load_pair(CPN, data_dir=data, external_dir=tmp_path / "gone")


def test_the_command_is_short_where_the_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataMissing, match="`medtune data get --pair pneumoniamnist-cpn`"):
        load_pair(CPN)


def test_only_a_fallback_tests_on_the_own_test_split(data: Path) -> None:
    pair = load_pair(CPN, data_dir=data, external_fallback=True)
    assert pair.external_name == "pneumoniamnist-test" and not pair.verified_cpn
    assert pair.external is pair.test and pair.fingerprint["external"] == pair.fingerprint["test"]
    assert any("own test split" in warning for warning in pair.warnings)


def test_breastmnist_falls_back_without_a_word_of_busi(place: Places) -> None:
    pair = load_pair(BUSI, data_dir=place(BUSI)["data_dir"], external_fallback=True)
    assert pair.external_name == "breastmnist-test" and pair.external is pair.test
    assert not any("NOT AN EXTERNAL TEST" in warning for warning in pair.warnings)


@pytest.mark.parametrize(
    ("pair", "runs_on", "fallback", "says"),
    [
        (BUSI, BUSI, True, "EXTERNAL SET OF BREASTMNIST-BUSI IS NOT HERE: the external test is on the training set's own"),
        ("medmnist:breastmnist", "medmnist:breastmnist", False, ""),
        ("medmnist:bloodmnist", "synthetic", False, "GENERATED"),
    ],
)
def test_make_sweep_runs_on_what_is_there(
    pair: str, runs_on: str, fallback: bool, says: str, place: Places, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """BreastMNIST alone is there, and no server."""
    from medtune import sweep

    def refuse(**_: object) -> None:
        raise DataError("no network")

    monkeypatch.setattr(cli, "get", refuse)
    data = place("medmnist:breastmnist")["data_dir"]
    args = ["--preset", "laptop", "--fallback", "--pair", pair, "--data-dir", str(data)]
    config, falls_back = sweep.with_what_is_there(sweep.parse(args, "")[0], "medmamba")
    assert (config.trial.pair, falls_back) == (runs_on, fallback)
    assert says in capsys.readouterr().out


def test_a_fallback_does_not_hide_broken_data(data: Path, xrays: Path) -> None:
    (xrays / "NORMAL" / "NORMAL_1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        load_pair(CPN, data_dir=data, external_dir=xrays, external_fallback=True)


def test_folders_are_looked_for_in_order(
    tmp_path: Path, data: Path, xrays: Path, write_xrays: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = tmp_path / "user-cache" / "medtune" / "data"
    shutil.copytree(data, default)
    other = write_xrays(tmp_path / "other", normal=1)
    assert load_pair(CPN, external_dir=xrays).counts()["external"] == (3, 4)
    monkeypatch.setenv("MEDTUNE_DATA", str(tmp_path / "named"))
    with pytest.raises(DataMissing, match="named/pneumoniamnist"):
        load_pair(CPN, external_dir=xrays)
    monkeypatch.setenv("MEDTUNE_EXTERNAL_DIR", str(other))
    assert load_pair(CPN, data_dir=data).counts()["external"] == (1, 4)
    assert load_pair(CPN, data_dir=data, external_dir=xrays).counts()["external"] == (3, 4)


def test_relative_folders_hold_when_the_process_moves(
    data: Path, xrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medtune.data import data_folder, external_folder

    monkeypatch.chdir(tmp_path)
    assert data_folder(Path("data")) == data and external_folder(Path("xrays")) == xrays


# --- the folder of X-rays


def test_layout_and_labels(data: Path, xrays: Path) -> None:
    (xrays / "NORMAL" / ".hidden.png").write_bytes(b"")
    (xrays / "NORMAL" / "notes.txt").write_bytes(b"")
    (xrays / "PNEUMONIA").rename(xrays / "Pneumonia")
    pair = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert pair.external.labels.tolist() == [0] * 3 + [1] * 4
    assert [int(image[0, -1, -1]) for image in pair.external.images] == [2, 3, 4, 5, 6, 7, 8]


def test_every_unreadable_image_is_named(data: Path, xrays: Path) -> None:
    for name in ("NORMAL/NORMAL_1.png", "PNEUMONIA/PNEUMONIA_2.png", "PNEUMONIA/PNEUMONIA_4.png"):
        path = xrays / name
        path.write_bytes(path.read_bytes()[:120])
    (xrays / "COVID" / "COVID_1.png").write_bytes(b"not looked at")
    with pytest.raises(DataError) as caught:
        load_pair(CPN, data_dir=data, external_dir=xrays)
    assert "3 of 7 images" in str(caught.value)
    for name in ("NORMAL_1.png", "PNEUMONIA_2.png", "PNEUMONIA_4.png"):
        assert str(xrays) in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("emptied", ["NORMAL", "PNEUMONIA"])
def test_a_missing_or_empty_class_is_refused(data: Path, xrays: Path, emptied: str) -> None:
    for path in (xrays / emptied).iterdir():
        path.unlink()
    with pytest.raises(DataError, match=f"{emptied} holds no image.*--external-dir"):
        load_pair(CPN, data_dir=data, external_dir=xrays)
    (xrays / emptied).rmdir()
    with pytest.raises(DataError, match=r"must hold the folders NORMAL and PNEUMONIA.*medtune data get"):
        load_pair(CPN, data_dir=data, external_dir=xrays)


def test_other_sizes_and_modes_are_converted_and_said_so(data: Path, xrays: Path) -> None:
    Image.new("RGB", (512, 300), (200, 200, 200)).save(xrays / "NORMAL" / "NORMAL_1.png")
    Image.fromarray(np.full((256, 256), 0x8000, np.uint16)).save(xrays / "NORMAL" / "NORMAL_2.png")
    pair = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert np.all(pair.external.images[0] == 200)
    assert np.all(np.abs(pair.external.images[1].astype(int) - 127) <= 1)  # PIL alone would clip 16 bit to 255
    text = "\n".join(pair.warnings)
    assert "1 images were not 256x256 and were resized to it (NORMAL_1.png)" in text
    assert "2 images were not 8-bit grey" in text
    assert load_pair(CPN, data_dir=data, external_dir=xrays).warnings == pair.warnings  # from the cache too


# --- decoded arrays


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = image_folder.decode

    def counted(members: list[image_folder.Member], *args: Any) -> object:
        calls.append(len(members))
        return real(members, *args)

    monkeypatch.setattr(image_folder, "decode", counted)
    return calls


def test_images_are_decoded_once_until_they_change(data: Path, xrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_decodes(monkeypatch)
    for _ in range(3):
        first = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert calls == [7]
    shutil.copy(xrays / "NORMAL" / "NORMAL_2.png", xrays / "NORMAL" / "NORMAL_1.png")
    second = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert calls == [7, 7] and second.fingerprint["external"] != first.fingerprint["external"]
    (xrays / "NORMAL" / "NORMAL_1.png").unlink()
    assert load_pair(CPN, data_dir=data, external_dir=xrays).counts()["external"] == (2, 4)
    assert len(list((data / "decoded").glob("images-256-1-*/"))) == 1  # older entries of the folder are gone


def test_arrays_are_mapped_and_cannot_change_the_cache(data: Path, xrays: Path) -> None:
    load_pair(CPN, data_dir=data, external_dir=xrays)
    pair = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert isinstance(pair.external.images, np.memmap)
    before = pair.external.images[0].copy()
    pair.external.images[0] = 255 - before  # no error, no torch warning about arrays that cannot be written
    assert np.array_equal(load_pair(CPN, data_dir=data, external_dir=xrays).external.images[0], before)


def test_read_only_data_are_cached_in_the_user_folder(data: Path, xrays: Path, tmp_path: Path) -> None:
    data.chmod(0o555)
    try:
        load_pair(CPN, data_dir=data, external_dir=xrays)
        assert [path.name for path in data.iterdir()] == ["pneumoniamnist.npz"]
        assert list((tmp_path / "user-cache" / "medtune" / "decoded").glob("images-256-1-*/images.npy"))
    finally:
        data.chmod(0o755)


def test_data_load_where_nothing_can_be_written(data: Path, xrays: Path, tmp_path: Path) -> None:
    user = tmp_path / "user-cache"
    user.mkdir()
    for folder in (data, user):
        folder.chmod(0o555)
    try:
        assert load_pair(CPN, data_dir=data, external_dir=xrays).counts()["external"] == (3, 4)
    finally:
        for folder in (data, user):
            folder.chmod(0o755)


def test_a_damaged_cache_is_made_anew(data: Path, xrays: Path) -> None:
    expected = load_pair(CPN, data_dir=data, external_dir=xrays).external.images.copy()
    (entry,) = (data / "decoded").glob("images-256-1-*/images.npy")
    os.truncate(entry, 1000)
    pair = load_pair(CPN, data_dir=data, external_dir=xrays)
    assert np.array_equal(pair.external.images, expected)


def test_parallel_loads_decode_once(data: Path, xrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_decodes(monkeypatch)
    loaded: list[int] = []
    load = lambda: loaded.append(len(load_pair(CPN, data_dir=data, external_dir=xrays).external))  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [7] * 8 and calls == [7]


@pytest.mark.parametrize("name", MEDMNIST_PAIRS)
def test_parallel_loads_read_a_file_once(name: str, place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places, calls, loaded = place(name), [], []
    real = medmnist_npz.decode

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(medmnist_npz, "decode", counted)
    load = lambda: loaded.append(load_pair(name, **places).fingerprint["train"])  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 6 and len(set(loaded)) == 1 and calls == [1]


def test_what_a_killed_process_left_half_decoded_goes(data: Path, xrays: Path) -> None:
    load_pair(CPN, data_dir=data, external_dir=xrays)
    (entry,) = (data / "decoded").glob("images-256-1-*/")
    left = entry.with_name(f"{entry.name.rpartition('-')[0]}.part-killed")
    entry.rename(left)
    load_pair(CPN, data_dir=data, external_dir=xrays)
    assert entry.exists() and not left.exists()


def test_a_warm_load_is_quick(data: Path, write_xrays: Write, tmp_path: Path) -> None:
    folder = write_xrays(tmp_path / "many", normal=300, pneumonia=300)
    load_pair(CPN, data_dir=data, external_dir=folder)
    begin = time.monotonic()
    load_pair(CPN, data_dir=data, external_dir=folder)
    assert time.monotonic() - begin < 1


def test_a_full_disk_is_said_before_it_is_filled(data: Path, xrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to a mapped file on a full disk would kill the process."""
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot keep decoded images in .*No space left on device.*--data-dir"):
        load_pair(CPN, data_dir=data, external_dir=xrays)
    assert not list((data / "decoded").glob("*/"))


# --- limits


def test_training_limit_is_balanced_and_fixed() -> None:
    pair = load_pair("synthetic")
    small = limit(pair, train_limit=101, external_limit=None)
    again = limit(pair, train_limit=101, external_limit=None)
    assert sorted(small.counts()["train"]) == [50, 51] and small.external is pair.external
    assert np.array_equal(small.train.images, again.train.images)
    assert small.fingerprint["train"] != pair.fingerprint["train"]
    assert small.fingerprint["external"] == pair.fingerprint["external"]
    whole = {image.tobytes() for image in pair.train.images}
    assert all(image.tobytes() in whole for image in small.train.images)


def test_a_small_class_gives_all_it_has() -> None:
    pair = load_pair("synthetic")
    assert limit(pair, train_limit=700, external_limit=None).counts()["train"] == (264, 436)
    assert limit(pair, train_limit=5000, external_limit=5000) is pair
    assert limit(pair, train_limit=None, external_limit=None) is pair


def test_limits_of_more_than_two_classes(place: Places) -> None:
    pair = load_pair("medmnist:dermamnist", **place("medmnist:dermamnist"))
    small = limit(pair, train_limit=16, external_limit=9)
    assert sorted(small.counts()["train"]) == [2, 2, 2, 2, 2, 3, 3]
    assert sorted(small.counts()["external"]) == [1, 1, 1, 1, 1, 2, 2]
    assert len(limit(pair, train_limit=None, external_limit=3).external) == 3


def test_external_limit_keeps_proportions(data: Path, write_xrays: Write, tmp_path: Path) -> None:
    folder = write_xrays(tmp_path / "uneven", normal=40, pneumonia=10)
    pair = load_pair(CPN, data_dir=data, external_dir=folder)
    assert limit(pair, train_limit=None, external_limit=10).counts()["external"] == (8, 2)
    assert limit(pair, train_limit=None, external_limit=2).counts()["external"] == (1, 1)
    assert limit(pair, train_limit=None, external_limit=33).counts()["external"] in {(26, 7), (27, 6)}


# --- the command line's functions


@pytest.mark.parametrize("name", [BUSI, "medmnist:dermamnist"])
def test_check_and_where_of_other_pairs(
    name: str, place: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places, source = place(name), medmnist_npz.source(medmnist_of(name), 28)
    assert cli.check(pair=name, **places)
    out = capsys.readouterr().out
    assert source.md5 in out and f"train {source.counts['train']}" in out
    if name == BUSI:
        assert "6 normal and benign, 3 malignant" in out and "437 benign, 210 malignant and 133 normal" in out
    cli.where(pair=name, **places)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0][1:] == ["--data-dir", str(places["data_dir"]), source.file, "yes"]
    assert (rows[-3][3] == "3 normal, 3 benign, 3 malignant") if name == BUSI else len(rows) == 2
    (places["data_dir"] / source.file).unlink()
    assert not cli.check(pair=name, **places)
    assert f"medtune data get --pair {name}" in capsys.readouterr().out


def test_a_check_keeps_no_arrays(place: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 13 GB is checked in the memory of a block."""
    places = place("medmnist:dermamnist")
    monkeypatch.setattr(np, "empty", None)
    assert cli.check(pair="medmnist:dermamnist", **places)
    assert not (places["data_dir"] / "decoded").exists()


def test_check_tells_what_is_right_and_what_is_not(
    data: Path, xrays: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.check(data_dir=data, external_dir=xrays)
    out = capsys.readouterr().out
    assert "3 NORMAL, 4 PNEUMONIA" in out and "unverified folder" in out and "28209eda" in out and "note" in out
    (xrays / "NORMAL" / "NORMAL_1.png").write_bytes(b"[broken]")
    assert not cli.check(data_dir=data, external_dir=xrays)
    assert "NORMAL_1.png" in (out := capsys.readouterr().out) and "broken" in out
    assert not cli.check(data_dir=data)
    assert "missing" in (out := capsys.readouterr().out) and "medtune data get" in out
    assert cli.check(pair="synthetic")


def test_check_reads_past_the_cache(data: Path, xrays: Path) -> None:
    load_pair(CPN, data_dir=data, external_dir=xrays)
    path = xrays / "NORMAL" / "NORMAL_1.png"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # looks unchanged
    assert not cli.check(data_dir=data, external_dir=xrays)


def test_where_shows_places_in_order(
    data: Path, xrays: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_DATA", "/nowhere/at/all")
    cli.where(pair=CPN, data_dir=data, external_dir=xrays)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    named_by = ["--data-dir", "$MEDTUNE_DATA", "user cache folder"]
    named_by += ["--external-dir", "$MEDTUNE_EXTERNAL_DIR", "data folder"]
    assert [row[1] for row in rows] == named_by
    assert [row[4] for row in rows] == ["yes", "", "", "yes", "", ""]
    assert rows[0][2:4] == [str(data), "pneumoniamnist.npz"]
    assert rows[1][3] == "no such folder" and rows[3][3] == "3 NORMAL, 4 PNEUMONIA"


@pytest.mark.skipif("MEDTUNE_DATA" not in os.environ, reason="needs the real PneumoniaMNIST: set MEDTUNE_DATA")
def test_real_pneumoniamnist(write_xrays: Write, tmp_path: Path) -> None:
    real = REAL_DATA
    assert real is not None
    pair = load_pair(CPN, data_dir=Path(real), external_fallback=True)
    assert pair.counts() | {"external": ()} == {
        "train": (1214, 3494), "val": (135, 389), "test": (234, 390), "external": (),
    }
    assert 100 < pair.train.images.mean() < 180


REAL_DATA = os.environ.get("MEDTUNE_DATA")
