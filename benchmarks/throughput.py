"""How many trials a second the driver sustains: trivial trials with ledger and local record, beside stock Ray Tune.

Run:  python -m benchmarks.throughput [--trials 1000] [--stock 100]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.played import PlayedTrial, definition
from benchmarks.simulated import memory_mb
from medtune.config import StudyConfig, TrialConfig
from medtune.results import load_study
from medtune.search.ledger import Ledger
from medtune.study import run_study


@dataclass(frozen=True)
class Ask:
    """One proposal of the searcher's."""

    seconds: float
    at: float
    """When it was made, on the performance counter."""
    driver_mb: float
    """The driver's memory then."""


@contextlib.contextmanager
def noted_asks() -> Iterator[list[Ask]]:
    """Note every proposal that is made inside."""
    asked: list[Ask] = []
    ask = Ledger.ask

    def timed(self: Ledger, *args: object) -> int:
        start = time.perf_counter()
        number = ask(self, *args)  # type: ignore[arg-type]
        end = time.perf_counter()
        asked.append(Ask(end - start, end, memory_mb()))
        return number

    Ledger.ask = timed  # type: ignore[assignment,method-assign]
    try:
        yield asked
    finally:
        Ledger.ask = ask  # type: ignore[method-assign]


def trivial(trials: int, folder: Path) -> StudyConfig:
    """A study of one-epoch trials."""
    trial = TrialConfig(epochs=1, milestones=(), pair="synthetic")
    return StudyConfig(preset="laptop", trials=trials, storage=str(folder), wandb="off", trial=trial)


def ours(trials: int, folder: Path) -> dict[str, float]:
    """One study of trivial trials, two at a time."""
    with noted_asks() as asked:
        started = time.perf_counter()
        study = load_study(str(run_study(trivial(trials, folder), definition(), PlayedTrial)))
        seconds = time.perf_counter() - started
    assert len(study.rows) == trials and all(row.state == "COMPLETE" for row in study.rows)
    times = [ask.seconds for ask in asked]
    return {
        "seconds": seconds,
        "trials_per_second": trials / seconds,
        "ask_mean_ms": 1000 * float(np.mean(times)),
        "ask_p99_ms": 1000 * float(np.quantile(times, 0.99)),
        "driver_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ledger_mb": (study.folder / "ledger.journal").stat().st_size / 2**20,
    }


def stock(trials: int, folder: Path, reuse: bool) -> float:
    """Trials a second of plain Ray Tune with OptunaSearch (in memory) and ASHA, as its documentation shows them."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def trial(config: dict[str, float]) -> None:
        tune.report({"loss": config["lr"]})

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    started = time.perf_counter()
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-2), "gamma": tune.loguniform(1e-3, 0.5)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=trials,
            search_alg=OptunaSearch(),
            scheduler=ASHAScheduler(),
            max_concurrent_trials=2,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "stock"), verbose=0),
    ).fit()
    seconds = time.perf_counter() - started
    ray.shutdown()
    return trials / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--stock", type=int, default=100, help="trials for stock Ray, with and without reuse; 0: skip")
    args = parser.parse_args()
    os.environ["PLAYED_SECONDS"], os.environ["PLAYED_CHECKPOINTS"] = "0", "0"
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        if args.stock:  # first: ours sets variables that would change what Tune does
            for reuse in (True, False):
                rate = stock(args.stock if reuse else max(10, args.stock // 4), Path(folder), reuse)
                lines.append(f"stock Ray Tune, OptunaSearch and ASHA, reuse_actors={reuse}: {rate:.2f} trials a second")
        figures = ours(args.trials, Path(folder))
        lines.append(f"medtune, {args.trials} trials: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
