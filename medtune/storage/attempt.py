"""Where an attempt works: in the study's folder, or in a folder of its node whose contents go to the study's bucket.

Before each report to the driver, what the attempt wrote is in the bucket: its record first, then its weights, its final
result last. So whatever the driver has heard of can be gone on from on any node.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medtune.claim import claim_of, require_current, require_word
from medtune.data.folders import user_folder
from medtune.predictions import FILE as PREDICTIONS
from medtune.record import EPOCHS, FINAL, OUTCOME, LocalRecord
from medtune.search.conductor import attempt_folder, trial_folder
from medtune.storage import desk
from medtune.storage.bucket import Bucket, for_all
from medtune.storage.copies import fetch
from medtune.storage.home import require_marker
from medtune.storage.patience import Patience, hold

WANDB_SECONDS = 30.0
"""Between two pushes of a running attempt's W&B files."""
SHARE = 0.1
"""Of an attempt's time, what sending checkpoints may take: after a slow one the next waits, but never for long."""
LONGEST_WAIT = 30.0
_SKIPPED = ("logs", "tmp")
_GRACE = 60.0
"""Seconds in which an attempt takes hold of the folder it made."""
MARK = "medtune.json"


def workplace(spec: Any) -> Workplace:
    """Where the attempt of a `medtune.trial.AttemptSpec` works."""
    return BucketWorkplace(spec) if spec.storage else Workplace(spec)


class Workplace:
    """The study's folder, which all nodes share."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.folder = Path(spec.folder)
        self.notes: list[str] = []
        self.patience = Patience(spec.storage_patience, waits=desk.tell, went_on=self._went_on)

    @property
    def attempt(self) -> Path:
        """The attempt's own folder."""
        return attempt_folder(self.folder / "trials", self.spec.number, self.spec.attempt)

    def begin(self) -> Any:
        """Be ready for the attempt; returns its spec, with the folder to work in. Raises StorageFault."""
        hold(self.patience)
        self.patience(f"the study's folder {self.folder}", self._prepare)
        return self.spec

    def _prepare(self) -> None:
        require_marker(self.folder)
        # Step by step: none of it where the study's folder is gone meanwhile.
        for folder in (self.attempt.parent.parent, self.attempt.parent, self.attempt):
            folder.mkdir(exist_ok=True)

    def require_current(self) -> None:
        """Raises Superseded when the trial goes on elsewhere."""
        require_current(trial_folder(self.folder / "trials", self.spec.number), self.spec.attempt)

    def before_report(self, leaving: bool = False) -> None:
        """What the attempt wrote is safe before the driver hears of it. Raises StorageFault.

        `leaving`: this machine is about to go, so checkpoints are sent however long the last took.
        """
        notes, self.notes = self.notes, []
        for note in notes:
            LocalRecord(self.attempt).event("storage", message=note)

    def before_close(self) -> None:
        """Have the trial's outcome here, if it has one."""

    def end(self) -> None:
        """The attempt is over."""

    def _went_on(self, words: str) -> None:
        self.notes.append(words)
        desk.tell(words)


@dataclass(frozen=True)
class _State:
    """A file as it was pushed."""

    size: int
    changed: int


def sweep(studies: Path) -> None:
    """Remove what attempts whose process was killed left on this node; a living one holds its folder."""
    for folder in studies.glob("*/[0-9]*-[0-9]*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _GRACE:
                continue
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


class BucketWorkplace(Workplace):
    """A folder of this node, for this attempt alone."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.folder = user_folder() / "storage" / spec.study / f"{spec.number:04d}-{spec.attempt}"
        self.bucket = Bucket(spec.storage)
        self._trial = f"trials/{spec.number:04d}"
        self._pushed: dict[str, _State] = {}
        self._memory: dict[str, bytes] = {}
        self._held: int | None = None
        self._next_checkpoint = 0.0
        self._next_wandb = time.monotonic() + WANDB_SECONDS

    def begin(self) -> Any:
        hold(self.patience)
        self.patience(f"the folder {self.folder}", self._settle_in)
        self.bucket = Bucket(self.spec.storage, desk.credentials())
        self.patience(f"trial {self.spec.number} in {self.bucket.uri}", self._fetch)
        return replace(self.spec, folder=str(self.folder))

    def _settle_in(self) -> None:
        sweep(self.folder.parents[1])
        self.attempt.mkdir(parents=True, exist_ok=True)
        if self._held is None:
            self._held = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._held, fcntl.LOCK_SH)  # shared: by all processes of a trial

    def _fetch(self) -> None:
        """Bring the earlier attempts' epochs, and the checkpoints of the newest that has any."""
        (self.folder / "wandb").mkdir(exist_ok=True)
        found = self.bucket.files(self._trial)
        earlier = [f"{self._trial}/attempt-{n}" for n in range(self.spec.attempt - 1, 0, -1)]
        wanted = [f"{attempt}/{EPOCHS}" for attempt in earlier]
        with_checkpoints = (a for a in earlier if any(key.startswith(f"{a}/checkpoints/last-") for key in found))
        newest = next(with_checkpoints, None)
        wanted += [key for key in found if newest and key.startswith(f"{newest}/checkpoints/")]
        fetch(self.bucket, self.folder, {key: found[key] for key in wanted if key in found})
        self._fetch_memory()

    def _fetch_memory(self) -> None:
        """What fits into a device's memory, as the storage's other studies found out."""
        root = Bucket(self.bucket.uri.rpartition("/")[0], self.bucket.environment)
        model = f"micro-batches/{self.spec.config['model']}-"
        found = [key for key in root.files("micro-batches") if key.startswith(model)]
        for_all(lambda key: root.download(key, self.folder.parent / key), found)
        self._memory = {key: (self.folder.parent / key).read_bytes() for key in found}

    def _push_memory(self) -> None:
        root = Bucket(self.bucket.uri.rpartition("/")[0], self.bucket.environment)
        for path in (self.folder.parent / "micro-batches").glob(f"{self.spec.config['model']}-*.json"):
            key = f"micro-batches/{path.name}"
            data = path.read_bytes()
            if self._memory.get(key) != data:
                root.write(key, data)
                self._memory[key] = data

    def require_current(self) -> None:
        with contextlib.suppress(OSError):  # a bucket that does not answer decides nothing
            require_word(self.bucket.read(claim_of(self.spec.number)) or b"", self.spec.attempt)

    def before_report(self, leaving: bool = False) -> None:
        super().before_report()
        due = leaving or time.monotonic() >= self._next_checkpoint or (self.attempt / FINAL).exists()
        self.patience(f"trial {self.spec.number} in {self.bucket.uri}", lambda: self._push(checkpoints=due))

    def _push(self, *, checkpoints: bool) -> None:
        # The record first: of an epoch that was trained and is not recorded nobody would ever hear.
        for path in sorted(self.attempt.glob("*.jsonl")):
            self._push_record(path)
        if checkpoints:
            self._push_checkpoints()
        self._push_memory()
        for name in (PREDICTIONS, FINAL):
            if (self.attempt / name).exists():
                self._push_file(self.attempt / name)
        if time.monotonic() >= self._next_wandb:
            self._push_wandb()

    def _push_checkpoints(self) -> None:
        if not self.attempt.exists():
            return  # nothing is to be learnt from a folder that is gone
        started = time.monotonic()
        here = sorted((self.attempt / "checkpoints").glob("*.safetensors"))  # best-... before last-...
        sent = [path for path in here if self._push_file(path)]
        there = [key for key in self._pushed if key.endswith(".safetensors")]
        gone = [key for key in there if not (self.folder / key).exists()]
        self.bucket.delete(gone)
        for key in gone:
            del self._pushed[key]
        if sent:
            took = time.monotonic() - started
            self._next_checkpoint = started + min(took / SHARE, LONGEST_WAIT)

    def _push_record(self, path: Path) -> None:
        key = self._key(path)
        if key not in self._pushed:
            # Of a trial that several processes train, two on different nodes may write to one record.
            there = self.bucket.read(key) or b""
            here = path.read_bytes()
            if not here.startswith(there):
                path.write_bytes(there + here)
        self._push_file(path)

    def _push_wandb(self) -> None:
        runs = [path for path in (self.folder / "wandb").rglob("*") if path.is_file()]
        shown = [path for path in runs if not set(_SKIPPED) & set(path.relative_to(self.folder).parts)]
        for path in sorted(shown, key=lambda path: path.name == MARK):  # the mark says that the rest is there
            with contextlib.suppress(FileNotFoundError):
                self._push_file(path)
        self._next_wandb = time.monotonic() + WANDB_SECONDS

    def _push_file(self, path: Path) -> bool:
        """Whether it had to be."""
        key, stat = self._key(path), path.stat()
        state = _State(stat.st_size, stat.st_mtime_ns)
        if self._pushed.get(key) == state:
            return False
        self.bucket.upload(path, key)
        self._pushed[key] = state
        return True

    def _key(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def before_close(self) -> None:
        key = f"{self._trial}/{OUTCOME}"
        self._once(lambda: self.bucket.download(key, self.folder / key))

    def end(self) -> None:
        """What is left goes to the bucket, and nothing stays here."""
        if self._held is None:
            return
        # Once a trial has ended, the driver decides which of its checkpoints stay.
        ended = (self.folder / self._trial / OUTCOME).exists() or (self.attempt / FINAL).exists()
        self._once(lambda: self._push(checkpoints=not ended))
        self._once(self._push_wandb)
        with contextlib.suppress(OSError):  # another process of the trial still works there: it is the last that tidies up
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._held)
        self._held = None

    def _once(self, action: Callable[[], object]) -> None:
        """Without waiting: the next trial does, and the attempt's state is in the bucket as of its last report."""
        with contextlib.suppress(OSError):
            action()
