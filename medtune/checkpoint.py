"""Checkpoints of a trial: atomic, verified when read, loadable without running code.

A store is one folder of safetensors files. `last-0007.safetensors` holds weights (`model.*`) and optimizer state
(`optimizer.*`) after epoch 7; `best-0005.safetensors` holds the weights of the best epoch so far, under the model's own
names. Each carries its metadata (JSON) and a SHA-256 over metadata and tensors in the safetensors header: one file is
one commit. A last file counts only together with the best file it refers to, which is written first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from medtune.config import TrialConfig
from medtune.errors import CheckpointError
from medtune.storage.patience import patiently

KEEP_LAST = 2
NOT_COMPARED = frozenset({"resamples", "checkpoint_seconds", "external_limit", "activation_checkpointing"})
"""Settings that may change between attempts: training does not depend on them."""
_KEY = "medtune"
_DIGEST = "sha256"
_FORMAT = 2
"""1 had numbers for what the optimizer keeps of each parameter, in an order that changed."""
_NAME = re.compile(r"(last|best)-(\d{4,})\.safetensors")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A trial after an epoch: all that its next epoch depends on."""

    epoch: int
    config: TrialConfig
    fingerprint: Mapping[str, str]
    """Digests of the data trained and selected on."""
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best_epoch: int
    """0 when no epoch was best yet; then `best` is empty."""
    best: Mapping[str, Tensor]
    progress: Mapping[str, Any]
    """JSON values: learning rate, history and the like."""


class CheckpointStore:
    """The checkpoints of one attempt, written to `folder`; `earlier` attempts' folders are only read.

    `problems` lists, in words, the checkpoints that were found damaged and passed over.
    """

    def __init__(self, folder: Path, earlier: Sequence[Path] = ()) -> None:
        self.folder = Path(folder)
        self.earlier = tuple(Path(path) for path in earlier)
        self.problems: list[str] = []
        self._best_here = 0  # best epoch whose weights are known to lie in `folder`

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint and delete those it replaces. Raises CheckpointError when the disk refuses."""
        about = {
            "format": _FORMAT,
            "epoch": snapshot.epoch,
            "best_epoch": snapshot.best_epoch,
            "config": snapshot.config.to_dict(),
            "fingerprint": dict(snapshot.fingerprint),
            "progress": dict(snapshot.progress),
        }
        path = self.path_of("last", snapshot.epoch)
        try:
            patiently(f"checkpoints in {self.folder}", self._make_room)
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from error
        if snapshot.best_epoch != self._best_here:
            best = {**about, "kind": "best", "epoch": snapshot.best_epoch}
            write(self.path_of("best", snapshot.best_epoch), snapshot.best, best)
            self._best_here = snapshot.best_epoch
        tensors = {f"model.{name}": tensor for name, tensor in snapshot.model.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in snapshot.optimizer.items()}
        write(path, tensors, {**about, "kind": "last"})
        self._prune(snapshot.epoch)
        return path

    def newest(self, config: TrialConfig, fingerprint: Mapping[str, str]) -> Snapshot | None:
        """The newest good checkpoint of all attempts, or None.

        Damaged ones are passed over, named in `problems` and logged. Raises CheckpointError when the newest good one
        is of another configuration or of other data.
        """
        found = [(epoch, path) for folder in (self.folder, *self.earlier) for epoch, path in _files(folder, "last")]
        for _, path in sorted(found, key=lambda item: -item[0]):
            try:
                snapshot = _read_snapshot(path)
            except CheckpointError as error:
                problem = f"{error}; the checkpoint before it is used"
                self.problems.append(problem)
                _log.warning(problem)
                continue
            _require_same(path, snapshot, config, fingerprint)
            self._best_here = snapshot.best_epoch if path.parent == self.folder else 0
            return snapshot
        return None

    def discard(self, *, keep_best: bool) -> None:
        """Delete this attempt's checkpoints, all or all but the best weights."""
        discard(self.folder, keep_best=keep_best)

    def _make_room(self) -> None:
        # Not its parents: they are gone where the folder that all nodes share is.
        self.folder.mkdir(exist_ok=True)
        _delete_leftovers(self.folder)

    def path_of(self, kind: str, epoch: int) -> Path:
        """Where this attempt's checkpoint after an epoch lies or will lie; `kind`: last or best."""
        return self.folder / f"{kind}-{epoch:04d}.safetensors"

    def _prune(self, epoch: int) -> None:
        """Keep the newest checkpoints up to `epoch` and the best weights they refer to.

        Later ones are of a course of training that was left when it turned out damaged.
        """
        last = [(number, path) for number, path in _files(self.folder, "last") if number <= epoch]
        kept = {path for _, path in last[-KEEP_LAST:]}
        for path in tuple(kept):
            with contextlib.suppress(CheckpointError):
                kept.add(self.path_of("best", describe(path)["best_epoch"]))
        _delete(self.folder, kept)


def discard(folder: Path, *, keep_best: bool) -> None:
    """Delete the checkpoints in a folder, all or all but the best weights."""
    best = best_file(folder) if keep_best else None
    _delete(folder, {best} if best else set())
    _delete_leftovers(folder)


def best_file(folder: Path) -> Path | None:
    """The best weights in a folder: those of the latest best epoch."""
    files = _files(folder, "best")
    return files[-1][1] if files else None


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to `path`, whole or not at all. Raises CheckpointError when the disk refuses."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    metadata = {_KEY: text, _DIGEST: _digest(text, plain)}
    # Not save_file: killed, it leaves files of its own naming behind, which nobody would clear away.
    data = save(plain, metadata)
    try:
        patiently(f"checkpoint {path}", lambda: _write_whole(path, data))
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror or error}") from error


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with _opened(path.parent) as folder:
            os.fsync(folder)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of one of our files, verified. Raises CheckpointError when missing, damaged or not ours."""
    metadata = _metadata(path)
    try:
        with safe_open(path, "pt") as file:
            # Copied, since what comes is mapped from the file, which may be deleted while the tensors live.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
    if _digest(metadata[_KEY], tensors) != metadata.get(_DIGEST):
        raise CheckpointError(f"checkpoint {path} is damaged: its SHA-256 is not the one recorded when it was written")
    return tensors, json.loads(metadata[_KEY])


def is_ours(path: Path) -> bool:
    """Whether a safetensors file was written here. Raises CheckpointError when missing or damaged."""
    return _KEY in _header(path)


def describe(path: Path) -> dict[str, Any]:
    """Metadata of one of our files, unverified: kind, epoch, best_epoch, config, fingerprint, progress."""
    try:
        return json.loads(_metadata(path)[_KEY])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged: {error}"
        raise CheckpointError(f"checkpoint {path} is {what}") from error


def _metadata(path: Path) -> dict[str, str]:
    metadata = _header(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path} was not written by medtune: its header says nothing of a trial")
    return metadata


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    # SHA-256: 0.7 s a GB here with the CPU's own instructions, where blake2b took 1.5.
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _read_snapshot(path: Path) -> Snapshot:
    tensors, about = read(path)
    if about["format"] != _FORMAT:
        version = f"another version of medtune (its format is {about['format']})"
        raise CheckpointError(f"checkpoint {path} was written by {version}")
    best: dict[str, Tensor] = {}
    if about["best_epoch"]:
        best, _ = read(path.with_name(f"best-{about['best_epoch']:04d}.safetensors"))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return Snapshot(
        epoch=about["epoch"],
        config=TrialConfig.from_dict(about["config"]),
        fingerprint=about["fingerprint"],
        model=parts["model"],
        optimizer=parts["optimizer"],
        best_epoch=about["best_epoch"],
        best=best,
        progress=about["progress"],
    )


def _require_same(path: Path, snapshot: Snapshot, config: TrialConfig, fingerprint: Mapping[str, str]) -> None:
    was, now = snapshot.config.to_dict(), config.to_dict()
    changed = [f"{k} was {was[k]!r}, is {now[k]!r}" for k in was if k not in NOT_COMPARED and was[k] != now[k]]
    if dict(snapshot.fingerprint) != dict(fingerprint):
        changed.append("the training or validation data are other ones")
    if changed:
        raise CheckpointError(
            f"checkpoint {path} is of another trial: {'; '.join(changed)}. Continue with its settings, or start anew"
        )


def _delete(folder: Path, kept: set[Path]) -> None:
    for kind in ("last", "best"):
        for _, path in _files(folder, kind):
            if path not in kept:
                # A file that cannot be deleted costs room, not the trial.
                with contextlib.suppress(OSError):
                    path.unlink()


def _delete_leftovers(folder: Path) -> None:
    """What a process that was killed while it wrote left behind."""
    for leftover in Path(folder).glob("*.safetensors.tmp"):
        leftover.unlink(missing_ok=True)


def _files(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(epoch, file) of a kind, by rising epoch."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    matches = [match for match in map(_NAME.fullmatch, names) if match and match[1] == kind]
    return sorted((int(match[2]), Path(folder) / match[0]) for match in matches)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
