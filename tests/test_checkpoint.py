"""Checkpoints: whole or not at all, found damaged when damaged, and never run as code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medtune.checkpoint import CheckpointStore, Snapshot, best_file, describe, discard, read, write
from medtune.config import TrialConfig
from medtune.errors import CheckpointError
from medtune.weights import load_weights

Make = Callable[..., TrialConfig]
DATA = {"train": "a", "val": "b"}


def tensors(seed: float) -> dict[str, Tensor]:
    return {"weight": torch.full((40, 30), seed), "steps": torch.tensor(int(seed)), "half": torch.ones(3).bfloat16()}


def snapshot(config: TrialConfig, epoch: int, best_epoch: int | None = None) -> Snapshot:
    best_epoch = epoch if best_epoch is None else best_epoch
    return Snapshot(
        epoch=epoch,
        config=config,
        fingerprint=DATA,
        model=tensors(epoch),
        optimizer={"0.exp_avg": torch.full((40, 30), -float(epoch))},
        best_epoch=best_epoch,
        best=tensors(best_epoch) if best_epoch else {},
        progress={"lr": 0.1, "history": [epoch]},
    )


def assert_equal(found: Snapshot | None, wanted: Snapshot) -> None:
    assert found is not None
    assert (found.epoch, found.best_epoch, found.progress) == (wanted.epoch, wanted.best_epoch, wanted.progress)
    for part in ("model", "optimizer", "best"):
        have, want = getattr(found, part), getattr(wanted, part)
        assert have.keys() == want.keys()
        for name in want:
            assert have[name].dtype == want[name].dtype and torch.equal(have[name], want[name]), (part, name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_read_back(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    CheckpointStore(tmp_path).save(snapshot(config, 3, best_epoch=2))
    assert_equal(CheckpointStore(tmp_path).newest(config, DATA), snapshot(config, 3, best_epoch=2))
    assert CheckpointStore(tmp_path / "none").newest(config, DATA) is None


def test_two_newest_stay_with_the_best_weights_they_refer_to(tiny_config: Make, tmp_path: Path) -> None:
    store, config = CheckpointStore(tmp_path), tiny_config()
    for epoch, best_epoch in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 3)):
        store.save(snapshot(config, epoch, best_epoch))
    assert names(tmp_path) == ["best-0003.safetensors", "last-0004.safetensors", "last-0005.safetensors"]
    store.save(snapshot(config, 6, 6))
    assert names(tmp_path) == [f"{n}.safetensors" for n in ("best-0003", "best-0006", "last-0005", "last-0006")]


def test_newest_good_one_of_all_attempts_is_used(tiny_config: Make, tmp_path: Path) -> None:
    config, folders = tiny_config(), [tmp_path / str(n) for n in range(3)]
    CheckpointStore(folders[0]).save(snapshot(config, 2))
    CheckpointStore(folders[1]).save(snapshot(config, 4))
    store = CheckpointStore(folders[2], earlier=folders[1::-1])
    assert_equal(store.newest(config, DATA), snapshot(config, 4))
    (folders[1] / "last-0004.safetensors").write_bytes(b"")
    assert_equal(store.newest(config, DATA), snapshot(config, 2))
    assert not folders[2].exists()


def test_best_weights_come_along_into_the_own_folder(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    CheckpointStore(tmp_path / "1").save(snapshot(config, 2, best_epoch=1))
    store = CheckpointStore(tmp_path / "2", earlier=[tmp_path / "1"])
    store.newest(config, DATA)
    store.save(snapshot(config, 3, best_epoch=1))
    assert names(tmp_path / "2") == ["best-0001.safetensors", "last-0003.safetensors"]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda c: c[: len(c) // 2],
    "last byte gone": lambda c: c[:-1],
    "empty": lambda c: b"",
    "zeros": lambda c: bytes(len(c)),
    "bit of the length": lambda c: flip(c, 1),
    "bit of the metadata": lambda c: flip(c, c.index(b'\\"epoch\\"') + 12),
    "bit of a name": lambda c: flip(c, c.index(b'weight"')),
    "bit of a tensor": lambda c: flip(c, len(c) - 100),
}


@pytest.mark.parametrize("kind", ["last", "best"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_one_is_named_and_the_one_before_is_used(
    tiny_config: Make, tmp_path: Path, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, store = tiny_config(), CheckpointStore(tmp_path)
    store.save(snapshot(config, 1))
    store.save(snapshot(config, 2))
    broken = tmp_path / f"{kind}-0002.safetensors"
    broken.write_bytes(DAMAGE[damage](broken.read_bytes()))
    store = CheckpointStore(tmp_path)
    assert_equal(store.newest(config, DATA), snapshot(config, 1))
    [problem] = store.problems
    assert str(broken) in problem and "damaged" in problem
    assert str(broken) in caplog.text
    store.save(snapshot(config, 2))
    assert_equal(CheckpointStore(tmp_path).newest(config, DATA), snapshot(config, 2))


def test_one_of_another_version_is_not_gone_on_from(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = tiny_config(), CheckpointStore(tmp_path)
    with monkeypatch.context() as before:
        before.setattr("medtune.checkpoint._FORMAT", 1)
        store.save(snapshot(config, 1))
    assert store.newest(config, DATA) is None
    assert "written by another version of medtune (its format is 1)" in store.problems[0]


def test_every_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "last-0001.safetensors"
    write(path, {"weight": torch.arange(4.0)}, {"epoch": 1})
    content = path.read_bytes()
    wanted = read(path)
    for at in range(len(content)):
        path.write_bytes(flip(content, at))
        try:
            found = read(path)
        except CheckpointError:
            continue
        # A space of the header's padding, say, is free to change; nothing that is read may.
        assert torch.equal(found[0]["weight"], wanted[0]["weight"]) and found[1] == wanted[1], at


def test_course_left_behind_is_deleted(tiny_config: Make, tmp_path: Path) -> None:
    """Epoch 4 is damaged; training goes on from 2, and what it left behind must not be taken up again."""
    config, store = tiny_config(), CheckpointStore(tmp_path)
    for epoch, best_epoch in ((2, 2), (4, 3)):
        store.save(snapshot(config, epoch, best_epoch))
    (tmp_path / "last-0004.safetensors").write_bytes(b"?")
    again = CheckpointStore(tmp_path)
    assert_equal(again.newest(config, DATA), snapshot(config, 2))
    other = snapshot(config, 3)
    other.best["weight"].mul_(7)  # the same epoch is best, with other weights
    again.save(other)
    assert names(tmp_path) == [f"{n}.safetensors" for n in ("best-0002", "best-0003", "last-0002", "last-0003")]
    assert_equal(CheckpointStore(tmp_path).newest(config, DATA), other)


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"seed": 1}, {"milestones": (0.25,)}, {"train_limit": 8}])
def test_other_settings_are_refused_by_name(tiny_config: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    config = tiny_config()
    CheckpointStore(tmp_path).save(snapshot(config, 1))
    [name] = change
    was, now = config.to_dict()[name], config.replace(**change).to_dict()[name]
    with pytest.raises(CheckpointError) as error:
        CheckpointStore(tmp_path).newest(config.replace(**change), DATA)
    assert f"{name} was {was!r}, is {now!r}" in str(error.value)


def test_settings_that_do_not_touch_training_may_change(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    CheckpointStore(tmp_path).save(snapshot(config, 1))
    other = config.replace(resamples=3, checkpoint_seconds=9.0, external_limit=10)
    assert CheckpointStore(tmp_path).newest(other, DATA) is not None
    with pytest.raises(CheckpointError, match="training or validation data are other ones"):
        CheckpointStore(tmp_path).newest(config, {**DATA, "val": "x"})


def test_full_disk_is_named_and_leaves_the_checkpoint_before(tiny_config: Make, tmp_path: Path) -> None:
    config, store = tiny_config(), CheckpointStore(tmp_path)
    store.save(snapshot(config, 1))
    before = names(tmp_path)
    big = snapshot(config, 2, best_epoch=1)
    big.model["more"] = torch.zeros(1 << 16)  # type: ignore[index]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            store.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "last-0002.safetensors") in str(error.value)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert names(tmp_path) == before
    assert_equal(CheckpointStore(tmp_path).newest(config, DATA), snapshot(config, 1))


def test_disk_that_refuses_to_flush(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        CheckpointStore(tmp_path).save(snapshot(tiny_config(), 1))
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(snapshot(tiny_config(), 1))


def test_leftovers_of_a_killed_process_go(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "last-0001.safetensors.tmp").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    CheckpointStore(tmp_path).save(snapshot(tiny_config(), 1))
    assert names(tmp_path) == ["best-0001.safetensors", "last-0001.safetensors", "notes.txt"]
    (tmp_path / "last-0002.safetensors.tmp").write_text("half")
    discard(tmp_path, keep_best=False)
    assert names(tmp_path) == ["notes.txt"]


def test_discard_keeps_the_best_weights_or_nothing(tiny_config: Make, tmp_path: Path) -> None:
    config, store = tiny_config(), CheckpointStore(tmp_path)
    for epoch in (1, 2):
        store.save(snapshot(config, epoch))
    store.discard(keep_best=True)
    assert names(tmp_path) == ["best-0002.safetensors"]
    best = best_file(tmp_path)
    assert best is not None
    assert describe(best)["epoch"] == 2 and describe(best)["config"] == config.to_dict()
    assert load_weights(tmp_path)[0].keys() == tensors(2).keys()
    discard(tmp_path, keep_best=False)
    assert names(tmp_path) == [] and best_file(tmp_path) is None


def test_no_best_epoch_yet(tiny_config: Make, tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(snapshot(tiny_config(), 1, best_epoch=0))
    assert names(tmp_path) == ["last-0001.safetensors"]
    assert_equal(CheckpointStore(tmp_path).newest(tiny_config(), DATA), snapshot(tiny_config(), 1, best_epoch=0))


class Payload:
    """Runs code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_code_is_run(tmp_path: Path) -> None:
    torch.save({"model": tensors(1), "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="would load: refused"):
        load_weights(tmp_path / "evil.pth")
    (tmp_path / "last-0001.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "last-0001.safetensors")
    assert not (tmp_path / "ran").exists()


def test_weights_of_any_kind(tiny_config: Make, tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(snapshot(tiny_config(), 2, best_epoch=1))
    weights, about = load_weights(path)
    assert about is not None and about["epoch"] == 2
    assert torch.equal(weights["weight"], tensors(2)["weight"]) and weights.keys() == tensors(2).keys()
    torch.save(tensors(5), tmp_path / "published.pth")
    save_file(tensors(6), tmp_path / "published.safetensors")
    assert load_weights(tmp_path / "published.pth")[1] is None
    assert torch.equal(load_weights(tmp_path / "published.safetensors")[0]["weight"], tensors(6)["weight"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("weights.h5", b"x", "unknown type '.h5'. Known: .safetensors, .pth"),
        ("weights.pth", b"nonsense", "damaged"),
        ("weights.pt", b"", "damaged"),
        ("weights.safetensors", b"nonsense", "damaged"),
        ("weights.pth", None, "does not exist"),
        ("folder", None, "does not exist"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / name)
    assert says in str(error.value) and str(tmp_path / name) in str(error.value)


def test_half_a_published_file(tmp_path: Path) -> None:
    torch.save(tensors(5), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_weights(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no best"):
        load_weights(tmp_path)


def test_files_of_others_are_not_taken_for_ours(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not written by medtune"):
        read(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        read(tmp_path / "y.safetensors")


def test_metadata_is_json_in_the_header(tiny_config: Make, tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(snapshot(tiny_config(), 1))
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["medtune"])["epoch"] == 1


def test_what_was_read_does_not_hang_on_the_file(tiny_config: Make, tmp_path: Path) -> None:
    config, store = tiny_config(), CheckpointStore(tmp_path)
    path = store.save(snapshot(config, 1))
    found = store.newest(config, DATA)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_equal(found, snapshot(config, 1))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_at_any_moment_leaves_a_good_checkpoint(tiny_config: Make, tmp_path: Path) -> None:
    """A child saves without pause and is killed; the newest checkpoint is good, and is the last or last but one begun."""

    def large(config: TrialConfig, epoch: int) -> Snapshot:
        made = snapshot(config, epoch, max(1, epoch - epoch % 3))
        made.model["more"] = torch.full((1 << 20,), float(epoch))  # type: ignore[index]
        return made

    config, store = tiny_config(), CheckpointStore(tmp_path)
    store.save(large(config, 1))
    for kill in range(15):
        reader, writer = os.pipe()
        before = CheckpointStore(tmp_path).newest(config, DATA)
        assert before is not None
        child = os.fork()
        if child == 0:
            for epoch in range(before.epoch + 1, before.epoch + 1000):
                os.write(writer, epoch.to_bytes(4, "big"))
                store.save(large(config, epoch))
            os._exit(0)
        os.close(writer)
        time.sleep(0.01 + 0.004 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun = os.read(reader, 4000)
        os.close(reader)
        kinds = {re.sub(r"-\d+", "", name) for name in names(tmp_path)}
        assert kinds <= {f"{kind}.safetensors{end}" for kind in ("last", "best") for end in ("", ".tmp")}
        store = CheckpointStore(tmp_path)
        after = store.newest(config, DATA)
        assert after is not None and store.problems == []
        last = int.from_bytes(begun[-4:], "big") if begun else before.epoch
        assert last - 1 <= after.epoch <= last
        assert_equal(after, large(config, after.epoch))
