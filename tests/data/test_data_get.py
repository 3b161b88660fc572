"""`medtune data get`, from an empty folder to a pair that loads, against a local server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from published import Target, use

from medtune.data import cli, cpn, load_pair, medmnist_npz
from medtune.data.download import Unreachable
from medtune.data.pairs import pneumoniamnist_cpn
from medtune.errors import DataError

NPZ, FILE = "pneumoniamnist.npz", "cpn-xray.zip"


def serve_npz(server: FaultyServer, path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a generated file as `npz`; the official MD5 is that file's."""
    server.files["npz"] = path.read_bytes()
    md5 = hashlib.md5(server.files["npz"]).hexdigest()
    source = dataclasses.replace(medmnist_npz.source(name, 28), url=server.url("npz"), md5=md5)
    monkeypatch.setattr(medmnist_npz, "source", lambda name, size: source)


@pytest.fixture
def urls(
    server: FaultyServer,
    write_npz: Callable[..., Path],
    small_cpn: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[str]]:
    """A server that has both files."""
    serve_npz(server, write_npz(tmp_path / "served"), "pneumoniamnist", monkeypatch)
    server.files["cpn"] = small_cpn.archive()
    return {NPZ: [server.url("npz")], FILE: [server.url("cpn")]}


def test_from_nothing_to_a_verified_pair(
    server: FaultyServer, urls: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    cli.get(data_dir=data, urls=urls)
    out = capsys.readouterr().out
    assert f"downloaded from {server.url('npz')}" in out and f"downloaded from {server.url('cpn')}" in out
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn and pair.warnings == ()
    assert server.url("cpn") in json.loads((data / f"{FILE}.json").read_text())["origin"]
    cli.get(data_dir=data, urls=urls)
    assert capsys.readouterr().out.count("was there") == 2 and len(server.requests) == 2
    assert cli.check(data_dir=data)


def test_one_that_fails_does_not_stop_the_other(
    server: FaultyServer, urls: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"cpn-xray\.zip cannot be downloaded:\n.*404") as caught:
        cli.get(data_dir=tmp_path / "data", urls={**urls, FILE: [server.url("gone")]})
    assert not isinstance(caught.value, Unreachable)
    assert "downloaded from" in capsys.readouterr().out
    assert (tmp_path / "data" / NPZ).exists()
    with pytest.raises(DataError, match=rf"{NPZ} cannot be downloaded"):
        cli.get(data_dir=tmp_path / "other", urls={**urls, NPZ: [server.url("gone")]})
    assert (tmp_path / "other" / FILE).exists()


def test_no_network_is_told_apart(urls: dict[str, list[str]], server: FaultyServer, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(Unreachable, match=r"(?s)pneumoniamnist\.npz.*cpn-xray\.zip"):
        cli.get(data_dir=tmp_path / "data", urls=urls)


def test_the_publishers_digest_decides(
    urls: dict[str, list[str]],
    small_cpn: Target,
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the published addresses the publisher's list is asked; a file it does not list is refused."""
    at_server = dataclasses.replace(small_cpn.published, urls=(server.url("cpn"),))
    use(monkeypatch, pneumoniamnist_cpn, dataclasses.replace(small_cpn, published=at_server))
    monkeypatch.setattr(cpn, "LISTING", server.url("listing"))
    entry = {"filename": cpn.INNER, "content_details": {"sha256_hash": "0" * 64}}
    server.files["listing"] = json.dumps([entry]).encode()
    with pytest.raises(DataError, match="publisher lists 000"):
        cli.get(data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / FILE).exists()

    by_hand = tmp_path / "data" / "dvntn9yhd2-1.zip"  # one that was there is compared too
    by_hand.write_bytes(server.files["cpn"])
    with pytest.raises(DataError, match="publisher lists 000"):
        cli.get(data_dir=tmp_path / "data")
    entry["content_details"] = {"sha256_hash": hashlib.sha256(small_cpn.images_of(server.files["cpn"])).hexdigest()}
    by_hand.unlink()
    server.files["listing"] = json.dumps([entry]).encode()
    cli.get(data_dir=tmp_path / "data")
    record = json.loads((tmp_path / "data" / f"{FILE}.json").read_text())
    assert "as its publisher lists it" in record["origin"]


def test_an_npz_that_is_there_is_kept_and_its_md5_said(
    urls: dict[str, list[str]], tmp_path: Path, write_npz: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    path = write_npz(tmp_path / "data", val_images=np.zeros((524, 28, 28), np.uint8))
    before = path.read_bytes()
    cli.get(data_dir=path.parent, urls=urls)
    assert path.read_bytes() == before
    assert hashlib.md5(before).hexdigest() in capsys.readouterr().out


def test_busi_from_nothing_to_a_pair(
    server: FaultyServer,
    write_npz: Callable[..., Path],
    small_busi: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cut in the middle of the archive is gone on from; the digest, published nowhere, is recorded."""
    serve_npz(server, write_npz(tmp_path / "served", name="breastmnist"), "breastmnist", monkeypatch)
    server.files["busi"] = small_busi.archive()
    server.faults = [None, ("cut", 2000)]
    data, urls = tmp_path / "data", {"Dataset_BUSI.zip": [server.url("busi")]}
    cli.get(pair="breastmnist-busi", data_dir=data, urls=urls)
    out = capsys.readouterr().out
    assert f"downloaded from {server.url('npz')}" in out and f"downloaded from {server.url('busi')}" in out
    assert load_pair("breastmnist-busi", data_dir=data).external_name.startswith("busi ")
    record = json.loads((data / "Dataset_BUSI.zip.json").read_text())
    assert record["archive_sha256"] == hashlib.sha256(server.files["busi"]).hexdigest()
    assert cli.check(pair="breastmnist-busi", data_dir=data)
    assert "NOT AN EXTERNAL TEST" in capsys.readouterr().out


def test_an_archive_that_is_not_busi_is_not_kept(
    server: FaultyServer, small_busi: Target, write_npz: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_npz(tmp_path / "data", name="breastmnist").parent
    server.files["busi"] = small_busi.archive(small_busi.fewer("benign"))
    with pytest.raises(DataError, match="not Breast Ultrasound Images: expected 3 benign"):
        cli.get(pair="breastmnist-busi", data_dir=data, urls={"Dataset_BUSI.zip": [server.url("busi")]})
    assert not list(data.glob("Dataset_BUSI*.zip"))


def test_a_medmnist_set_from_nothing_by_many_at_once(
    server: FaultyServer,
    write_npz: Callable[..., Path],
    small_medmnist: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_npz(server, write_npz(tmp_path / "served", name="dermamnist"), "dermamnist", monkeypatch)
    data, name = tmp_path / "data", "medmnist:dermamnist"
    threads = [threading.Thread(target=cli.get, kwargs={"pair": name, "data_dir": data}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert load_pair(name, data_dir=data).counts()["train"] == (4,) * 7
    server.files["npz"] += b"x"
    with pytest.raises(DataError, match="expected MD5"):
        cli.get(pair=name, data_dir=tmp_path / "other")


def test_synthetic_has_nothing_to_get(capsys: pytest.CaptureFixture[str]) -> None:
    cli.get(pair="synthetic")
    assert "nothing to get" in capsys.readouterr().out
