"""Builds, starts and resumes a study. The ledger is the truth; each launch is a new Tune run fed from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
import platformdirs

import medtune
from medtune import models
from medtune.config import StudyConfig
from medtune.data import PairData, data_folder, external_folder, load_pair
from medtune.errors import ConfigError, StudyError
from medtune.record import write_json
from medtune.reservation import Reservation
from medtune.search.conductor import Conductor, Launch, minimised, trial_folder
from medtune.search.ledger import Ledger, Row
from medtune.search.plan import COSTS, Settings
from medtune.search.space import SearchSpace
from medtune.wandb_sync import Uploader

# Not part of what a study is: they may differ from one launch to the next.
_FREE = {"preset", "name", "storage", "new", "trials", "keep", "concurrent", "cpus_per_trial", "gpus_per_trial"} | {
    "processes_per_trial", "machine_faults", "data_dir", "external_dir", "wandb", "wandb_project", "report_first"
}
_FREE_TRIAL = {"resamples", "checkpoint_seconds", "activation_checkpointing"}


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a script brings: its name, its space, the settings to try first."""

    script: str
    space: SearchSpace
    first: Sequence[Settings] = ()
    planned: bool = False
    """Train the settings in `first`, in order and to the end: no searcher, no ASHA. The space is `SearchSpace.of` them."""
    external_fallback: bool = False
    """Test on the training set's own test split where the external set is missing; `make sweep` alone asks for it."""


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

    _check_definition(config, definition)
    name = study_name(config, definition.script)
    folder = storage_folder(config.storage) / name
    data = load_pair(
        config.trial.pair,
        native_size=config.trial.native_size,
        data_dir=config.data_dir,
        external_dir=config.external_dir,
        external_fallback=definition.external_fallback,
    )
    starts = _check_pretrained(config, definition, len(data.classes))
    _require_writable(folder)
    with _only_driver(folder):
        _check_same_study(folder, name, config, definition, data)
        progress = Progress(name, folder, config, data)
        ledger = Ledger.open(folder / "ledger.journal", name, "minimize" if _minimise(config) else "maximize")
        conductor = Conductor(
            ledger,
            config,
            definition.space,
            folder / "trials",
            first=definition.first,
            planned=definition.planned,
            on_finish=lambda row: _settle(folder, conductor, row),
        )
        progress.begin(conductor, [*starts, *conductor.recover()])
        if len([row for row in conductor.rows.values() if row.finished]) < config.trials:
            uploader = Uploader(folder, config.wandb, say=progress.say)
            uploader.start()
            progress.say(f"  {uploader.describe()}")
            patience = 3.0
            try:
                with progress:
                    _tune(folder, config, conductor, definition, progress, trainable)
                patience = 20.0
            finally:
                report = uploader.stop(patience)
            if config.wandb == "auto" and (report.uploaded or report.left):
                progress.say(report.describe())
        progress.end()
    return folder


def _check_definition(config: StudyConfig, definition: Definition) -> None:
    """Raises ConfigError for settings that would make no valid trial, and for what a plan cannot do."""
    for settings in definition.first:
        definition.space.encode(settings)
        config.trial.replace(**settings)
    if not definition.planned:
        definition.space.check(config.trial)
    elif config.trials > len(definition.first):
        raise ConfigError(
            f"trials must be at most the {len(definition.first)} that are planned, got {config.trials}: "
            "lower --trials, or plan more with --seeds"
        )
    elif config.rungs():
        raise ConfigError(f"first_rung must be 1 in a planned study, which stops no trial early, got {config.first_rung}")
    _require_shares(config, definition)


def _check_pretrained(config: StudyConfig, definition: Definition, classes: int) -> list[str]:
    """What there is to say about the weights that trials start from. Raises CheckpointError where they do not fit."""
    notes = []
    for source in definition.space.values("pretrained", config.trial):
        if source is not None:
            found = models.check_pretrained(definition.space.values("model", config.trial), source, classes)
            notes += [f"starts from {source}", *found]
    return notes


def _require_shares(config: StudyConfig, definition: Definition) -> None:
    """Each of a trial's processes needs two images of a batch (BatchNorm)."""
    least = min(definition.space.values("batch_size", config.trial))
    if least < 2 * config.processes():
        raise ConfigError(f"batch_size must be at least 2 for each of a trial's {config.processes()} processes, got {least}")


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


def _check_same_study(folder: Path, name: str, config: StudyConfig, definition: Definition, data: PairData) -> None:
    """Write study.json, or refuse to go on with a study that was begun otherwise, showing the difference."""
    path = folder / "study.json"
    now = describe(config, definition, data)
    if not path.exists():
        record = {"id": f"{name}-{int(time.time()):x}", "name": name, "created": time.time(), **now}
        write_json(path, record | {"version": medtune.__version__})
        return
    record = read_study(folder)
    changes = [
        f"  {kind}.{key}: {record[kind].get(key)!r} -> {now[kind].get(key)!r}"
        for kind in ("settings", "space", "data")
        for key in sorted({*record[kind], *now[kind]})
        if record[kind].get(key) != now[kind].get(key)
    ]
    pairs = enumerate(zip(record["first"], now["first"], strict=False), 1)
    other = next((f"  settings {n}: {was} -> {is_now}" for n, (was, is_now) in pairs if was != is_now), None)
    if other or record.get("planned", False) != now["planned"]:
        changes.append(other or "  a plan and a search are not the same study")
    if changes:
        raise StudyError(
            f"study {name!r} in {folder} was begun with other settings:\n" + "\n".join(changes) + "\n"
            "Its trials would not compare. Start another with --new or --name, or give the settings it was begun with."
        )
    if definition.planned and len(now["first"]) > len(record["first"]):
        write_json(path, record | {"first": now["first"]})  # the plan has grown


def describe(config: StudyConfig, definition: Definition, data: PairData) -> dict[str, Any]:
    """What makes a study this study, in plain JSON values."""
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE | {"trial"}}
    settings |= {k: v for k, v in config.trial.to_dict().items() if k not in _FREE_TRIAL}
    first = [json.loads(json.dumps(dict(item))) for item in definition.first]
    # The longest stands for a study whose trials differ in epochs.
    epochs = max(definition.space.values("epochs", config.trial))
    about = {**data.fingerprint, "external_name": data.external_name, **_pretrained(config, definition)}
    return {"settings": settings, "space": definition.space.describe(), "first": first, "data": about} | {
        "script": definition.script,
        "preset": config.preset,
        "synthetic": data.synthetic,
        "verified_cpn": data.verified_cpn,
        "planned": definition.planned,
        "rungs": list(config.rungs(epochs)),
        "epochs": epochs,
        "selection": config.trial.selection,
    }


def _pretrained(config: StudyConfig, definition: Definition) -> dict[str, str]:
    """Digests of the weights that trials start from: other weights under the same name are another study."""
    found = {}
    for source in definition.space.values("pretrained", config.trial):
        if source is not None and Path(source).is_file():
            with open(source, "rb") as file:
                found[f"pretrained {Path(source).name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_study(folder: Path) -> dict[str, Any]:
    """study.json. Raises StudyError if it is missing or damaged."""
    try:
        return json.loads((folder / "study.json").read_text())
    except FileNotFoundError:
        raise StudyError(f"no study in {folder}: `medtune studies` lists those there are") from None
    except json.JSONDecodeError as error:
        raise StudyError(f"{folder / 'study.json'} is damaged ({error}); restore it or start another study") from None


def _settle(folder: Path, conductor: Conductor, row: Row) -> None:
    """A trial has ended: leave its outcome where its process looks, and keep the checkpoints of the best alone."""
    from medtune.checkpoint import discard  # imports torch, which reading a study back does without

    home = trial_folder(folder / "trials", row.number)
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "outcome.json", {"state": row.state})
    complete = [r for r in conductor.rows.values() if r.state == "COMPLETE" and r.value is not None]
    ranked = sorted(complete, key=lambda r: (r.value if conductor.minimise else -r.value, r.number))  # type: ignore[operator]
    keep = conductor.config.keep
    kept = {r.number for r in ranked[:keep]}
    # Only the trial that ended, and the one it may have pushed out of the best, can change.
    for ended in (row, *ranked[keep : keep + 1]):
        for checkpoints in trial_folder(folder / "trials", ended.number).glob("attempt-*/checkpoints"):
            current = checkpoints.parent.name == f"attempt-{ended.attempt}"
            discard(checkpoints, keep_best=ended.number in kept and current)


def _tune(
    folder: Path,
    config: StudyConfig,
    conductor: Conductor,
    definition: Definition,
    progress: Any,
    trainable: type | None,
) -> None:
    """One Tune run, from the ledger to the ledger."""
    # Tune's own snapshots, loggers and handlers are not used: the ledger, the local record and ours below are.
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
        TUNE_GLOBAL_CHECKPOINT_S="1000000",
        TUNE_FORCE_TRIAL_CLEANUP_S="5",
        TUNE_MAX_PENDING_TRIALS_PG="1000",  # the conductor counts slots; Tune's own limit of one stalls warm processes
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AIR_NEW_OUTPUT="0",
    )
    import ray
    from ray import tune

    from medtune.search.scheduler import LedgerScheduler
    from medtune.search.searcher import LedgerSearcher
    from medtune.trial import AttemptSpec, MedtuneTrial, to_config

    _start_ray()
    reservation = Reservation.of(config, ray.cluster_resources().get("GPU", 0))
    try:
        reservation.require_room(ray.nodes())
    except ConfigError:
        ray.shutdown()
        raise
    conductor.slots = lambda: reservation.slots(ray.nodes(), config.concurrent)
    if not reservation.gpus and config.preset == "full":
        from medtune.estimate import cpu_study

        for line in cpu_study(config, progress.data, conductor.epochs()):
            progress.say(line)
    study_id = read_study(folder)["id"]
    external = external_folder(config.external_dir)

    def to_spec(launch: Launch) -> dict[str, Any]:
        return to_config(
            AttemptSpec(
                number=launch.number,
                attempt=launch.attempt,
                config=launch.config.to_dict(),
                study=study_id,
                folder=str(folder),
                rungs=config.rungs(launch.config.epochs),
                # Resolved here: a trial's process has another working directory and maybe another environment.
                data_dir=str(data_folder(config.data_dir)),
                external_dir=str(external) if external else None,
                external_fallback=definition.external_fallback,
                wandb=config.wandb,
                wandb_project=config.wandb_project,
                threads=config.cpus_per_trial,
                processes=reservation.processes,
                gpu_share=reservation.gpus or 1.0,
                micro_batch=launch.micro_batch,
            )
        )

    searcher = LedgerSearcher(conductor, to_spec)
    runs = folder / "ray"
    shutil.rmtree(runs, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(trainable or MedtuneTrial, reservation.resources()),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=LedgerScheduler(conductor, searcher),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"run-{int(time.time())}",
            storage_path=str(runs),
            verbose=0,
            callbacks=[progress.callback()],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    try:
        with _stop_on_signal(searcher, progress):
            tuner.fit()
    finally:
        ray.shutdown()
        shutil.rmtree(runs, ignore_errors=True)
    if searcher.stopping:
        raise KeyboardInterrupt


CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` leaves the address of the cluster this machine is part of."""


def _own(path: Path) -> bool:
    """Another user's cluster on a shared machine is none of ours."""
    return path.exists() and path.stat().st_uid == os.getuid()


def _start_ray() -> None:
    """Attach to the cluster this runs on, else start Ray for this study on the loopback interface alone."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    # What went wrong in a trial is in the ledger and on the screen with its cause, not as Tune's traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    cluster = os.environ.get("RAY_ADDRESS") or ("auto" if _own(CLUSTER_FILE) else None)
    if cluster:
        named = "$RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else str(CLUSTER_FILE)
        try:
            ray.init(address=cluster, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StudyError(
                f"no Ray cluster answers at the address in {named}: {str(error).splitlines()[0]}. If it is gone, "
                f"`ray stop` or removing {named} lets the study run on this machine alone"
            ) from None
        return
    # Ray binds some ports on every interface whatever it is told: from 2.60 on a cluster that it starts here lets in
    # nobody without the user's token (~/.ray/auth_token, made when missing).
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        # The images travel through files, not through Ray's object store.
        object_store_memory=100 * 2**20,
        **common,
    )


@contextlib.contextmanager
def _stop_on_signal(searcher: Any, progress: Any) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: stop cleanly. Second: at once; the ledger holds all that was reported either way."""

    def stop(number: int, frame: FrameType | None) -> None:
        if searcher.stopping:
            raise KeyboardInterrupt
        searcher.stopping = True
        progress.say("stopping: running trials go on from their last checkpoint next time")
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune's own word for "end this run"

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # Until Tune has put its own in place, which ends its loop, SIGUSR1 would end the process: no trial runs then, and
    # the searcher hands out none.
    old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def with_preset_fixed(
    definition: Definition, config: StudyConfig, given: Sequence[str]
) -> tuple[Definition, StudyConfig]:
    """The study for settings given on the command line: those that would be searched are fixed instead.

    So are those that follow them, and, in presets other than `full`, all that follow others: the preset has its own.
    """
    held = definition.space.following() if config.preset != "full" else []
    constant = config.trial.schedule == "constant" and ("schedule" in given or "schedule" not in definition.space.dimensions)
    void = ("milestones", "gamma") if constant else ()  # of a rate that never drops
    space, trial = definition.space.without([*given, *held, *void], config.trial)
    first: list[Settings] = []
    for settings in definition.first if config.report_first else ():
        named = {name: value for name, value in settings.items() if name in space.dimensions}
        searched = named and space.completed(named, trial)
        fits = all(settings.get(k) == getattr(trial, k) for k in given if k in settings and k not in COSTS)
        if fits and searched and searched not in first:
            first.append(searched)
    return replace(definition, space=space, first=tuple(first)), replace(config, trial=trial)
