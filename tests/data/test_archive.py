"""Archives of external sets: what counts as verified, what is refused, and that nothing escapes from a zip."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer
from published import Target
from xray_files import png

from medtune.data import PairData, busi, cpn, load_pair
from medtune.data.download import Effort, fetch
from medtune.errors import DataError


@pytest.fixture
def data(tmp_path: Path, write_npz: Callable[..., Path]) -> Path:
    """A data folder with PneumoniaMNIST and BreastMNIST in it."""
    write_npz(tmp_path / "data")
    write_npz(tmp_path / "data", name="breastmnist")
    return tmp_path / "data"


def put(folder: Path, content: bytes, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def verified(pair: PairData, target: Target) -> bool:
    """Named as the set, and `verified_cpn` for CPN X-ray alone."""
    named = pair.external_name == target.published.called
    assert pair.verified_cpn == (named and target.pair == "pneumoniamnist-cpn")
    return named


def test_the_published_sets() -> None:
    assert cpn.SET.counts == {"COVID": 1626, "NORMAL": 1802, "PNEUMONIA": 1800}
    assert cpn.SET.expected == "1626 COVID, 1802 NORMAL and 1800 PNEUMONIA images of 256x256"
    assert busi.SET.counts == {"benign": 437, "malignant": 210, "normal": 133}
    assert busi.SET.expected == "437 benign, 210 malignant and 133 normal images"


def test_cpn_in_full(data: Path) -> None:
    """The real counts, 5228 images: the one test that is not shrunk."""
    put(data, Target(cpn.SET, "").archive(), "cpn-xray.zip")
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn and pair.external_name == "cpn" and not pair.synthetic
    assert pair.external.images.shape == (3602, 1, 256, 256)
    assert pair.counts()["external"] == (1802, 1800)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("name", ["cpn-xray.zip", "dvntn9yhd2-1.zip", cpn.INNER])
def test_images_come_in_the_order_of_their_names(data: Path, small_cpn: Target, outer: bool, name: str) -> None:
    put(data, small_cpn.archive(outer=outer), name)
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn
    assert pair.external.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert [int(image[0, -1, -1]) for image in pair.external.images] == [3, 4, 5, 6, 7, 8, 9]


def test_busi_is_normal_and_benign_against_malignant_without_masks(data: Path, small_busi: Target) -> None:
    """Sizes and modes differ in the published set: images are grey and 256x256 here, and that is nothing to warn of."""
    masks = {
        "benign/benign_1_mask.png": png(90), "benign/benign_1_mask_1.png": png(91), "normal/normal_2_mask.png": png(92),
    }
    put(data, small_busi.archive(extra=masks, size=(300, 200), mode="RGB"), "Dataset_BUSI.zip")
    pair = load_pair("breastmnist-busi", data_dir=data)
    assert pair.external_name == "busi (which BreastMNIST is made from)" and not pair.verified_cpn
    assert pair.classes[pair.positive] == "malignant"
    assert pair.external.images.shape == (7, 1, 256, 256)
    assert pair.external.labels.tolist() == [0] * 5 + [1] * 2
    assert [int(image[0, -1, -1]) for image in pair.external.images] == [6, 7, 1, 2, 3, 4, 5]
    assert not any("resized" in warning or "converted" in warning for warning in pair.warnings)


def test_busi_is_said_to_be_no_external_test(data: Path, small_busi: Target, tmp_path: Path) -> None:
    """BreastMNIST is made from it."""
    put(data, content := small_busi.archive(), "Dataset_BUSI.zip")
    folder = small_busi.unzip(content, tmp_path / "unpacked")
    for place in (None, folder):
        pair = load_pair("breastmnist-busi", data_dir=data, external_dir=place)
        assert any("NOT AN EXTERNAL TEST" in warning and "trained on" in warning for warning in pair.warnings)


def test_one_image_less_is_not_the_set(data: Path, target: Target) -> None:
    says = rf"not {target.published.title}: expected .*medtune data get --pair {target.pair}"
    for missing in target.counts:
        put(data, target.archive(target.fewer(missing)), target.file)
        with pytest.raises(DataError, match=says):
            load_pair(target.pair, data_dir=data)


def test_images_of_another_size_are_not_cpn(data: Path, small_cpn: Target) -> None:
    content = small_cpn.archive({"COVID": 1, "NORMAL": 2, "PNEUMONIA": 4}, extra={
        "COVID/COVID_9.png": png(1, (255, 256)), "NORMAL/NORMAL_9.png": png(2, (224, 224)),
    })
    put(data, content, small_cpn.file)
    with pytest.raises(DataError, match=r"2 images are not 256x256.*NORMAL_9\.png.*COVID_9\.png"):
        load_pair("pneumoniamnist-cpn", data_dir=data)


def test_every_unreadable_image_is_named(data: Path, target: Target) -> None:
    first, *_, last = target.published.layout.labels
    counts = {**target.counts, first: target.counts[first] - 2, last: target.counts[last] - 1}
    extra = {f"{first}/a.png": b"", f"{first}/b.png": b"not a picture", f"{last}/c.png": png(1)[:300]}
    put(data, target.archive(counts, extra=extra), target.file)
    with pytest.raises(DataError) as caught:
        load_pair(target.pair, data_dir=data)
    assert all(name in str(caught.value) for name in (*extra, "3 of 7"))


def test_junk_beside_the_images_is_no_image(data: Path, target: Target) -> None:
    name = next(iter(target.counts))
    extra = {f"__MACOSX/{name}/._1.png": b"x", f"{name}/.DS_Store": b"x", f"{name}/Thumbs.db": b"x", "a.png": b"x"}
    put(data, target.archive(extra=extra), target.file)
    assert verified(load_pair(target.pair, data_dir=data), target)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_archive_is_refused(data: Path, target: Target, kept: float) -> None:
    content = target.archive()
    archive = put(data, content[: int(kept if kept >= 1 else kept * len(content))], target.file)
    with pytest.raises(DataError, match="not a whole zip") as caught:
        load_pair(target.pair, data_dir=data)
    assert str(archive) in str(caught.value) and f"medtune data get --pair {target.pair}" in str(caught.value)


def test_a_damaged_image_inside_is_noticed(data: Path, target: Target) -> None:
    """In CPN X-ray's case one of a class that is not even used."""
    inner = bytearray(target.archive(outer=False))
    inner[inner.index(b"IDAT") + 20] ^= 0xFF
    put(data, bytes(inner), target.file)
    with pytest.raises(DataError, match=r"(COVID|benign)_1\.png.*CRC"):
        load_pair(target.pair, data_dir=data)


def test_nothing_is_written_under_a_name_from_the_archive(data: Path, target: Target, tmp_path: Path) -> None:
    name = next(iter(target.counts))
    extra = {"../../escaped.png": png(1), "/tmp/medtune-escaped.png": png(1), f"{name}/../../../escaped.png": png(1)}
    put(data, target.archive(extra=extra), target.file)
    before = {path for path in tmp_path.rglob("*") if "decoded" not in path.parts}
    load_pair(target.pair, data_dir=data)
    after = {path for path in tmp_path.rglob("*") if "decoded" not in path.parts}
    assert after - before == {data / f"{target.file}.json"}
    assert not Path("/tmp/medtune-escaped.png").exists()


def test_the_digest_is_recorded_on_first_use_and_compared_later(data: Path, target: Target) -> None:
    content = target.archive()
    put(data, content, target.file)
    load_pair(target.pair, data_dir=data)
    record = json.loads((data / f"{target.file}.json").read_text())
    assert record["archive_sha256"] == hashlib.sha256(content).hexdigest()
    assert record["inner_sha256"] == hashlib.sha256(target.images_of(content)).hexdigest()

    put(data, target.archive(extra={"readme.txt": b"another archive, right counts"}), target.file)
    with pytest.raises(DataError, match=f"has changed.*on first use it had {record['inner_sha256']}"):
        load_pair(target.pair, data_dir=data)
    put(data, content, target.file)
    assert verified(load_pair(target.pair, data_dir=data), target)


def test_the_record_goes_to_the_user_folder_where_data_are_read_only(data: Path, target: Target, tmp_path: Path) -> None:
    put(data, target.archive(), target.file)
    data.chmod(0o555)
    try:
        assert verified(load_pair(target.pair, data_dir=data), target)
        assert {path.name for path in data.iterdir()} == {target.file, "pneumoniamnist.npz", "breastmnist.npz"}
        (record,) = (tmp_path / "user-cache" / "medtune" / "records").iterdir()
        record.write_text(json.dumps({**json.loads(record.read_text()), "inner_sha256": "0" * 64}))
        with pytest.raises(DataError, match="has changed"):
            load_pair(target.pair, data_dir=data)
    finally:
        data.chmod(0o755)


def test_a_folder_with_the_right_counts_is_not_the_set(data: Path, target: Target, tmp_path: Path) -> None:
    content = target.archive()
    put(tmp_path / "elsewhere", content, target.file)
    folder = target.unzip(content, tmp_path / target.published.key)
    pair = load_pair(target.pair, data_dir=data, external_dir=folder)
    assert not verified(pair, target) and pair.external_name == f"{folder.name} (unverified folder)"
    assert any("where they come from is not known" in warning for warning in pair.warnings)


def test_a_folder_with_a_verified_archives_images_is_the_set(data: Path, target: Target, tmp_path: Path) -> None:
    content = target.archive()
    archive = put(data, content, target.file)
    expected = load_pair(target.pair, data_dir=data)
    folder = target.unzip(content, tmp_path / "unpacked")
    archive.unlink()
    pair = load_pair(target.pair, data_dir=data, external_dir=folder)
    assert verified(pair, target) and pair.fingerprint == expected.fingerprint
    assert np.array_equal(pair.external.images, expected.external.images)

    name = next(iter(target.published.layout.labels))
    (folder / name / f"{name}_1.png").write_bytes(png(200))
    pair = load_pair(target.pair, data_dir=data, external_dir=folder)
    assert not verified(pair, target) and pair.external_name == f"{folder.name} (unverified folder)"


def test_images_in_other_class_folders_are_not_the_set(data: Path, target: Target, tmp_path: Path) -> None:
    put(data, content := target.archive(), target.file)
    load_pair(target.pair, data_dir=data)
    folder = target.unzip(content, tmp_path / "unpacked")
    first, *_, last = target.published.layout.labels
    (folder / first / f"{first}_{target.counts[first]}.png").rename(folder / last / f"{last}_0.png")
    assert not verified(load_pair(target.pair, data_dir=data, external_dir=folder), target)


def test_the_archive_may_be_named_itself_or_by_its_folder(data: Path, target: Target, tmp_path: Path) -> None:
    archive = put(tmp_path / "elsewhere", target.archive(), target.file)
    for place in (archive, archive.parent):
        assert verified(load_pair(target.pair, data_dir=data, external_dir=place), target)


def test_a_truncated_zip_is_not_moved_into_place(server: FaultyServer, target: Target, tmp_path: Path) -> None:
    server.files["zip"] = target.archive()[:-40]
    with pytest.raises(DataError, match="not a whole zip"):
        fetch([server.url("zip")], tmp_path / target.file, target.published.check_structure, Effort(pause=0.01))
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob("*.part"))


def test_the_publishers_digest_is_compared(server: FaultyServer, small_cpn: Target, tmp_path: Path) -> None:
    listing = [{"filename": cpn.INNER, "content_details": {"sha256_hash": "AB" * 32}}]
    server.files["listing"] = json.dumps(listing).encode()
    published = cpn.published_sha256(server.url("listing"))
    assert published == "ab" * 32
    archive = put(tmp_path, small_cpn.archive(), small_cpn.file)
    with pytest.raises(DataError, match=f"the publisher lists {published}"):
        small_cpn.published.check_structure(archive, published)
    small_cpn.published.check_structure(archive, None)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'[{"filename": 1}]'])
def test_a_listing_that_says_nothing_is_no_digest(server: FaultyServer, answer: bytes) -> None:
    server.files["listing"] = answer
    assert cpn.published_sha256(server.url("listing")) is None
    assert cpn.published_sha256(server.url("gone")) is None


def test_a_copied_data_folder_still_knows_its_archive(data: Path, target: Target, tmp_path: Path) -> None:
    put(data, target.archive(), target.file)
    load_pair(target.pair, data_dir=data)
    copy = shutil.copytree(data, tmp_path / "copy")
    assert verified(load_pair(target.pair, data_dir=copy), target)
