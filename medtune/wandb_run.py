"""A trial's W&B run, written to files beside the study by the process that trains it. Nothing here uses the network.

Row `_step = e` of a run's history is epoch e, whichever attempt wrote it, and an attempt's file begins with the epochs
of the attempts before it, from the local record. So the newest attempt's file is the whole run: uploading it, again and
again if need be, gives one run with every epoch once. W&B's own way of joining the files of a resumed run is not used:
it appends, so what is sent twice is there twice, and what a killed process had not yet written is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from medtune import record as local
from medtune.wandb_env import clean_environment

MARK = "medtune.json"
"""Beside a run's file: whose it is, and, once it is whole, how it ended."""

LONGEST_SECONDS = 60.0
"""The longest that a trial waits for any one call of wandb's; after the first they take hundredths of a second."""

_log = logging.getLogger(__name__)
_hangs = threading.Event()
"""Set once a call of wandb's did not come back: this process does not wait for it again."""


def run_id(study_id: str, number: int) -> str:
    """One W&B run a trial, however many attempts it takes: study id and trial number.

    A study id that W&B would not take, by its length or its letters, is cut and told apart by a digest.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", study_id)
    if plain != study_id or len(plain) > 56:
        plain = f"{plain[:46]}-{hashlib.sha256(study_id.encode()).hexdigest()[:8]}"
    return f"{plain}-{number:04d}"


class WandbRun:
    """One attempt's run. Whatever W&B throws is written to the local record and turns W&B off for this attempt."""

    def __init__(
        self,
        study_id: str,
        number: int,
        attempt: int,
        config: Mapping[str, Any],
        folder: Path,
        project: str = "medtune",
        tags: Sequence[str] = (),
        mode: Literal["offline", "off"] = "offline",
        record: local.LocalRecord | None = None,
        group: str | None = None,
    ) -> None:
        """`folder`: the study's `wandb` folder. `record`: this attempt's, whose siblings hold the earlier epochs."""
        self.number = number
        self.attempt = attempt
        self.record = record
        self.mark = {"run": run_id(study_id, number), "number": number, "attempt": attempt, "project": project}
        self.selection = config.get("selection")
        self.directory: Path | None = None
        self._run: Any = None
        self._pending: dict[str, Any] = {}
        self._curves: dict[str, Mapping[str, Any]] = {}
        self._pictures: dict[str, Any] = {}
        self._tested_epoch: Any = None
        self._last_epoch = 0
        self._earlier = local.earlier_epochs(record.folder) if record else []
        if mode != "off":
            self._guard(self._start, study_id, dict(config), folder, project, list(tags), group)

    @property
    def active(self) -> bool:
        """Whether W&B is being written to."""
        return self._run is not None

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Log an epoch: a flat dict with "epoch", or its line of the local record."""
        self._guard(self._log_epoch, values)

    def external(self, metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
        """Log an external test with the epoch that is logged next.

        metrics: flat, its "epoch" the tested weights'. curves: see `medtune.evaluate.curves`.
        """
        self._guard(self._keep_external, metrics, curves)

    def pictures(self, drawn: Mapping[str, Any]) -> None:
        """Log pictures (PIL) by name, with the external test that was logged last."""
        self._guard(self._log_pictures, drawn)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """End the run as COMPLETE, PRUNED, FAIL or INTERRUPTED, with figures for W&B's table of runs."""
        self._guard(self._finish, state, summary)
        self._run = None

    def _guard(self, action: Callable[..., None], *args: Any) -> None:
        if self._run is None and action != self._start:
            return
        try:
            _bounded(action, *args)
        except (Exception, SystemExit) as error:  # wandb's teardown calls sys.exit
            self._run = None
            self._warn(f"W&B is off for this attempt: {type(error).__name__}: {error}")

    def _warn(self, message: str) -> None:
        _log.warning("trial %d: %s", self.number, message)
        if self.record is not None:
            try:
                self.record.event("warning", message=message)
            except OSError:
                _log.exception("the local record cannot be written")

    def _start(
        self, study_id: str, config: dict[str, Any], folder: Path, project: str, tags: list[str], group: str | None
    ) -> None:
        folder.mkdir(exist_ok=True)  # not its parents: they are gone where the folder that all nodes share is
        wandb = _library()
        given = {
            "project": project,
            "id": self.mark["run"],
            "group": group or study_id,
            "name": f"trial {self.number:04d} {config.get('model', '')} {config.get('optimizer', '')}".strip(),
            "tags": tags,
            "config": local.plain(config | _milestone_columns(config)),
        }
        try:
            run = wandb.init(settings=_settings(wandb, folder), **given)
        except Exception as error:
            # A service that died leaves the connection behind for every later run of this process: start afresh.
            self._warn(f"W&B's service is started again: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()
            run = wandb.init(settings=_settings(wandb, folder), **given)
        self.directory = Path(run.settings.sync_dir)
        self._write_mark()
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        self._run = run

    def _log_epoch(self, values: Mapping[str, Any]) -> None:
        self._replay(before=int(values["epoch"]))
        tested, self._pending = self._pending, {}
        self._log_row(values, tested)

    def _replay(self, before: int | None = None) -> None:
        earlier, self._earlier = self._earlier, []
        for line in earlier:
            if before is None or line["epoch"] < before:
                tested = (line.get("report") or {}).get("external") or {}
                # A line repeats the last test's figures until there is another.
                news = tested.get("epoch") != self._tested_epoch
                self._log_row(line, _external_names(tested) if news else {})

    def _log_row(self, values: Mapping[str, Any], tested: Mapping[str, Any], step: int | None = None) -> None:
        self._tested_epoch = tested.get("external/epoch", self._tested_epoch)
        self._last_epoch = int(values["epoch"])
        step = self._last_epoch if step is None else step
        row: dict[str, Any] = _numbers(values) | _numbers(values.get("metrics") or {}) | _numbers(tested)
        if self.selection and "best_value" in row:
            row[f"best/{self.selection}"] = row["best_value"]  # the sweep's metric, while the run goes on as well
        for name, curves in self._curves.items():
            row |= _plots(self._run, curves, name, step)
        row |= self._pictures
        self._curves, self._pictures = {}, {}
        self._run.log(row, step=step, commit=True)

    def _keep_external(self, metrics: Mapping[str, Any], curves: Mapping[str, Any]) -> None:
        self._pending |= _external_names(metrics)
        self._curves = {"external": curves, "external_matched": curves.get("matched") or {}}

    def _log_pictures(self, drawn: Mapping[str, Any]) -> None:
        import wandb

        for name, picture in drawn.items():
            self._pictures[name] = wandb.Image(picture)

    def _finish(self, state: str, summary: Mapping[str, Any]) -> None:
        self._replay()
        if self._pending or self._pictures:
            # The last epoch has its row already: pictures come after it, and so do figures of an epoch that was trained by
            # an attempt that did not live to test it.
            self._log_row({"epoch": self._last_epoch}, self._pending, step=self._last_epoch + 1)
        self._run.summary.update(local.plain(_external_names(summary)) | {"state": state})
        self._run.tags = (*(self._run.tags or ()), state.lower())
        if state == "INTERRUPTED":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state in ("COMPLETE", "PRUNED") else 1)
        self._write_mark(state=state)

    def _write_mark(self, **more: Any) -> None:
        assert self.directory is not None
        local.write_json(self.directory / MARK, self.mark | more)


def _bounded(action: Callable[..., None], *args: Any) -> None:
    """Call wandb from a thread that can be left behind: some of its waits have no end."""
    if _hangs.is_set():
        raise TimeoutError("W&B's service hangs since an earlier trial of this process")
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            action(*args)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True, name="wandb")
    thread.start()
    thread.join(LONGEST_SECONDS)
    if thread.is_alive():
        _hangs.set()
        raise TimeoutError(f"no answer from W&B's service within {LONGEST_SECONDS:.0f} s")
    if outcome:
        raise outcome[0]


def _library() -> Any:
    """wandb, imported late: it takes a second, and only where its environment is ours."""
    environment = clean_environment(os.environ)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    import wandb

    return wandb


def _settings(wandb: Any, folder: Path) -> Any:
    """An offline run that watches the machine and nothing else: no console, code, git, packages, links or output."""
    return wandb.Settings(
        mode="offline",
        root_dir=str(folder.resolve().parent),
        use_dot_wandb=False,
        reinit="create_new",
        console="off",
        silent=True,
        symlink=False,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,
        x_save_requirements=False,
        # What a killed process had not written is lost to W&B until the next attempt, and the uploader reads the file.
        x_transaction_log_flush_interval=5.0,
        init_timeout=20.0,
        x_service_wait=20.0,
        finish_timeout=15.0,
        summary_timeout=15,
    )


def _milestone_columns(config: Mapping[str, Any]) -> dict[str, Any]:
    """Milestones as the numbers that a sweep's page can draw; see `medtune.wandb_space`."""
    marks = config.get("milestones")
    if not marks or config.get("schedule") == "constant":
        return {}
    gap = {"milestones_gap": marks[1] - marks[0]} if len(marks) > 1 else {}
    return {"milestones_first": marks[0], "milestones_count": len(marks)} | gap


def _external_names(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The epoch of an external test is the tested weights', not the run's."""
    return {"external/epoch" if name == "epoch" else name: value for name, value in metrics.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `values`: the rest is no curve."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _plots(run: Any, curves: Mapping[str, Any], name: str, step: int) -> dict[str, Any]:
    """ROC curve and confusion matrix as W&B draws them, from tables alone."""
    import wandb

    classes = [str(label) for label in curves.get("classes") or ()]
    plots: dict[str, Any] = {}

    def plot(kind: str, spec: str, columns: Sequence[str], data: list[list[Any]], fields: str, **texts: str) -> None:
        key = f"curves/{name}/{kind}"
        table = wandb.Table(columns=list(columns), data=data)
        # Bound here, the table is a file of the run; left to `log`, it becomes an artifact, of which every upload of
        # the run would make another version.
        table.bind_to_run(run, f"{key}_table", step)
        drawn = dict(zip(fields.split(), columns, strict=True))
        plots[key] = wandb.plot_table(spec, table, drawn, texts)

    rocs = dict(enumerate(curves.get("rocs") or ())) | ({1: curves["roc"]} if curves.get("roc") else {})
    if rocs:
        points = [
            [fpr, tpr, classes[label] if classes else str(label)]
            for label, roc in rocs.items()
            for fpr, tpr in zip(roc["fpr"], roc["tpr"], strict=True)
        ]
        titles = {"x-axis-title": "1 - specificity", "y-axis-title": "sensitivity"}
        plot("roc", "wandb/area-under-curve/v0", ("fpr", "tpr", "class"), points, "x y class", title=name, **titles)
    if confusion := curves.get("confusion"):
        labels = classes or [str(i) for i in range(len(confusion))]
        cells = [[labels[i], labels[j], n] for i, row in enumerate(confusion) for j, n in enumerate(row)]
        columns = ("Actual", "Predicted", "nPredictions")
        plot("confusion", "wandb/confusion_matrix/v1", columns, cells, " ".join(columns), title=name)
    return plots
