"""Builds, starts and resumes a study. The ledger is the truth; each launch is a new Tune run fed from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from medtune.config import StudyConfig
from medtune.data import load_pair
from medtune.definition import Definition, check_definition, check_pretrained, check_same_study
from medtune.errors import StudyError
from medtune.launch import launch
from medtune.record import write_json
from medtune.search.conductor import Conductor, minimised, trial_folder
from medtune.search.ledger import Ledger, Row
from medtune.wandb_sync import Uploader


def storage_folder(storage: Path | None) -> Path:
    """--storage, then $MEDTUNE_STORAGE, then a user folder."""
    if storage is not None:
        return storage.expanduser().resolve()
    given = os.environ.get("MEDTUNE_STORAGE")
    return Path(given).expanduser().resolve() if given else Path(platformdirs.user_data_dir("medtune")) / "studies"


def study_name(config: StudyConfig, script: str) -> str:
    """The name given, else the script's and the preset's; with --new the first of its kind that is free."""
    name = config.name or f"{script}-{config.preset}"
    if not config.new:
        return name
    taken = {path.name for path in storage_folder(config.storage).glob("*")}
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def run_study(config: StudyConfig, definition: Definition, trainable: type | None = None) -> Path:
    """Start the study or go on with it, until it has as many trials as asked. Returns the study's folder.

    `trainable`: what trains instead of `MedtuneTrial`; benchmarks and tests play trials with it.

    Raises ConfigError, DataError or StudyError before anything is started; KeyboardInterrupt after a clean stop.
    """
    from medtune.progress import Progress

    check_definition(config, definition)
    name = study_name(config, definition.script)
    folder = storage_folder(config.storage) / name
    data = load_pair(
        config.trial.pair,
        native_size=config.trial.native_size,
        data_dir=config.data_dir,
        external_dir=config.external_dir,
        external_fallback=definition.external_fallback,
    )
    starts = check_pretrained(config, definition, len(data.classes))
    _require_writable(folder)
    with _only_driver(folder):
        check_same_study(folder, name, config, definition, data)
        progress = Progress(name, folder, config, data)
        ledger = Ledger.open(folder / "ledger.journal", name, "minimize" if _minimise(config) else "maximize")
        conductor = Conductor(
            ledger,
            config,
            definition.space,
            folder / "trials",
            first=definition.first,
            planned=definition.planned,
            on_finish=lambda row: settle(folder, conductor, row),
        )
        progress.begin(conductor, [*starts, *conductor.recover()])
        if len([row for row in conductor.rows.values() if row.finished]) < config.trials:
            uploader = Uploader(folder, config.wandb, say=progress.say)
            uploader.start()
            progress.say(f"  {uploader.describe()}")
            patience = 3.0
            try:
                with progress:
                    launch(folder, config, conductor, definition, progress, trainable)
                patience = 20.0
            finally:
                report = uploader.stop(patience)
            if config.wandb == "auto" and (report.uploaded or report.left):
                progress.say(report.describe())
        progress.end()
    return folder


def _require_writable(folder: Path) -> None:
    """Find out before time is spent. Raises StudyError with the system's reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"?" * 4096)
        probe.unlink()
    except OSError as error:
        raise StudyError(
            f"cannot write to the study's folder {folder}: {error.strerror}. "
            "Choose another with --storage or $MEDTUNE_STORAGE"
        ) from None


def _minimise(config: StudyConfig) -> bool:
    return minimised(config.trial.selection)


@contextlib.contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """One driver a study; the kernel releases the lock however the driver ends."""
    lock = filelock.FileLock(folder / "driver.lock")
    try:
        lock.acquire(timeout=10)
    except filelock.Timeout:
        raise StudyError(
            f"study {folder.name!r} is being run by another process (it holds {folder / 'driver.lock'}). "
            "Wait for it, stop it, or start another study with --new or --name."
        ) from None
    try:
        yield
    finally:
        lock.release()


def settle(folder: Path, conductor: Conductor, row: Row) -> None:
    """A trial has ended: leave its outcome where its process looks, and keep the checkpoints of the best alone."""
    from medtune.checkpoint import discard  # imports torch, which reading a study back does without

    home = trial_folder(folder / "trials", row.number)
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "outcome.json", {"state": row.state})
    keep = conductor.config.keep
    best = [conductor.rows[number] for _, number in conductor.ranking[: keep + 1]]
    kept = {r.number for r in best[:keep]}
    # Only the trial that ended, and the one it may have pushed out of the best, can change.
    for ended in (row, *best[keep:]):
        for checkpoints in trial_folder(folder / "trials", ended.number).glob("attempt-*/checkpoints"):
            current = checkpoints.parent.name == f"attempt-{ended.attempt}"
            discard(checkpoints, keep_best=ended.number in kept and current)
