"""What the driver takes when trials and GPUs are many: memory, time of a decision, the ledger's size, resume.

Run:  python -m benchmarks.scale simulate [--trials 10000] [--gpus 100] [--epochs 20] [--curves STUDY_FOLDER]
      python -m benchmarks.scale ray [--trials 2000]
      python -m benchmarks.scale record STUDY_FOLDER       (writes the curves that `simulate` plays, curves.json)

`simulate` plays recorded curves on a simulated clock, with the space of sweeps/all_models.py; without --curves those of
curves.json, recorded from a laptop study of that script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.simulated import RECORDED, Recorded, Simulation, reopen_seconds
from medtune.config import StudyConfig, TrialConfig

SCRIPT = Path(__file__).parents[1] / "sweeps/all_models.py"


def simulate(args: argparse.Namespace, folder: Path) -> None:
    """Print a line each thousand trials, and the study's outcome."""
    recorded = Recorded.of(args.curves) if args.curves else Recorded.load()
    # As the presets other than `full` do: epochs and batch size are the same for all.
    base = TrialConfig(epochs=args.epochs, pair="synthetic")
    space, trial = runpy.run_path(str(SCRIPT))["SPACE"].without(["epochs", "batch_size"], base)
    config = StudyConfig(trials=args.trials, storage=folder, wandb="off", trial=trial)
    simulation = Simulation(folder, config, space, args.gpus, recorded, args.epoch_seconds)
    for figures in simulation.run(min(1000, args.trials)):
        figures["resume_s"] = reopen_seconds(folder, config, space)
        print(words(figures), flush=True)
    states = Counter(row.state for row in simulation.conductor.rows.values())
    print(f"{args.trials} trials of {args.epochs} epochs on {args.gpus} GPUs: {dict(states)}")
    print(words({**simulation.outcome(), "resume_s": reopen_seconds(folder, config, space)}))


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
    recording = commands.add_parser("record")
    recording.add_argument("study", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        simulate(args, Path(folder))


if __name__ == "__main__":
    main()
