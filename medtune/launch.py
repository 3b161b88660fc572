"""One launch of a study: the Ray it runs on, and one Tune run from the ledger to the ledger."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from medtune.config import StudyConfig
from medtune.data import data_folder, external_folder
from medtune.data.courier import start_courier
from medtune.data.folders import user_folder
from medtune.data.pack import PACKED, pack
from medtune.definition import Definition, read_study
from medtune.errors import LaunchBroke, MedtuneError, StudyError
from medtune.growth import Scouts, addable, head
from medtune.machines import Machines
from medtune.needs import FOLDER, Needs
from medtune.placement import Place
from medtune.placer import Placer
from medtune.record import write_json
from medtune.reservation import Reservation, request
from medtune.search.conductor import Conductor, Launch
from medtune.storage.desk import Listener, keys_hidden
from medtune.storage.home import Home
from medtune.usage import Usage

# Tune's own snapshots, loggers and handlers are not used: the ledger, the local record and ours below are.
TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "5",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the conductor counts slots; Tune's own limit of one stalls warm processes
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",  # else Tune starts a drained node's trial again behind our back
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Ray's settings while Tune runs."""


def launch(
    folder: Path,
    config: StudyConfig,
    conductor: Conductor,
    definition: Definition,
    progress: Any,
    trainable: type | None,
    home: Home,
) -> None:
    """One Tune run, from the ledger to the ledger. Raises LaunchBroke where it ended in an error of Ray's."""
    try:
        with contextlib.ExitStack() as ends:
            searcher = _run(folder, config, conductor, definition, progress, trainable, home, ends)
    except MedtuneError:
        raise
    except Exception as error:
        if home.fault:
            raise home.fault from error
        if home.patience.give_up():  # it was told to stop, and broke on its way out
            raise KeyboardInterrupt from error
        raise LaunchBroke(f"{type(error).__name__}: {error}") from error
    if fault := searcher.fault or home.fault:
        raise fault
    if conductor.hopeless:
        raise StudyError(conductor.hopeless)
    if searcher.stopping:
        raise KeyboardInterrupt


def _run(
    folder: Path,
    config: StudyConfig,
    conductor: Conductor,
    definition: Definition,
    progress: Any,
    trainable: type | None,
    home: Home,
    ends: contextlib.ExitStack,
) -> Any:
    """Start what the run needs, each with its end in `ends`, and let Tune run. Returns the searcher."""
    os.environ.update(TUNE)
    import ray
    from ray import tune

    from medtune.cluster.preflight import preflight
    from medtune.search.scheduler import LedgerScheduler, Ticker
    from medtune.search.searcher import LedgerSearcher
    from medtune.trial import AttemptSpec, MedtuneTrial, to_config
    from medtune.watch import Watch, WatchCallback

    # On a cluster nodes may come that have no data folder, and go without a word.
    pack_key = pack(progress.data) if cluster_address() else None
    if pack_key is not None:
        write_json(folder / PACKED, {"pack": pack_key})
    study_id = read_study(folder)["id"]
    # Not in the storage: what Tune cannot write there would end the run.
    runs = user_folder() / "tune" / study_id
    shutil.rmtree(runs, ignore_errors=True)
    ends.callback(shutil.rmtree, runs, ignore_errors=True)
    start_ray()
    ends.callback(ray.shutdown)
    if pack_key is not None:
        courier = [start_courier(pack_key)]  # serves as long as it is held
        ends.callback(courier.clear)
    roster = preflight(home.bucket.uri if home.bucket else str(folder.parent), progress.say)
    ends.callback(roster.close)
    placer = place_trials(config, conductor, folder.parent / FOLDER, roster.fit_nodes)
    reservation = placer.reservation
    watch = Watch(
        conductor,
        placer,
        Usage(folder, gpus=bool(reservation.gpus)),
        Scouts(reservation) if placer.limit else None,
        progress.say,
    )
    ends.callback(watch.end)
    if not reservation.gpus and config.preset == "full":
        from medtune.estimate import cpu_study

        for line in cpu_study(config, progress.data, conductor.epochs()):
            progress.say(line)
    external = external_folder(config.external_dir)

    def to_spec(launch: Launch) -> dict[str, Any]:
        spec = to_config(
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
                pack=pack_key,
                watched=pack_key is not None,
                memory_cap=placer.cap(launch),
                measure=launch.place is not None and launch.place.measuring,
                storage=home.bucket.uri if home.bucket else None,
                storage_patience=config.storage_patience,
            )
        )
        return spec | {"place": json.dumps(launch.place.to_dict() if launch.place else None)}

    searcher = LedgerSearcher(conductor, to_spec, watch.tick)
    home.serve(searcher)
    tuner = tune.Tuner(
        tune.with_resources(trainable or MedtuneTrial, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=LedgerScheduler(conductor, searcher, placer.gone),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"run-{int(time.time())}",
            storage_path=str(runs),
            verbose=0,
            callbacks=[progress.callback(), WatchCallback(watch, searcher), Ticker(searcher.stop_if_hopeless)],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    with stop_on_signal(searcher, progress), Listener(progress.say), keys_hidden():
        tuner.fit()
    return searcher


def place_trials(
    config: StudyConfig, conductor: Conductor, needs: Path, nodes: Callable[[], Sequence[Mapping[str, Any]]]
) -> Placer:
    """Have the conductor's trials placed on the machines of the cluster that is attached.

    `nodes`: entries of `ray.nodes()` that may take trials now. Raises ConfigError for what they could never hold, nor any
    that the cluster can add.
    """
    import ray

    added = addable()
    reservation = Reservation.of(config, ray.cluster_resources().get("GPU", 0) + sum(m.get("GPU", 0) for m in added))
    what = "GPU" if reservation.gpus else "CPU"
    limit = sum(machine.get(what, 0) for machine in (*added, head(ray.nodes()))) if added else 0.0
    reservation.require_room([*nodes(), *({"Alive": True, "Resources": machine} for machine in added)])
    machines = Machines(nodes, gpus=bool(reservation.gpus))
    machines.settle()
    known = Needs(needs, reservation.processes)
    placer = Placer(
        conductor, reservation, machines, known, share=config.share_gpus, most=config.concurrent, limit=limit
    )
    conductor.placing = placer
    conductor.slots = placer.slots
    return placer


def resources(config: dict[str, Any]) -> Any:
    """Tune's request for a launch: placed as the driver decided."""
    return request(Place(**json.loads(config["place"])))


CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` leaves the address of the cluster this machine is part of."""


def _own(path: Path) -> bool:
    """Another user's cluster on a shared machine is none of ours."""
    return path.exists() and path.stat().st_uid == os.getuid()


def cluster_address() -> str | None:
    """Where the cluster is that this machine is part of, in Ray's words; None where a study starts its own Ray."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if _own(CLUSTER_FILE) else None)


def start_ray() -> None:
    """Attach to the cluster this runs on, else start Ray for this study on the loopback interface alone."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    # What went wrong in a trial is in the ledger and on the screen with its cause, not as Tune's traceback.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    cluster = cluster_address()
    if cluster:
        named = "$RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else str(CLUSTER_FILE)
        try:
            ray.init(address=cluster, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StudyError(
                f"no Ray cluster answers at the address in {named}: {str(error).splitlines()[0]}. If it is gone, "
                f"`ray stop` or removing {named} lets the study run on this machine alone"
            ) from None
        return
    start_local_ray()


def start_local_ray() -> None:
    """Start Ray on this machine alone, on the loopback interface."""
    import ray

    # Ray binds some ports on every interface whatever it is told: from 2.60 on a cluster that it starts here lets in
    # nobody without the user's token (~/.ray/auth_token, made when missing).
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        # The images travel through files, not through Ray's object store.
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextlib.contextmanager
def stop_on_signal(searcher: Any, progress: Any) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: stop cleanly. Second: at once; the ledger holds all that was reported either way."""

    def stop(number: int, frame: FrameType | None) -> None:
        if searcher.stopping:
            raise KeyboardInterrupt
        progress.say("stopping: running trials go on from their last checkpoint next time")
        searcher.stop()

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    # Until Tune has put its own in place, which ends its loop, SIGUSR1 would end the process: no trial runs then, and
    # the searcher hands out none.
    old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda *_: None)
    searcher.running = True
    try:
        yield
    finally:
        searcher.running = False
        for number, handler in old.items():
            signal.signal(number, handler)


