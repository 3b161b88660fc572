"""Reading a study back: its trials, and which configuration to deploy. Looks, never writes."""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from medtune import predictions
from medtune.audit.verdict import sentence, verdict_of
from medtune.choose.record import mention
from medtune.config import TrialConfig
from medtune.definition import read_study
from medtune.driver import last_driver
from medtune.errors import ConfigError, StudyError, unknown
from medtune.predictions import Predictions
from medtune.progress import brief, duration, seconds_of
from medtune.record import earlier_epochs
from medtune.search.conductor import attempt_folder, configured, minimised
from medtune.search.ledger import Ledger, Row
from medtune.storage import reading
from medtune.storage.bucket import Bucket, is_bucket
from medtune.storage.home import storage_root, study_names
from medtune.storage.patience import reason
from medtune.usage import read_usage

if TYPE_CHECKING:
    from medtune.data import PairData

OPTIMISTIC = (
    "Ranked by an external metric: the choice has seen the external labels, so this figure is optimistic "
    "and cannot stand as the test of it."
)


SYNTHETIC = "  SYNTHETIC images: these figures say nothing about any disease"


@dataclass(frozen=True)
class Study:
    """A study as it lies on disk."""

    folder: Path
    record: dict[str, Any]
    rows: list[Row]
    running: bool
    """Whether a driver works on it now."""
    bucket: Bucket | None = None
    """Where it is kept, when `folder` is but a copy of what was asked for."""

    @property
    def where(self) -> str:
        """Where it is kept."""
        return self.bucket.uri if self.bucket else str(self.folder)

    def keep(self, path: Path) -> str:
        """Where a file is that was written, in words; one below `folder` is in the study's bucket then, if it has one.

        Raises StudyError when the bucket does not take it.
        """
        if self.bucket is None or not path.is_relative_to(self.folder):
            return str(path)
        key = path.relative_to(self.folder).as_posix()
        try:
            self.bucket.upload(path, key)
        except OSError as error:
            raise StudyError(f"cannot bring {path} into {self.where}: {reason(error)}") from None
        return f"{self.where}/{key} (here: {path})"

    def state(self, row: Row) -> str:
        """The row's state in the user's words: an unfinished trial that nobody trains is WAITING."""
        return "WAITING" if row.state == "RUNNING" and not self.running else row.state

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def selection(self) -> str:
        return str(self.record["selection"])


def load_study(name: str, storage: str | Path | None = None) -> Study:
    """A study by its name, or by the path of its folder or its URI. Raises StudyError with the nearest name."""
    if is_bucket(name):
        storage, _, name = name.rstrip("/").rpartition("/")
    root = storage_root(storage)
    if (Path(name) / "study.json").exists():
        return _read(Path(name))
    names = study_names(root)
    if name not in names:
        at = root.uri if isinstance(root, Bucket) else root
        if not names:
            raise StudyError(f"no studies in {at}: run a sweep first, or name another place with --storage")
        raise StudyError(unknown("study", name, names) + f" (in {at})")
    return _read(_folder(root, name))


def _folder(root: Path | Bucket, name: str) -> Path:
    """Where a study lies; of one in a bucket, what is asked for first is brought there."""
    return reading.fetch_study(root, name) if isinstance(root, Bucket) else root / name


def _read(folder: Path) -> Study:
    record = read_study(folder)
    journal = folder / "ledger.journal"
    # A study that was stopped before its first trial has an empty ledger or none.
    rows = Ledger.read(journal).rows() if journal.exists() and journal.stat().st_size else []
    bucket = reading.bucket_of(folder)
    return Study(folder, record, rows, reading.driven(bucket) if bucket else driver_alive(folder), bucket)


def driver_alive(folder: Path) -> bool:
    """Whether some process drives the study in this folder."""
    lock = filelock.FileLock(folder / "driver.lock")
    try:
        with lock.acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:
        return False  # a read-only folder: nobody here drives it


def all_studies(storage: str | Path | None = None) -> list[Study]:
    """Oldest first; one that cannot be read is named on stderr and does not hide the others."""
    found = []
    root = storage_root(storage)
    for name in study_names(root):
        try:
            found.append(_read(_folder(root, name)))
        except StudyError as error:
            print(f"warning: {error}", file=sys.stderr)
    return sorted(found, key=lambda study: study.record["created"])


def study_summary(study: Study) -> dict[str, Any]:
    """One line of `medtune studies`."""
    counts: dict[str, int] = {}
    for row in study.rows:
        counts[study.state(row)] = counts.get(study.state(row), 0) + 1
    ranked = rank(study, study.selection)
    best = ranked[0] if ranked else None
    return {
        "name": study.name,
        "created": study.record["created"],
        "script": study.record["script"],
        "preset": study.record["preset"],
        "running": study.running,
        "driver": last_driver(study.folder, study.running),
        "trials": counts,
        "selection": study.selection,
        "best_trial": best.number if best else None,
        "best_value": best.value if best else None,
        "synthetic": study.record["synthetic"],
        "folder": study.where,
        "usage": read_usage(study.folder),
    }


def trial_summary(study: Study, row: Row) -> dict[str, Any]:
    """One trial as `medtune trials --json` gives it."""
    return {
        "number": row.number,
        "state": study.state(row),
        "epochs": row.epoch,
        "epochs_asked": row.epochs(study.record["settings"]["epochs"]),
        "params": row.settings or {},
        "value": row.value,
        "best": row.latest.get("best", {}),
        "external": row.latest.get("external", {}),
        "cause": row.cause,
        "node": row.latest.get("node"),
        "seconds": round(seconds_of(row), 1),
        "external_set": study.record["data"]["external_name"],
        "synthetic": study.record["synthetic"],
        "micro_batch": row.latest.get("micro_batch"),
        "attempts": row.attempt,
        "faults": row.faults,
        "errors": row.errors,
    }


def metric(row: Row, name: str) -> float | None:
    """A figure of a trial: train and val at its best epoch, test and external at its best weights."""
    for source in (row.latest.get("best", {}), row.latest.get("external", {})):
        value = source.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def rank(study: Study, by: str) -> list[Row]:
    """Trials that were trained to the end, best first. Raises ConfigError for a metric that no trial has."""
    complete = [row for row in study.rows if row.state == "COMPLETE"]
    names = {name for row in complete for part in ("best", "external") for name in row.latest.get(part, {})}
    if complete and by not in names:
        known = [n for n in names if "/" in n and n.rsplit("/", 1)[-1] not in ("low", "high", "reason", "name")]
        raise ConfigError(unknown("metric", by, known))
    scored = [(value, row) for row in complete if (value := metric(row, by)) is not None]
    sign = 1 if minimised(by) else -1
    return [row for _, row in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].number))]


def optimistic(by: str) -> bool:
    """Whether ranking by a metric has seen the labels that are to test the choice."""
    return by.split("/")[0] in ("external", "external_matched", "cpn", "cpn_matched", "test")


def candidates(study: Study, by: str) -> list[Row]:
    """As `rank`. Raises StudyError while no trial was trained to the end."""
    ranked = rank(study, by)
    if not ranked:
        raise StudyError(
            f"no trial of study {study.name!r} was trained to the end yet: nothing to choose from. "
            "The script's command goes on with it; `medtune trials` shows where it stands."
        )
    return ranked


def tested_on_own_split(study: Study) -> bool:
    """Whether the study's external test was on the training set's own test split."""
    return bool(study.record["data"]["external"] == study.record["data"]["test"])


def data_of(study: Study, data_dir: Path | None, external_dir: Path | None) -> tuple[PairData, list[str]]:
    """The study's pair as it is here, and the splits whose images are not those of the study.

    Raises DataError where the files are broken, or missing on a machine that never trained for the study.
    """
    from medtune.data import load_pair
    from medtune.data.pack import or_packed

    settings = study.record["settings"]
    load = functools.partial(
        load_pair,
        settings["pair"],
        native_size=settings["native_size"],
        data_dir=data_dir,
        external_dir=external_dir,
        external_fallback=tested_on_own_split(study),
    )
    data = or_packed(load, study.folder)
    return data, [split for split, digest in data.fingerprint.items() if study.record["data"].get(split) != digest]


def trial_config(study: Study, row: Row) -> TrialConfig:
    """The full configuration that a trial was trained with."""
    names = set(TrialConfig().to_dict())
    shared = {k: v for k, v in study.record["settings"].items() if k in names}
    base = TrialConfig.from_dict(shared)
    return configured(base, row.number, row.settings or {})


def epochs(study: Study, row: Row) -> list[dict[str, Any]]:
    """What a trial's attempts recorded so far: one line an epoch, the latest attempt's, in order."""
    if study.bucket:
        reading.fetch_trial(study.folder, study.bucket, row.number)
    return earlier_epochs(attempt_folder(study.folder / "trials", row.number, row.attempt + 1))


def predicted(study: Study, row: Row) -> Predictions | None:
    """A trial's logits by split; None for one that was not trained to the end."""
    if study.bucket:
        reading.fetch_trial(study.folder, study.bucket, row.number)
    return predictions.read(attempt_folder(study.folder / "trials", row.number, row.attempt))


def checkpoint(study: Study, row: Row) -> Path | None:
    """The best weights, if they were kept."""
    from medtune.checkpoint import best_file

    if study.bucket:
        reading.fetch_best(study.folder, study.bucket, row.number, row.attempt)
    return best_file(attempt_folder(study.folder / "trials", row.number, row.attempt) / "checkpoints")


def sheets_folder(study: Study, number: int) -> Path:
    """Where a trial's Grad-CAM sheets lie for the page to show them."""
    return study.folder / "gradcam" / f"trial-{number:04d}"


def sheets(study: Study, number: int) -> list[Path]:
    """The Grad-CAM sheets that were drawn of a trial."""
    folder = sheets_folder(study, number)
    if study.bucket:
        reading.fetch_folder(study.folder, study.bucket, str(folder.relative_to(study.folder)))
    return sorted(folder.glob("*.png"))


def best(study: Study, by: str | None = None, top: int = 1) -> dict[str, Any]:
    """What `medtune best` answers. Raises StudyError while no trial was trained to the end."""
    by = by or study.selection
    ranked = candidates(study, by)
    return {
        "study": study.name,
        "ranked_by": by,
        "of": len(ranked),
        "caution": OPTIMISTIC if optimistic(by) else None,
        "synthetic": study.record["synthetic"],
        "external_set": study.record["data"]["external_name"],
        "leaks": sentence(study),
        "choice": mention(study),
        "trials": [
            {
                **trial_summary(study, row),
                "ranked_value": metric(row, by),
                "config": trial_config(study, row).to_dict(),
                "checkpoint": str(checkpoint(study, row) or "") or None,
            }
            for row in ranked[:top]
        ],
    }


def without_leaked(study: Study, number: int) -> list[dict[str, Any]]:
    """A trial's external figures without leaked images; see `medtune.audit.dropped`. Raises StudyError where none can be."""
    from medtune.audit.dropped import without_leaked

    row = next(row for row in study.rows if row.number == number)
    verdict, found = verdict_of(study), predicted(study, row)
    if verdict is None:
        raise StudyError(f"which images are leaked is not known: run `medtune data audit --study {study.name}` first")
    if found is None:
        raise StudyError(f"trial {number} left no predictions: figures without leaked images cannot be computed")
    cpn = study.record["verified_cpn"]
    return without_leaked(found, verdict, resamples=trial_config(study, row).resamples, cpn=cpn)


def print_outcome(folder: Path) -> bool:
    """What a sweep prints at its end: the best configuration, where everything lies, what to type next.

    Returns whether there is one: a study whose trials all failed has none.
    """
    from medtune.report.keep import last_page  # which imports this module

    study = _read(folder)
    page = last_page(study)
    try:
        answer = best(study)
    except StudyError:
        causes = Counter(row.cause for row in study.rows if row.cause)
        print(f"\nno trial was trained to the end; everything of this study: {study.where}")
        for cause, count in causes.most_common():
            print(f"  {count} failed: {cause}")
        print(page)
        return False
    print()
    print_best(answer)
    print(f"\neverything of this study: {study.where}\n{page}")
    root, _, _ = study.where.rpartition("/")
    default = storage_root(None)
    at = "" if root == (default.uri if isinstance(default, Bucket) else str(default)) else f" --storage {root}"
    # As it can be typed here: an environment that is not activated is not on the path.
    medtune = "medtune" if shutil.which("medtune") else os.path.relpath(Path(sys.executable).with_name("medtune"))
    print(f"next: {medtune} best {study.name}{at} --top 3\n      {medtune} trials {study.name}{at}")
    print(f"      {medtune} {'compare' if study.record.get('planned') else 'choose'} {study.name}{at}")
    return True


def print_best(answer: Mapping[str, Any]) -> None:
    """`medtune best` for people."""
    for place, trial in enumerate(answer["trials"], 1):
        head = "best configuration" if place == 1 else f"number {place}"
        print(f"{head}: trial {trial['number']} of study {answer['study']}")
        config = trial["config"]
        print(f"  {brief({'model': config['model'], **trial['params']})}")
        fixed = fixed_settings(config, trial["params"])
        if fixed:
            print(f"  fixed: {brief(fixed)}")
        batch = f"batch {config['batch_size']}{_at_once(trial)}"
        print(f"  {config['image_size']} px, {batch}, {config['epochs']} epochs, seed {config['seed']}")
        print(f"  ranked by {answer['ranked_by']} = {trial['ranked_value']:.4f} among {answer['of']} trained to the end")
        print(f"  val at its best epoch, {trial['best'].get('epoch')}: {'  '.join(_figures(trial['best'], 'val'))}")
        print_figures(trial["external"] | {"external/name": answer["external_set"], "leaks": answer["leaks"]})
        for part in trial.get("without_leaked", ()):
            print(f"  {part['words']}")
            print_figures(part["figures"])
        print(f"  checkpoint: {trial['checkpoint'] or 'not kept (see --keep)'}")
        print(f"  trained for {duration(trial['seconds'])} on {trial['node']}")
    if answer["choice"]:
        print(f"  chosen with evidence: {answer['choice']} (medtune choose {answer['study']})")
    if answer["caution"]:
        print(f"  CAUTION: {answer['caution']}")
    if answer["synthetic"]:
        print(SYNTHETIC)


# Said in a line of their own, or of no account for what was trained.
_ELSEWHERE = {"model", "image_size", "batch_size", "epochs", "seed", "selection"} | {
    "resamples", "checkpoint_seconds", "external_limit"
}  # fmt: skip


def fixed_settings(config: Mapping[str, Any], searched: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial was trained with beside what was searched: the settings that are not at their defaults."""
    defaults = TrialConfig().to_dict()
    return {k: v for k, v in config.items() if k not in _ELSEWHERE and k not in searched and v != defaults[k]}


def _at_once(trial: Mapping[str, Any]) -> str:
    """Said where it matters: BatchNorm's statistics are those of the images that are computed at once."""
    micro = trial["micro_batch"]
    return f" ({micro} images at once)" if micro and micro < trial["config"]["batch_size"] else ""


GROUPS = {
    "val": "val",
    "val_shift": "val under simulated shifts, their mean",
    "external": "external test, images as they are",
    "external_matched": "external test, brought to training resolution",
    "cpn": "CPN X-ray, as they are",
    "cpn_matched": "CPN X-ray, brought to training resolution",
    "test": "own test split",
}


def print_figures(source: Mapping[str, Any]) -> None:
    """Metrics by the set they were measured on, with 95 % intervals; the external set is named."""
    if "external/name" in source:
        count = f", {source['external/n']} images" if "external/n" in source else ""
        print(f"external set: {source['external/name']}{count}")
    for group, label in GROUPS.items():
        figures = _figures(source, group)
        if figures:
            print(f"  {label}")
        for start in range(0, len(figures), 3):
            print("    " + "   ".join(figures[start : start + 3]))
    if source.get("leaks"):
        print(f"  external set: {source['leaks']}")
    for warning in source.get("warnings", ()):
        print(f"  warning: {warning}")
    if source.get("synthetic"):
        print(SYNTHETIC)


def _figures(source: Mapping[str, Any], group: str) -> list[str]:
    parts = []
    for name in ("loss", "oa", "auc", "sensitivity", "specificity", "f1"):
        key = f"{group}/{name}"
        if key not in source:
            continue
        value = source[key]
        if value is None:
            parts.append(f"{name} undefined ({source.get(f'{key}/reason', 'one class only')})")
            continue
        low, high = source.get(f"{key}/low"), source.get(f"{key}/high")
        parts.append(f"{name} {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""))
    return parts
