"""The CPN X-ray archive: what counts as verified, what is refused, and that nothing escapes from a zip."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer
from xray_files import png

from medtune.data import cpn, load_pair
from medtune.data.download import Effort, fetch
from medtune.errors import DataError

Make = Callable[..., bytes]


@pytest.fixture
def data(tmp_path: Path, write_npz: Callable[..., Path]) -> Path:
    """A data folder with PneumoniaMNIST in it."""
    write_npz(tmp_path / "data")
    return tmp_path / "data"


def put(folder: Path, content: bytes, name: str = cpn.FILE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def unzip(archive: Path, folder: Path) -> Path:
    """As a user would: the outer zip, then the inner one."""
    with zipfile.ZipFile(archive) as outer:
        inner = io.BytesIO(outer.read(outer.namelist()[0]))
    zipfile.ZipFile(inner).extractall(folder)
    return folder


def test_the_published_set_in_full_is_cpn(data: Path, make_archive: Make) -> None:
    """The real counts, 5228 images: the one test that is not shrunk."""
    put(data, make_archive(cpn.COUNTS))
    assert cpn.COUNTS == {"COVID": 1626, "NORMAL": 1802, "PNEUMONIA": 1800}
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn and pair.external_name == "cpn" and not pair.synthetic
    assert pair.external.images.shape == (3602, 1, 256, 256)
    assert pair.counts()["external"] == (1802, 1800)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("name", [cpn.FILE, "dvntn9yhd2-1.zip", cpn.INNER])
def test_images_come_in_the_order_of_their_names(
    data: Path, make_archive: Make, small_cpn: dict[str, int], outer: bool, name: str
) -> None:
    put(data, make_archive(small_cpn, outer=outer), name)
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn
    assert pair.external.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert [int(image[0, -1, -1]) for image in pair.external.images] == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("missing", ["COVID", "NORMAL", "PNEUMONIA"])
def test_one_image_less_is_not_cpn(data: Path, make_archive: Make, small_cpn: dict[str, int], missing: str) -> None:
    put(data, make_archive({**small_cpn, missing: small_cpn[missing] - 1}))
    with pytest.raises(DataError, match=r"not CPN X-ray: expected 1626 COVID.*medtune data get --pair"):
        load_pair("pneumoniamnist-cpn", data_dir=data)


def test_images_of_another_size_are_not_cpn(data: Path, make_archive: Make, small_cpn: dict[str, int]) -> None:
    content = make_archive({**small_cpn, "COVID": 1, "NORMAL": 2}, extra={
        "COVID/COVID_9.png": png(1, (255, 256)), "NORMAL/NORMAL_9.png": png(2, (224, 224)),
    })
    put(data, content)
    with pytest.raises(DataError, match=r"2 images are not 256x256.*NORMAL_9\.png.*COVID_9\.png"):
        load_pair("pneumoniamnist-cpn", data_dir=data)


def test_every_unreadable_image_is_named(data: Path, make_archive: Make, small_cpn: dict[str, int]) -> None:
    put(data, make_archive({"COVID": 2, "NORMAL": 1, "PNEUMONIA": 3}, extra={
        "NORMAL/a.png": b"", "NORMAL/b.png": b"not a picture", "PNEUMONIA/c.png": png(1)[:300],
    }))
    with pytest.raises(DataError) as caught:
        load_pair("pneumoniamnist-cpn", data_dir=data)
    assert all(name in str(caught.value) for name in ("NORMAL/a.png", "NORMAL/b.png", "PNEUMONIA/c.png", "3 of 7"))


def test_junk_beside_the_images_is_no_image(data: Path, make_archive: Make, small_cpn: dict[str, int]) -> None:
    extra = {"__MACOSX/NORMAL/._NORMAL_1.png": b"x", "NORMAL/.DS_Store": b"x", "NORMAL/Thumbs.db": b"x", "a.png": b"x"}
    put(data, make_archive(small_cpn, extra=extra))
    assert load_pair("pneumoniamnist-cpn", data_dir=data).verified_cpn


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_archive_is_refused(
    data: Path, make_archive: Make, small_cpn: dict[str, int], kept: float
) -> None:
    content = make_archive(small_cpn)
    archive = put(data, content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(DataError, match="not a whole zip") as caught:
        load_pair("pneumoniamnist-cpn", data_dir=data)
    assert str(archive) in str(caught.value) and "medtune data get" in str(caught.value)


def test_a_damaged_image_inside_is_noticed(data: Path, make_archive: Make, small_cpn: dict[str, int]) -> None:
    inner = bytearray(make_archive(small_cpn, outer=False))
    inner[inner.index(b"IDAT") + 20] ^= 0xFF
    put(data, bytes(inner))
    with pytest.raises(DataError, match=r"COVID_1\.png.*CRC"):
        load_pair("pneumoniamnist-cpn", data_dir=data)


def test_nothing_is_written_under_a_name_from_the_archive(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    extra = {"../../escaped.png": png(1), "/tmp/medtune-escaped.png": png(1), "NORMAL/../../../escaped.png": png(1)}
    put(data, make_archive(small_cpn, extra=extra))
    before = {path for path in tmp_path.rglob("*") if "decoded" not in path.parts}
    load_pair("pneumoniamnist-cpn", data_dir=data)
    after = {path for path in tmp_path.rglob("*") if "decoded" not in path.parts}
    assert after - before == {data / f"{cpn.FILE}.json"}
    assert not Path("/tmp/medtune-escaped.png").exists()


def test_the_digest_is_recorded_on_first_use_and_compared_later(
    data: Path, make_archive: Make, small_cpn: dict[str, int]
) -> None:
    content = make_archive(small_cpn)
    archive = put(data, content)
    load_pair("pneumoniamnist-cpn", data_dir=data)
    record = json.loads((data / f"{cpn.FILE}.json").read_text())
    assert record["archive_sha256"] == hashlib.sha256(content).hexdigest()
    with zipfile.ZipFile(archive) as outer:
        assert record["inner_sha256"] == hashlib.sha256(outer.read(outer.namelist()[0])).hexdigest()

    other = make_archive(small_cpn, extra={"readme.txt": b"another archive, right counts"})
    put(data, other)
    with pytest.raises(DataError, match=f"has changed.*on first use it had {record['inner_sha256']}"):
        load_pair("pneumoniamnist-cpn", data_dir=data)
    put(data, content)
    assert load_pair("pneumoniamnist-cpn", data_dir=data).verified_cpn


def test_the_record_goes_to_the_user_folder_where_data_are_read_only(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    put(data, make_archive(small_cpn))
    data.chmod(0o555)
    try:
        assert load_pair("pneumoniamnist-cpn", data_dir=data).verified_cpn
        assert {path.name for path in data.iterdir()} == {cpn.FILE, "pneumoniamnist.npz"}
        (record,) = (tmp_path / "user-cache" / "medtune" / "records").iterdir()
        record.write_text(json.dumps({**json.loads(record.read_text()), "inner_sha256": "0" * 64}))
        with pytest.raises(DataError, match="has changed"):
            load_pair("pneumoniamnist-cpn", data_dir=data)
    finally:
        data.chmod(0o755)


def test_a_folder_with_the_right_counts_is_not_cpn(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    archive = put(tmp_path / "elsewhere", make_archive(small_cpn))
    folder = unzip(archive, tmp_path / "cpn")
    pair = load_pair("pneumoniamnist-cpn", data_dir=data, external_dir=folder)
    assert not pair.verified_cpn and pair.external_name == "cpn (unverified folder)"
    assert any("where they come from is not known" in warning for warning in pair.warnings)


def test_a_folder_with_a_verified_archives_images_is_cpn(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    archive = put(data, make_archive(small_cpn))
    expected = load_pair("pneumoniamnist-cpn", data_dir=data)
    folder = unzip(archive, tmp_path / "unpacked")
    archive.unlink()
    pair = load_pair("pneumoniamnist-cpn", data_dir=data, external_dir=folder)
    assert pair.verified_cpn and pair.external_name == "cpn"
    assert np.array_equal(pair.external.images, expected.external.images)
    assert pair.fingerprint == expected.fingerprint

    (folder / "NORMAL" / "NORMAL_1.png").write_bytes(png(200))
    pair = load_pair("pneumoniamnist-cpn", data_dir=data, external_dir=folder)
    assert not pair.verified_cpn and "cpn" not in pair.external_name.replace("unpacked", "")


def test_images_in_other_class_folders_are_not_cpn(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    archive = put(data, make_archive(small_cpn))
    load_pair("pneumoniamnist-cpn", data_dir=data)
    folder = unzip(archive, tmp_path / "unpacked")
    (folder / "NORMAL" / "NORMAL_3.png").rename(folder / "PNEUMONIA" / "PNEUMONIA_0.png")
    assert not load_pair("pneumoniamnist-cpn", data_dir=data, external_dir=folder).verified_cpn


def test_the_archive_may_be_named_itself_or_by_its_folder(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    archive = put(tmp_path / "elsewhere", make_archive(small_cpn))
    for place in (archive, archive.parent):
        assert load_pair("pneumoniamnist-cpn", data_dir=data, external_dir=place).verified_cpn


def test_a_truncated_zip_is_not_moved_into_place(
    server: FaultyServer, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    server.files["cpn"] = make_archive(small_cpn)[:-40]
    with pytest.raises(DataError, match="not a whole zip"):
        fetch([server.url("cpn")], tmp_path / cpn.FILE, cpn.check_structure, Effort(pause=0.01))
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob("*.part"))


def test_the_publishers_digest_is_compared(
    server: FaultyServer, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    listing = [{"filename": cpn.INNER, "content_details": {"sha256_hash": "AB" * 32}}]
    server.files["listing"] = json.dumps(listing).encode()
    published = cpn.published_sha256(server.url("listing"))
    assert published == "ab" * 32
    archive = put(tmp_path, make_archive(small_cpn))
    with pytest.raises(DataError, match=f"the publisher lists {published}"):
        cpn.check_structure(archive, published)
    cpn.check_structure(archive, None)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'[{"filename": 1}]'])
def test_a_listing_that_says_nothing_is_no_digest(server: FaultyServer, answer: bytes) -> None:
    server.files["listing"] = answer
    assert cpn.published_sha256(server.url("listing")) is None
    assert cpn.published_sha256(server.url("gone")) is None


def test_a_copied_data_folder_still_knows_its_archive(
    data: Path, make_archive: Make, small_cpn: dict[str, int], tmp_path: Path
) -> None:
    put(data, make_archive(small_cpn))
    load_pair("pneumoniamnist-cpn", data_dir=data)
    copy = shutil.copytree(data, tmp_path / "copy")
    assert load_pair("pneumoniamnist-cpn", data_dir=copy).verified_cpn
