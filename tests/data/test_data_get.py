"""`medtune data get`, from an empty folder to a pair that loads, against a local server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_server import FaultyServer

from medtune.data import cli, cpn, load_pair, medmnist_npz
from medtune.data.download import Unreachable
from medtune.errors import DataError

NPZ = "pneumoniamnist.npz"


@pytest.fixture
def urls(
    server: FaultyServer,
    write_npz: Callable[..., Path],
    make_archive: Callable[..., bytes],
    small_cpn: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[str]]:
    """A server that has both files; the official MD5 is that of the generated npz."""
    server.files["npz"] = write_npz(tmp_path / "served").read_bytes()
    server.files["cpn"] = make_archive(small_cpn)
    md5 = hashlib.md5(server.files["npz"]).hexdigest()
    monkeypatch.setattr(medmnist_npz, "source", lambda size: medmnist_npz.Source(NPZ, server.url("npz"), md5, 28))
    return {NPZ: [server.url("npz")], cpn.FILE: [server.url("cpn")]}


def test_from_nothing_to_a_verified_pair(
    server: FaultyServer, urls: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    cli.get(data_dir=data, urls=urls)
    out = capsys.readouterr().out
    assert f"downloaded from {server.url('npz')}" in out and f"downloaded from {server.url('cpn')}" in out
    pair = load_pair("pneumoniamnist-cpn", data_dir=data)
    assert pair.verified_cpn and pair.warnings == ()
    assert server.url("cpn") in json.loads((data / f"{cpn.FILE}.json").read_text())["origin"]
    cli.get(data_dir=data, urls=urls)
    assert capsys.readouterr().out.count("was there") == 2 and len(server.requests) == 2
    assert cli.check(data_dir=data)


def test_one_that_fails_does_not_stop_the_other(
    server: FaultyServer, urls: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"cpn-xray\.zip cannot be downloaded:\n.*404") as caught:
        cli.get(data_dir=tmp_path / "data", urls={**urls, cpn.FILE: [server.url("gone")]})
    assert not isinstance(caught.value, Unreachable)
    assert "downloaded from" in capsys.readouterr().out
    assert (tmp_path / "data" / NPZ).exists()
    with pytest.raises(DataError, match=rf"{NPZ} cannot be downloaded"):
        cli.get(data_dir=tmp_path / "other", urls={**urls, NPZ: [server.url("gone")]})
    assert (tmp_path / "other" / cpn.FILE).exists()


def test_no_network_is_told_apart(urls: dict[str, list[str]], server: FaultyServer, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(Unreachable, match=r"(?s)pneumoniamnist\.npz.*cpn-xray\.zip"):
        cli.get(data_dir=tmp_path / "data", urls=urls)


def test_the_publishers_digest_decides(
    urls: dict[str, list[str]], server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the published addresses the publisher's list is asked; a file it does not list is refused."""
    monkeypatch.setattr(cpn, "URLS", (server.url("cpn"),))
    monkeypatch.setattr(cpn, "LISTING", server.url("listing"))
    entry = {"filename": cpn.INNER, "content_details": {"sha256_hash": "0" * 64}}
    server.files["listing"] = json.dumps([entry]).encode()
    with pytest.raises(DataError, match="publisher lists 000"):
        cli.get(data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / cpn.FILE).exists()

    by_hand = tmp_path / "data" / "dvntn9yhd2-1.zip"  # one that was there is compared too
    by_hand.write_bytes(server.files["cpn"])
    with pytest.raises(DataError, match="publisher lists 000"):
        cli.get(data_dir=tmp_path / "data")
    entry["content_details"] = {"sha256_hash": cpn.decode(by_hand).facts["inner_sha256"]}
    by_hand.unlink()
    server.files["listing"] = json.dumps([entry]).encode()
    cli.get(data_dir=tmp_path / "data")
    record = json.loads((tmp_path / "data" / f"{cpn.FILE}.json").read_text())
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


def test_synthetic_has_nothing_to_get(capsys: pytest.CaptureFixture[str]) -> None:
    cli.get(pair="synthetic")
    assert "nothing to get" in capsys.readouterr().out
