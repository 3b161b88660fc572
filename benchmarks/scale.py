"""What the driver takes when trials and GPUs are many: memory, time of a decision, the ledger's size, resume.

Run:  python -m benchmarks.scale simulate [--trials 10000] [--gpus 100] [--epochs 20] [--curves STUDY_FOLDER]
      python -m benchmarks.scale ray [--trials 2000]
      python -m benchmarks.scale record STUDY_FOLDER       (writes the curves that `simulate` plays, curves.json)

`simulate` plays recorded curves on a simulated clock, with the space of sweeps/all_models.py; without --curves those of
curves.json, recorded from a laptop study of that script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import runpy
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.simulated import RECORDED, Recorded, Simulation, reopen_seconds
from medtune.config import StudyConfig, TrialConfig
from medtune.results import load_study
from medtune.search.space import SearchSpace
from medtune.study import run_study

SCRIPT = Path(__file__).parents[1] / "sweeps/all_models.py"


def all_models(base: TrialConfig) -> tuple[SearchSpace, TrialConfig]:
    """The space of sweeps/all_models.py; epochs and batch size are `base`'s, as with presets other than `full`."""
    return runpy.run_path(str(SCRIPT))["SPACE"].without(["epochs", "batch_size"], base)


def simulate(args: argparse.Namespace, folder: Path) -> None:
    """Print a line each thousand trials, and the study's outcome."""
    recorded = Recorded.of(args.curves) if args.curves else Recorded.load()
    space, trial = all_models(TrialConfig(epochs=args.epochs, pair="synthetic"))
    config = StudyConfig(trials=args.trials, storage=str(folder), wandb="off", trial=trial)
    simulation = Simulation(folder, config, space, args.gpus, recorded, args.epoch_seconds)
    for figures in simulation.run(min(1000, args.trials)):
        figures["resume_s"] = reopen_seconds(folder, config, space)
        print(words(figures), flush=True)
    states = Counter(row.state for row in simulation.conductor.rows.values())
    print(f"{args.trials} trials of {args.epochs} epochs on {args.gpus} GPUs: {dict(states)}")
    print(words({**simulation.outcome(), "resume_s": reopen_seconds(folder, config, space)}))
    print(words({f"medtune_{command}_s": answer_seconds(command, folder) for command in ("studies", "trials", "best")}))


def answer_seconds(command: str, folder: Path) -> float:
    """CPU time of `medtune COMMAND` on the study in `folder`, without the interpreter's start."""
    from medtune import cli

    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([command, *([] if command == "studies" else [folder.name]), "--storage", str(folder.parent)])
    assert code == 0
    return time.process_time() - started


def with_ray(args: argparse.Namespace, storage: Path) -> None:
    """Run trivial trials through Ray; print a line each `block` trials."""
    from benchmarks.played import SPACE, PlayedTrial, definition
    from benchmarks.throughput import noted_asks, trivial

    os.environ["PLAYED_SECONDS"], os.environ["PLAYED_CHECKPOINTS"] = "0", "0"
    config = trivial(args.trials, storage)
    with noted_asks() as asked:
        folder = run_study(config, definition(), PlayedTrial)
    block = min(500, args.trials)
    for end in range(block, len(asked) + 1, block):
        part = asked[end - block : end]
        figures = {
            "trials": end,
            "trials_per_second": (block - 1) / (part[-1].at - part[0].at),
            "ask_p50_ms": 1000 * float(np.quantile([ask.seconds for ask in part], 0.5)),
            "ask_p99_ms": 1000 * float(np.quantile([ask.seconds for ask in part], 0.99)),
            "driver_mb": part[-1].driver_mb,
        }
        print(words(figures))
    states = Counter(row.state for row in load_study(str(folder)).rows)
    size = (folder / "ledger.journal").stat().st_size / 2**20
    print(f"{args.trials} trials through Ray: {dict(states)}")
    print(words({"ledger_mb": size, "resume_s": reopen_seconds(folder, config, SPACE)}))


def record(args: argparse.Namespace) -> None:
    """Write a study's curves to the file that `simulate` reads."""
    found = dataclasses.asdict(Recorded.of(args.study))
    curves = ",\n  ".join(json.dumps(curve) for curve in found.pop("curves"))
    parts = [f' "{name}": {json.dumps(value)}' for name, value in found.items()]
    RECORDED.write_text("{\n" + ",\n".join([f' "curves": [\n  {curves}\n ]', *parts]) + "\n}\n")
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes")


def words(figures: dict[str, float]) -> str:
    """`ask_p99_ms 12.3, ...`"""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    simulated = commands.add_parser("simulate")
    simulated.add_argument("--trials", type=int, default=10_000)
    simulated.add_argument("--gpus", type=int, default=100)
    simulated.add_argument("--epochs", type=int, default=20)
    simulated.add_argument("--epoch-seconds", type=float, default=30.0, help="an epoch, in the mean over the curves")
    simulated.add_argument("--curves", type=Path, help="folder of a study whose curves to play")
    ray = commands.add_parser("ray")
    ray.add_argument("--trials", type=int, default=2_000)
    recording = commands.add_parser("record")
    recording.add_argument("study", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.command == "ray":
            with_ray(args, Path(folder))
        else:
            study = Path(folder) / "simulated"
            study.mkdir()
            simulate(args, study)


if __name__ == "__main__":
    main()
