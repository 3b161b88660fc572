"""What sharing a GPU gives: the same trials with a card each and with --share-gpus. Needs one NVIDIA GPU.

Run:  python -m benchmarks.share_gpus [--trials 12] [--model medmamba_t] [--image-size 224] [--batch-size 32] ...

Both studies train the same settings on generated images, from scratch and without stopping any. Prints trials an hour,
training images a second of all together, and the card's memory as its driver counts it, looked at four times a second: the
most that all processes had, beside the card's size. The second study measures for itself, which is part of its time;
what it found is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from medtune.config import StudyConfig, TrialConfig
from medtune.definition import Definition
from medtune.machines import look
from medtune.needs import FOLDER
from medtune.record import read_epochs, read_events
from medtune.results import Study, load_study
from medtune.search.plan import plan
from medtune.search.space import SearchSpace
from medtune.study import run_study
from medtune.usage import lines, read_usage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained."""

    trials: int = 12
    model: str = "medmamba_t"
    image_size: int = 224
    batch_size: int = 32
    epochs: int = 3
    train_limit: int = 512
    folder: Path | None = None
    """Where the studies stay; none: nowhere."""


class Memory:
    """The most memory of the first GPU in use while it runs, in bytes."""

    def __init__(self) -> None:
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._stop.wait(0.25):
            said = subprocess.run(command, capture_output=True, text=True)
            if said.returncode == 0:
                self.most = max(self.most, int(said.stdout) * 2**20)


def study(settings: Settings, folder: Path, share: bool) -> tuple[Study, float, int]:
    """Run it; the study, its seconds, the most memory."""
    trial = TrialConfig(
        pair="synthetic",
        model=settings.model,
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        train_limit=settings.train_limit,
        resamples=0,
    )
    first = plan([{"model": settings.model}], trial, seeds=settings.trials)
    config = StudyConfig(
        preset="laptop",
        name=folder.name,
        storage=str(folder),
        trials=len(first),
        first_rung=1.0,
        share_gpus=share,
        wandb="off",
        trial=trial,
    )
    definition = Definition(script="share", space=SearchSpace.of(first), first=first, planned=True)
    started = time.perf_counter()
    with Memory() as memory:
        run_study(config, definition)
    return load_study(config.name or "", folder), time.perf_counter() - started, memory.most


def report(found: Study, seconds: float, most: int, card: float) -> None:
    """One study's figures."""
    complete = [row for row in found.rows if row.state == "COMPLETE"]
    attempts = [path for path in sorted(found.folder.glob("trials/*/attempt-*"))]
    images = found.record["settings"]["train_limit"] * sum(len(read_epochs(path)) for path in attempts)
    full = sum(event["kind"] == "out_of_memory" for path in attempts for event in read_events(path))
    micro = {row.latest.get("micro_batch") for row in complete}
    hourly = 3600 * len(complete) / seconds
    print(f"{found.name}: {len(complete)} of {len(found.rows)} trials in {seconds:.0f} s, {hourly:.0f} an hour")
    print(f"  {images / seconds:.0f} training images a second, all together, starting and testing included")
    print(f"  most memory in use {most / 2**30:.1f} of {card / 2**30:.1f} GiB")
    print(f"  out of memory {full} times; {micro} images at once")
    for line in lines(read_usage(found.folder)):
        print(f"  {line}")


def main(settings: Settings) -> int:
    """Both studies; the status is 1 where more memory was in use than the card has, or a trial failed."""
    gpu = look()
    if gpu is None:
        print("no NVIDIA GPU here (nvidia-smi does not tell of one): this benchmark needs one", file=sys.stderr)
        return 2
    print(f"{settings.trials} trials of {settings.model}, {settings.image_size} px, batch {settings.batch_size}: {gpu[0]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        outcomes = [study(settings, folder / name, share) for name, share in (("alone", False), ("shared", True))]
        for found, seconds, most in outcomes:
            report(found, seconds, most, gpu[1])
        for path in sorted((folder / "shared" / FOLDER).glob("*.json")):
            for kind, need in json.loads(path.read_text())["kinds"].items():
                whole, own = need["need"] / 2**30, need["overhead"] / 2**30
                print(f"measured need on {kind}: {whole:.2f} GiB, {own:.2f} of it the process's own")
    failed = any(row.state != "COMPLETE" for found, *_ in outcomes for row in found.rows)
    return int(failed or any(most > gpu[1] for *_, most in outcomes))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
