"""Builds, starts and resumes a study. The ledger is the truth; each launch is a new Tune run fed from it."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

from medtune.audit.verdict import at_start as audit_at_start
from medtune.config import StudyConfig
from medtune.data import PairData, load_pair
from medtune.data.pack import or_packed
from medtune.definition import Definition, check_definition, check_pretrained, check_same_study
from medtune.driver import DriverRecord, Outcome, best_trial
from medtune.errors import ConfigError, LaunchBroke, StorageFault, StudyError, unknown
from medtune.launch import cluster_address, launch
from medtune.progress import Progress
from medtune.report.keep import kept_up
from medtune.search.conductor import Conductor, minimised
from medtune.search.ledger import Ledger, Row
from medtune.storage.bucket import Bucket
from medtune.storage.home import LEDGER, Home, home_of, storage_root, study_names
from medtune.storage.lease import Replaced
from medtune.storage.patience import held
from medtune.usage import read_usage
from medtune.wandb_sweep import note_over
from medtune.wandb_sync import Uploader


def study_name(config: StudyConfig, script: str) -> str:
    """The name given, else the script's and the preset's; with --new the first of its kind that is free."""
    name = config.name or f"{script}-{config.preset}"
    if not config.new:
        return name
    taken = study_names(storage_root(config.storage))
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def run_study(
    config: StudyConfig, definition: Definition, trainable: type | None = None, outcome: Outcome = best_trial
) -> Path:
    """Start the study or go on with it, until it has as many trials as asked. Returns the study's folder.

    `trainable`: what trains instead of `MedtuneTrial`; benchmarks and tests play trials with it. `outcome`: what the
    driver's record says of a study that came to its end.

    Raises ConfigError, DataError or StudyError before anything is started; KeyboardInterrupt after a clean stop.
    """
    check_definition(config, definition)
    name = study_name(config, definition.script)
    home = home_of(config.storage, name, config.storage_patience)
    if config.resume:
        require_begun(home, storage_root(config.storage))
    data = _load_data(config, definition, home.folder)
    starts = check_pretrained(config, definition, len(data.classes))
    progress = Progress(name, home.where, config, data)
    on_cluster = cluster_address() is not None
    with (
        _stopped_by_storage(name),
        _no_trace_if_refused(home),
        home.driven(progress.say),
        held(home.patience),
        DriverRecord(home.folder, on_cluster=on_cluster, outcome=outcome) as driver,
    ):
        progress.log = driver.log
        check_same_study(home.folder, name, config, definition, data)
        audit_at_start(home.folder, data, config.trial.external_limit, progress.say)
        ledger = Ledger.open(home.folder / LEDGER, name, "minimize" if _minimise(config) else "maximize")
        with home.begun():
            notes = starts
            while True:
                conductor = _conductor(home, ledger, config, definition)
                progress.begin(conductor, [*notes, *conductor.recover()])
                if len(_finished(conductor)) >= config.trials:
                    break
                before = _advance(conductor)
                try:
                    _run(home, config, conductor, definition, progress, trainable)
                    break
                except LaunchBroke as broken:
                    # When machines go, Ray Tune's loop may end in an error. The ledger has all that was heard, so it begins
                    # anew, as after a killed driver; unless nothing was won since, as the same would come again.
                    if _advance(conductor) == before:
                        raise
                    notes = [f"Ray Tune ended with {broken}; the study goes on from its ledger"]
                    progress.note_error(broken)
        progress.end(read_usage(home.folder))
    return home.folder


def _conductor(home: Home, ledger: Ledger, config: StudyConfig, definition: Definition) -> Conductor:
    conductor = Conductor(
        ledger,
        config,
        definition.space,
        home.folder / "trials",
        first=definition.first,
        planned=definition.planned,
        on_finish=lambda row: settle(home, conductor, row),
        before_launch=home.before_launch,
        before_hearing=home.before_hearing,
    )
    return conductor


def _advance(conductor: Conductor) -> tuple[int, int]:
    """How far a study is: trials ended, epochs of all."""
    return len(_finished(conductor)), sum(row.epoch for row in conductor.rows.values())


def require_begun(home: Home, root: Path | Bucket) -> None:
    """Raises StudyError with the nearest name where there is no study to go on with."""
    names = study_names(root)
    if home.name not in names:
        if not names:
            raise StudyError(f"no studies in {root}: nothing to resume. Leave --resume out, or see --storage")
        raise StudyError(unknown("study", home.name, names) + f" (in {root}; named with --name)")


def _load_data(config: StudyConfig, definition: Definition, folder: Path) -> PairData:
    """The pair. A node that trained for this study has its images, and can go on with it without the files."""
    load = functools.partial(
        load_pair,
        config.trial.pair,
        native_size=config.trial.native_size,
        data_dir=config.data_dir,
        external_dir=config.external_dir,
        external_fallback=definition.external_fallback,
    )
    return or_packed(load, folder)


def _run(
    home: Home,
    config: StudyConfig,
    conductor: Conductor,
    definition: Definition,
    progress: Progress,
    trainable: type | None,
) -> None:
    """Launch what is left, with the uploader beside it."""
    uploader = Uploader(home.folder, config.wandb, say=progress.say, where=home.where, project=config.wandb_project)
    note_over(home.folder, False)
    uploader.start()
    progress.say(f"  {uploader.describe()}")
    patience = 3.0
    try:
        with kept_up(home), progress:
            launch(home.folder, config, conductor, definition, progress, trainable, home)
        patience = 20.0
        note_over(home.folder, config.wandb != "off" and len(_finished(conductor)) >= config.trials)
    finally:
        with contextlib.suppress(OSError):
            home.fetch_wandb()
        report = uploader.stop(patience)
    if config.wandb == "auto" and (report.uploaded or report.left):
        progress.say(report.describe())


def _finished(conductor: Conductor) -> list[Row]:
    return [row for row in conductor.rows.values() if row.finished]


@contextlib.contextmanager
def _stopped_by_storage(name: str) -> Iterator[None]:
    """Storage that failed for too long ends the study with a clear word."""
    try:
        yield
    except Replaced:
        raise
    except StorageFault as error:
        raise StudyError(
            f"study {name!r} was stopped, as its storage fails: {error}. What was reported is kept: once storage works, "
            "the same command goes on with it"
        ) from None


@contextlib.contextmanager
def _no_trace_if_refused(home: Home) -> Iterator[None]:
    """A study that was refused before its first trial leaves no folder behind that the next one would have to go on with."""
    new = not home.folder.exists()
    try:
        yield
    except ConfigError:
        if new and not (home.folder / "trials").exists():
            shutil.rmtree(home.folder, ignore_errors=True)
        raise


def _minimise(config: StudyConfig) -> bool:
    return minimised(config.trial.selection)


def settle(home: Home, conductor: Conductor, row: Row) -> None:
    """A trial has ended: leave its outcome where its process looks, and keep the checkpoints of the best alone."""
    keep = conductor.config.keep
    best = [conductor.rows[number] for _, number in conductor.ranking[: keep + 1]]
    kept = {r.number for r in best[:keep]}
    # Only the trial that ended, and the one it may have pushed out of the best, can change.
    home.settle(row.number, row.state, {r.number: r.attempt if r.number in kept else None for r in (row, *best[keep:])})
