"""A folder of one's own images as a pair: the README's file works as it stands, and its parts do what they say."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medtune.config import TrialConfig
from medtune.data import Split, available_pairs, cli, load_pair, pairs
from medtune.data.image_folder import read_classes, split_off
from medtune.errors import DataError, DataMissing

README = Path(__file__).parents[2] / "README.md"
Write = Callable[..., Path]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The README's file, dropped where the pairs are."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(pairs, "__path__", [*pairs.__path__, str(tmp_path / "more")])
    importlib.invalidate_caches()
    yield code
    sys.modules.pop("medtune.data.pairs.mine", None)


@pytest.fixture
def data(tmp_path: Path, write_folders: Write) -> Path:
    write_folders(tmp_path / "data" / "mine", {"healthy": 20, "ill": 10}, size=(50, 40))
    write_folders(tmp_path / "data" / "theirs", {"healthy": 3, "ill": 4, "not looked at": 1}, size=(300, 300))
    return tmp_path / "data"


def test_the_readmes_file_is_short(mine: str) -> None:
    assert len([line for line in mine.splitlines() if line.strip()]) <= 25


def test_the_readmes_file_is_a_pair(mine: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mine" in available_pairs()
    pair = load_pair("mine", native_size=64, data_dir=data)
    assert pair.counts() == {"train": (16, 8), "val": (2, 1), "test": (2, 1), "external": (3, 4)}
    assert pair.train.images.shape[1:] == (1, 64, 64) and pair.external.images.shape[1:] == (1, 256, 256)
    assert (pair.name, pair.external_name, pair.classes, pair.positive) == ("mine", "theirs (folder)", ("healthy", "ill"), 1)
    again = load_pair("mine", native_size=64, data_dir=data)
    assert again.fingerprint == pair.fingerprint and len(set(pair.fingerprint.values())) == 4

    cli.get(pair="mine", data_dir=data)
    assert "20 healthy, 10 ill" in capsys.readouterr().out
    assert cli.check(pair="mine", data_dir=data) and "3 healthy, 4 ill" in capsys.readouterr().out
    cli.where(pair="mine", data_dir=data, external_dir=data / "theirs")
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2:] for row in rows] == [
        [str(data / "mine"), "20 healthy, 10 ill", "yes"], [str(data / "theirs"), "3 healthy, 4 ill", "yes"],
    ]


def test_the_readmes_file_says_what_is_missing_or_broken(
    mine: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(DataMissing, match=r"gone, which must hold the folders healthy and ill, does not exist"):
        load_pair("mine", data_dir=data, external_dir=gone)
    with pytest.raises(DataMissing, match="cannot be downloaded"):
        cli.get(pair="mine", data_dir=gone)
    assert not cli.check(pair="mine", data_dir=data, external_dir=gone)
    assert "missing" in capsys.readouterr().out
    cli.where(pair="mine", data_dir=data, external_dir=gone)
    assert f"--external-dir\t{gone}\tno such folder" in capsys.readouterr().out
    (data / "mine" / "ill" / "ill_3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 of 30 images cannot be read.*\n.*ill_3\.png"):
        load_pair("mine", data_dir=data)
    assert not cli.check(pair="mine", data_dir=data)


def test_the_readmes_pair_trains_and_is_tested(
    mine: str, data: Path, tiny_config: Callable[..., TrialConfig]
) -> None:
    from medtune.evaluate import external_test
    from medtune.training import fit

    config = tiny_config(pair="mine", epochs=1)
    pair = load_pair(config.pair, data_dir=data)
    fitting = fit(config, pair, device=torch.device("cpu"))
    result = next(fitting)
    assert result.metrics["train/loss"] is not None and result.metrics["val/auc"] is not None
    found = external_test(fitting.best_model(), config, pair, torch.device("cpu"))
    assert found["external/n"] == 7 and found["external/name"] == "theirs (folder)" and found["external/auc"] is not None


def test_classes_are_labelled_in_their_order_and_colour_is_kept(tmp_path: Path, write_folders: Write) -> None:
    folder = write_folders(tmp_path / "set", {"b": 2, "a": 1, "c": 3})
    Image.new("RGB", (20, 20), (10, 20, 30)).save(folder / "a" / "colour.png")
    Image.fromarray(np.full((20, 20), 0x8000, np.uint16)).save(folder / "c" / "deep.png")
    split = read_classes(folder, ("c", "a", "b"), 16, 3, [])
    assert split.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 2
    assert split.images.shape == (8, 3, 16, 16)
    assert split.images[5, :, 0, 0].tolist() == [10, 20, 30]
    assert np.all(np.abs(split.images[3].astype(int) - 127) <= 1)
    grey = read_classes(folder, ("c", "a", "b"), 16, 1, [])
    assert grey.images.shape == (8, 1, 16, 16)


def test_one_folder_is_kept_decoded_for_each_size_and_order_of_classes(tmp_path: Path, write_folders: Write) -> None:
    folder, cache = write_folders(tmp_path / "set", {"a": 1, "b": 2}), tmp_path / "cache"
    for _ in range(2):
        assert read_classes(folder, ("a", "b"), 16, 1, [cache]).images.shape[2] == 16
        assert read_classes(folder, ("a", "b"), 32, 1, [cache]).images.shape[2] == 32
        assert read_classes(folder, ("a", "b"), 32, 3, [cache]).images.shape[1] == 3
        assert len(list(cache.glob("*/images.npy"))) == 3
    assert read_classes(folder, ("b", "a"), 16, 1, [cache]).labels.tolist() == [0, 0, 1]


def labelled(*counts: int) -> Split:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return Split(images, labels.astype(np.int64))


@pytest.mark.parametrize("counts", [(100, 40), (3, 3, 3), (50, 4, 7)])
def test_parts_share_no_image_and_have_every_class(counts: tuple[int, ...]) -> None:
    whole = labelled(*counts)
    parts = split_off(whole, val=0.2, test=0.1)
    together = np.concatenate([part.images.ravel() for part in parts])
    assert sorted(together.tolist()) == whole.images.ravel().tolist()
    for part in parts:
        assert set(part.labels) == set(range(len(counts)))
        assert np.array_equal(part.labels, whole.labels[part.images.ravel()])


def test_shares_are_every_class_own_and_fixed_by_the_seed() -> None:
    whole = labelled(100, 40)
    train, val, test = split_off(whole, val=0.2, test=0.1)
    counts = [np.bincount(part.labels).tolist() for part in (train, val, test)]
    assert counts == [[70, 28], [20, 8], [10, 4]]
    assert np.array_equal(split_off(whole, 0.2, 0.1)[1].images, val.images)
    assert not np.array_equal(split_off(whole, 0.2, 0.1, seed=1)[1].images, val.images)


@pytest.mark.parametrize(
    ("counts", "shares", "says"),
    [
        ((9, 2), (0.1, 0.1), "class 1 has 2 images; at least 3"),
        ((9, 9), (0.5, 0.5), "less than 1 together, got 0.5 and 0.5"),
        ((9, 9), (0.0, 0.5), "above 0"),
    ],
)
def test_what_cannot_be_split_is_refused(counts: tuple[int, ...], shares: tuple[float, float], says: str) -> None:
    with pytest.raises(DataError, match=says):
        split_off(labelled(*counts), *shares)
