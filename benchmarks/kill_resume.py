"""Kill the driver of a study of short trials at random moments, resume each time, and account for every trial.

The trials are of two families, each with epochs and rungs of its own.

Run:  python -m benchmarks.kill_resume [--kills 20] [--seed 0]

A moment is a random number of bytes that the ledger grew by since the launch (so that asking, launching, reporting and
deciding are all hit), or, one time in four, a random second of the start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.played import curve, two_families
from medtune.config import StudyConfig, TrialConfig
from medtune.errors import StudyError
from medtune.results import Study, load_study, trial_config
from medtune.search.asha import keep
from medtune.search.conductor import trial_folder
from medtune.search.ledger import Row
from medtune.study import run_study


def config(storage: Path | str, trials: int) -> StudyConfig:
    """Short trials with three rungs."""
    trial = TrialConfig(epochs=5, pair="synthetic")
    shared = StudyConfig(preset="laptop", name="kill", wandb="off", trial=trial)
    return replace(shared, storage=str(storage), trials=trials, keep=trials)


@dataclass
class Account:
    """What a campaign of kills did."""

    kills: int = 0
    seconds: float = 0.0
    states: dict[str, int] = field(default_factory=dict)
    epochs_asked: int = 0
    epochs_played: int = 0


def campaign(storage: Path, *, kills: int, trials: int, seed: int) -> Account:
    """Kill and resume, then finish; raises AssertionError when a trial is not accounted for."""
    rng = random.Random(seed)
    account = Account()
    started = time.monotonic()
    journal = storage / "kill" / "ledger.journal"
    for _ in range(kills):
        process = _driver(storage, trials)
        _wait_for_the_moment(process, journal, rng)
        if process.poll() is not None:
            break  # it got to the end before its moment
        process.send_signal(signal.SIGKILL)
        process.wait()
        account.kills += 1
    process = _driver(storage, trials)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    study = load_study("kill", storage)
    check(study, trials)
    account.seconds = time.monotonic() - started
    account.states = dict(Counter(row.state for row in study.rows))
    account.epochs_asked = sum(row.epoch for row in study.rows)
    account.epochs_played = sum(len(_epochs(study, row.number)) for row in study.rows)
    return account


def command(storage: Path | str, trials: int) -> list[str]:
    """What drives one launch of the study."""
    return [sys.executable, "-m", "benchmarks.kill_resume", "--drive", str(storage), "--trials", str(trials)]


def environment(seconds: float) -> dict[str, str]:
    """Epochs of so many seconds, and this project importable."""
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PLAYED_SECONDS": str(seconds), "PLAYED_CHECKPOINTS": "1", "PYTHONPATH": root}


def _driver(storage: Path, trials: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(storage, trials),
        env=environment(0.05),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for_the_moment(process: subprocess.Popen[bytes], journal: Path, rng: random.Random) -> None:
    """Early on in start-up, or after so many bytes of ledger."""
    seconds = rng.uniform(0, 8) if rng.random() < 0.25 else None
    start, size = time.monotonic(), journal.stat().st_size if journal.exists() else 0
    growth = rng.randint(1, 6000)
    while process.poll() is None and time.monotonic() - start < 60:
        grown = (journal.stat().st_size if journal.exists() else 0) - size
        if (seconds is not None and time.monotonic() - start >= seconds) or (seconds is None and grown >= growth):
            return
        time.sleep(0.0005)


def _epochs(study: Study, number: int) -> list[tuple[int, int]]:
    """(attempt, epoch) of every epoch that was played, from the attempts' own records."""
    found = []
    for record in trial_folder(study.folder / "trials", number).glob("attempt-*/epochs.jsonl"):
        for line in record.read_text().splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            found.append((int(values["attempt"]), int(values["epoch"])))
    return sorted(found)


def check(study: Study, trials: int) -> None:
    """Every sentence of the promise, against what lies on disk."""
    rows = study.rows
    assert [row.number for row in rows] == list(range(trials)), f"{len(rows)} trials, asked for {trials}"
    assert {row.state for row in rows} <= {"COMPLETE", "PRUNED"}, Counter(row.state for row in rows)
    for row in rows:
        settings = trial_config(study, row)
        rungs = _rungs(study, row)
        wanted = curve(settings, row.epoch)
        assert row.value is not None and abs(row.value - wanted) < 1e-12, f"trial {row.number}: {row.value}, not {wanted}"
        assert row.epoch == settings.epochs or (row.state == "PRUNED" and row.epoch in rungs), row
        finals = list(trial_folder(study.folder / "trials", row.number).glob("attempt-*/final.json"))
        assert len(finals) == (row.state == "COMPLETE"), f"trial {row.number} finished {len(finals)} times"
        played = _epochs(study, row.number)
        for attempt in {a for a, _ in played}:
            mine = [epoch for a, epoch in played if a == attempt]
            assert mine == list(range(mine[0], mine[0] + len(mine))), f"trial {row.number} attempt {attempt}: {mine}"
            before = [epoch for a, epoch in played if a < attempt]
            # A checkpoint is written before the epoch is noted: what was noted is never played again but for its last.
            assert not before or mine[0] >= max(before), f"trial {row.number} went back from {max(before)} to {mine[0]}"
        for epoch in rungs:
            rung = row.rung(epoch)
            assert (rung is not None) == (row.epoch >= epoch), f"trial {row.number} has no decision at rung {epoch}"
    _check_rungs(study)


def _check_rungs(study: Study) -> None:
    """Each decision is ASHA's for the order in which the trials arrived, kills or no kills."""
    for index in range(len(study.record["rungs"])):
        reached = [record for row in study.rows if (record := row.rung(_rungs(study, row)[index])) is not None]
        reached.sort(key=lambda record: record["order"])
        assert [record["order"] for record in reached] == list(range(len(reached))), f"arrivals at rung {index}"
        for place, record in enumerate(reached):
            others = [other["value"] for other in reached[:place]]
            wanted = keep(record["value"], others, 2, minimise=True)
            assert record["kept"] == wanted, f"arrival {place} at rung {index}: kept is {record['kept']}"
            assert record["index"] == index


def _rungs(study: Study, row: Row) -> tuple[int, ...]:
    """The trial's own."""
    return config(study.folder, 1).rungs(trial_config(study, row).epochs)


def main() -> None:
    """Run the campaign, or drive one launch of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, default=300.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        from benchmarks.played import PlayedTrial

        try:
            study = replace(config(args.drive, args.trials), storage_patience=args.patience)
            run_study(study, two_families("kill"), PlayedTrial)
        except StudyError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        return
    folder = Path(tempfile.mkdtemp())
    account = campaign(folder, kills=args.kills, trials=args.trials, seed=args.seed)
    shutil.rmtree(folder)
    redone = account.epochs_played - account.epochs_asked
    print(
        f"{account.kills} kills in {account.seconds:.0f} s: {args.trials} trials asked, {account.states}; "
        f"{account.epochs_asked} epochs, {redone} of them played twice; every trial accounted for"
    )


if __name__ == "__main__":
    main()
