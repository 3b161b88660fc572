"""Where a study's driver works, and what it sees to before it decides anything: a folder, or a bucket with a folder here.

A study in a bucket has its ledger there in two ways. Ahead of each launch of an attempt, and before a trial's end is acted
upon, all of the ledger is in the bucket. What else is decided is there within `STALENESS` seconds. And a trial's process has
its own record in the bucket before the driver hears of it, so a new driver learns from there what the ledger had not yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from medtune.audit import FILE as AUDIT
from medtune.claim import claim_of
from medtune.driver import LOG, RECORD, who_drives
from medtune.errors import StorageFault, StudyError
from medtune.needs import FOLDER as NEEDS
from medtune.record import OUTCOME, read_json, write_json
from medtune.search.conductor import trial_folder
from medtune.storage.bucket import Bucket, for_all, is_bucket
from medtune.storage.copies import Seen, fetch, fetch_changed, fetch_records, local_folder
from medtune.storage.lease import RENEW, Lease, Replaced
from medtune.storage.patience import Patience, reason
from medtune.storage.segments import Segments
from medtune.usage import FILE as USAGE

STALENESS = 10.0
"""Seconds by which the ledger in a bucket may lag behind the driver's, while the bucket answers."""
OTHER_DRIVER = 10.0
"""Seconds that a driver waits for the one before it, which may just be ending."""
_PUSH = 4.0
_WANDB = 20.0
_NOTES = 30.0
LEDGER = "ledger.journal"
UPLOADED = "uploaded.json"
URI = "bucket"
"""File in a local folder that says which bucket it stands for."""

WANDB_NOTES = ("wandb/sweep.json", "wandb/over.json", "wandb/workspace.json")
"""What W&B has of the study as a whole: another would be made where it is not known."""

NOTES = (USAGE, RECORD, LOG, AUDIT, *WANDB_NOTES)
"""Files of a driver's that the bucket gets when it ends."""

Say = Callable[[str], object]


def storage_root(storage: str | os.PathLike[str] | None) -> Path | Bucket:
    """--storage, then $MEDTUNE_STORAGE, then a user folder."""
    given = storage or os.environ.get("MEDTUNE_STORAGE")
    if is_bucket(given):
        return Bucket(str(given))
    return Path(given).expanduser().resolve() if given else Path(platformdirs.user_data_dir("medtune")) / "studies"


def study_names(root: Path | Bucket) -> list[str]:
    """Names of the studies there. Raises StudyError when a bucket cannot be read."""
    if not isinstance(root, Bucket):
        return [path.parent.name for path in root.glob("*/study.json")]
    try:
        return [name for name in root.names() if root.find(f"{name}/study.json")]
    except OSError as error:
        raise StudyError(f"cannot read {root.uri}: {reason(error)}") from None


def home_of(storage: str | None, name: str, patience: float) -> Home:
    """Where the driver of a study works. `patience`: seconds for which it waits for storage that fails."""
    root = storage_root(storage)
    return BucketHome(root, name, patience) if isinstance(root, Bucket) else Home(root / name, patience)


class Home:
    """A study in a folder."""

    bucket: Bucket | None = None

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder = folder
        self.name = folder.name
        self.where = str(folder)
        self.patience = Patience(patience)
        self.fault: StorageFault | None = None
        self.on_fault: Callable[[StorageFault], object] = lambda error: None

    @contextlib.contextmanager
    def driven(self, say: Say) -> Iterator[None]:
        """Be its only driver. Raises StudyError when it cannot be written to, or is being driven."""
        self._require_writable()
        self.patience.waits = self.patience.went_on = say
        with self._locked():
            yield

    def _require_writable(self) -> None:
        """Find out before time is spent. Raises StudyError with the system's reason."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_bytes(b"?" * 4096)
            probe.unlink()
        except OSError as error:
            raise StudyError(
                f"cannot write to the study's folder {self.folder}: {error.strerror}. "
                "Choose another with --storage or $MEDTUNE_STORAGE"
            ) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One driver a study; the kernel releases the lock however the driver ends."""
        lock = filelock.FileLock(self.folder / "driver.lock")
        try:
            lock.acquire(timeout=OTHER_DRIVER)
        except filelock.Timeout:
            raise StudyError(
                f"study {self.folder.name!r} is being run by another process (it holds {self.folder / 'driver.lock'}). "
                f"{who_drives(self.folder)}Wait for it, stop it, or start another study with --new or --name."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.release()

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """While the study, whose study.json and ledger are there, is driven."""
        yield

    def before_launch(self, number: int) -> None:
        """Before an attempt at a trial is launched: the ledger that has it, and word of it for older ones, is safe."""

    def before_hearing(self, number: int, attempt: int) -> None:
        """Before what an attempt left is read: it is there to be read, if it ever was."""
        self.patience(f"the study's folder {self.folder}", lambda: require_marker(self.folder))

    def settle(self, number: int, state: str, keeps: Mapping[int, int | None]) -> None:
        """A trial has ended: leave its outcome where its process looks, and delete checkpoints.

        `keeps`: trials whose checkpoints go, with the attempt whose best weights stay, if any.
        """

        def settle() -> None:
            require_marker(self.folder)
            self._settle(number, state, keeps)

        self.patience(f"the outcome of trial {number} in {self.where}", settle)

    def _settle(self, number: int, state: str, keeps: Mapping[int, int | None]) -> None:
        from medtune.checkpoint import discard  # imports torch, which reading a study back does without

        home = trial_folder(self.folder / "trials", number)
        home.mkdir(parents=True, exist_ok=True)
        write_json(home / OUTCOME, {"state": state})
        for ended, attempt in keeps.items():
            for checkpoints in trial_folder(self.folder / "trials", ended).glob("attempt-*/checkpoints"):
                discard(checkpoints, keep_best=checkpoints.parent.name == f"attempt-{attempt}")

    def fetch_wandb(self) -> None:
        """Bring the W&B files of trials here."""

    def serve(self, searcher: Any) -> None:
        """Ray runs, and `searcher` hands out trials: it ends the run when told to, and is told when storage fails."""
        self.patience.give_up = lambda: searcher.stopping
        self.on_fault = searcher.stop_for
        if self.fault:
            searcher.stop_for(self.fault)

    def fail(self, error: StorageFault) -> None:
        """Storage has failed for too long, as some thread of this process found out."""
        self.fault = self.fault or error
        self.on_fault(error)


class BucketHome(Home):
    """A study in a bucket, with a local folder whose ledger the driver writes."""

    def __init__(self, root: Bucket, name: str, patience: float) -> None:
        super().__init__(local_folder(root, "driver") / name, patience)
        self.root = root
        self.bucket: Bucket = root.under(name)
        self.where = self.bucket.uri
        self.lease = Lease(self.bucket, name)
        self.segments = Segments(self.bucket.under("ledger"))
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._pushed = 0.0
        self._noted: dict[str, tuple[int, int] | None] = {}
        self._wandb: Seen = {}
        self._wandb_lock = threading.Lock()

    @property
    def ledger(self) -> Path:
        """The driver's own."""
        return self.folder / LEDGER

    @contextlib.contextmanager
    def driven(self, say: Say) -> Iterator[None]:
        """As in a folder; also brings the study here as the bucket has it."""
        self.bucket.require_usable()
        with super().driven(say):
            self.lease.acquire(say)
            try:
                self._fetch()
                yield
            finally:
                self._return_notes()
                with contextlib.suppress(OSError):
                    self.lease.release()

    def _fetch_notes(self) -> None:
        """What earlier launches counted, and what the storage's studies found out about memory."""
        notes = {key: found for key in NOTES if (found := self.bucket.find(key)) is not None}
        fetch(self.bucket, self.folder, notes)
        fetch(self.root, self.folder.parent, self.root.files(NEEDS))

    def _return_notes(self) -> None:
        """Unless the study is another driver's by now, or the bucket does not answer: no study depends on them."""
        with contextlib.suppress(OSError, StorageFault):
            self.lease.require()
            now = {name: state for name in NOTES if (state := _state(self.folder / name))}
            changed = [name for name, state in now.items() if state != self._noted.get(name)]
            for_all(lambda key: self.bucket.upload(self.folder / key, key), changed)
            self._noted |= now
            needs = [f"{NEEDS}/{path.name}" for path in (self.folder.parent / NEEDS).glob("*.json")]
            for_all(lambda key: self.root.upload(self.folder.parent / key, key), needs)

    def _fetch(self) -> None:
        record = self.bucket.read("study.json")
        here = read_json(self.folder / "study.json")
        if here is not None and (record is None or json.loads(record)["id"] != here["id"]):
            empty(self.folder)  # it stood for a study that is no more
        if record is not None:
            (self.folder / "study.json").write_bytes(record)
        (self.folder / URI).write_text(self.bucket.uri)
        self.newest = self.segments.newest()
        if self.newest is not None:
            self._fetch_ledger(self.newest)
        outcomes = {key: found for key, found in self.bucket.files("trials").items() if key.endswith(f"/{OUTCOME}")}
        fetch(self.bucket, self.folder, outcomes)
        # Commands leave another there at any time: it goes back only if this driver changes it.
        self.bucket.download(AUDIT, self.folder / AUDIT)
        self._noted[AUDIT] = _state(self.folder / AUDIT)
        mark = self.folder / "generation"
        if not (mark.exists() and mark.read_text() == self.newest):  # else this machine's last driver left newer ones here
            self._fetch_notes()

    def _fetch_ledger(self, generation: str) -> None:
        data = self.segments.read(generation)
        mark = self.folder / "generation"
        same = mark.exists() and mark.read_text() == generation and self.ledger.exists()
        if same and self.ledger.read_bytes().startswith(data):
            return  # this machine's last driver died with more than it had brought into the bucket
        part = self.ledger.with_name(f"{LEDGER}.part")
        part.write_bytes(data)
        os.replace(part, self.ledger)

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        self.patience(f"{self.where}/study.json", lambda: self.bucket.upload(self.folder / "study.json", "study.json"))
        self._begin_generation()
        threads = [
            threading.Thread(target=self._keep_up, daemon=True, name="ledger"),
            threading.Thread(target=self._follow_wandb, daemon=True, name="wandb files"),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
            self.patience(f"the ledger in {self.where}", self._push)  # the end is written down as well
        finally:
            self._over.set()
            for thread in threads:
                thread.join()
            with contextlib.suppress(OSError, StorageFault):
                self._push()
            self.return_marks()

    def _begin_generation(self) -> None:
        def begin() -> None:
            with self._lock:
                generation = self.segments.begin(self.ledger, self.newest)
                (self.folder / "generation").write_text(generation)
                self._pushed = time.monotonic()

        self.patience(f"the ledger in {self.where}", begin)

    def serve(self, searcher: Any) -> None:
        """Trials also get what this process was told of the bucket."""
        import ray

        from medtune.storage.desk import desk

        self._desk = desk(here=True)
        ray.get(self._desk.keep.remote(self.bucket.environment))
        super().serve(searcher)

    def _push(self) -> None:
        with self._lock:
            self.lease.require()
            started = time.monotonic()
            self.segments.append(self.ledger)
            self._pushed = started

    def before_launch(self, number: int) -> None:
        word = claim_of(number)

        def push() -> None:
            self._push()
            self.bucket.upload(self.folder / word, word)

        self.patience(f"the ledger in {self.where}", push)

    def _keep_up(self) -> None:
        """In a thread: the ledger is pushed, its pieces merged, the lease renewed."""
        looked, failed, noted = 0.0, 0.0, 0.0
        while not self._over.wait(0.5):
            try:
                if time.monotonic() - self._pushed >= _PUSH:
                    self._push()
                    with self._lock:
                        self.segments.merge(self.ledger)
                if time.monotonic() - looked >= RENEW:
                    with self._lock:
                        self.lease.renew()
                    looked = time.monotonic()
                if time.monotonic() - noted >= _NOTES:
                    noted = time.monotonic()
                    self._return_notes()
                failed = 0.0
            except Replaced as error:
                self.fail(error)
                return
            except OSError as error:
                now = time.monotonic()
                failed = failed or now
                if now - failed > self.patience.seconds:
                    lag = now - self._pushed
                    self.fail(StorageFault(f"the ledger in {self.where} is {lag:.0f} s old: {reason(error)}"))
                    return

    def before_hearing(self, number: int, attempt: int) -> None:
        prefix = f"trials/{number:04d}/attempt-{attempt}"
        self.patience(f"{self.where}/{prefix}", lambda: fetch_records(self.bucket, self.folder, prefix))

    def _settle(self, number: int, state: str, keeps: Mapping[int, int | None]) -> None:
        """The same in the bucket, once the ledger there has the end."""
        super()._settle(number, state, {})
        self._push()
        home = f"trials/{number:04d}"
        self.bucket.upload(self.folder / home / OUTCOME, f"{home}/{OUTCOME}")
        for ended, attempt in keeps.items():
            there = [key for key in self.bucket.files(f"trials/{ended:04d}") if key.endswith(".safetensors")]
            best = max((key for key in there if f"/attempt-{attempt}/checkpoints/best-" in key), default=None)
            self.bucket.delete(key for key in there if key != best)

    def fetch_wandb(self) -> None:
        with self._wandb_lock:
            self._wandb = fetch_changed(self.bucket, self.folder, "wandb", self._wandb)

    def _follow_wandb(self) -> None:
        """In a thread: what trials wrote for W&B comes here, for the uploader."""
        while not self._over.wait(_WANDB):
            with contextlib.suppress(OSError):
                self.fetch_wandb()

    def return_marks(self) -> None:
        """Leave in the bucket which runs W&B has; without them they would be sent again, which changes nothing."""
        with contextlib.suppress(OSError):
            return_marks(self.bucket, self.folder)


@contextlib.contextmanager
def wandb_files_here(bucket: Bucket | None, folder: Path) -> Iterator[None]:
    """A study's W&B files are in `folder`, and what is noted there of uploads is in its bucket afterwards.

    Raises StudyError where the bucket does not answer.
    """
    if bucket is None:
        yield
        return
    try:
        fetch_changed(bucket, folder, "wandb", {})
    except OSError as error:
        raise StudyError(f"cannot read {bucket.uri}/wandb: {reason(error)}") from None
    yield
    try:
        return_marks(bucket, folder)
    except OSError as error:
        raise StudyError(f"cannot write to {bucket.uri}/wandb: {reason(error)}") from None


def return_marks(bucket: Bucket, folder: Path) -> None:
    """Put the marks of uploaded W&B runs beside the runs."""
    marks = [str(path.relative_to(folder)) for path in folder.glob(f"wandb/*/{UPLOADED}")]
    marks += [name for name in WANDB_NOTES if (folder / name).exists()]
    for_all(lambda key: bucket.upload(folder / key, key), marks)


def require_marker(folder: Path) -> None:
    """Raises FileNotFoundError where a study's folder is not what it was: a share that is gone leaves an empty folder."""
    if not (folder / "study.json").exists():
        raise FileNotFoundError(None, f"study.json is gone from {folder}: is the folder that holds it mounted?")


def _state(path: Path) -> tuple[int, int] | None:
    """What tells a file from what it was; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def empty(folder: Path) -> None:
    """Remove all that was brought into a local folder of a study's, but for the lock that a driver may hold."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "driver.lock":
            path.unlink()
