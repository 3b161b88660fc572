"""The Ray trainable: one attempt at a trial, in a process that is used again for the next.

`Attempt` does the work and knows nothing of Ray; `MedtuneTrial` is the thin actor round it. An attempt writes into its
own folder only, and writes its final result there before it reports it.
"""

from __future__ import annotations

import functools
import gc
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import nn

from medtune import predictions
from medtune.checkpoint import CheckpointStore
from medtune.config import TrialConfig, WandbMode
from medtune.data import PairData, limit, load_pair
from medtune.data.courier import fetched
from medtune.errors import MachineFault, TrainingDiverged
from medtune.evaluate import default_device, external_test, own_test, shift_test
from medtune.lifeline import Lifeline, to_this_cluster
from medtune.memory import OutOfMemory, Remembered, fewer, is_out_of_memory, least, limit_memory, no_room, used
from medtune.parallel import SOLO, Group
from medtune.search.conductor import Report, attempt_folder, trial_folder
from medtune.steps import broken_recording
from medtune.storage.attempt import workplace
from medtune.tracking import LocalRecord, WandbRun, earlier_epochs, read_outcome
from medtune.training import EpochResult, Fit, fit


@dataclass(frozen=True, kw_only=True)
class AttemptSpec:
    """All that an attempt needs, in plain values that travel to its process."""

    number: int
    attempt: int
    config: dict[str, Any]
    study: str
    folder: str
    """The study's folder."""
    rungs: tuple[int, ...]
    data_dir: str | None
    external_dir: str | None
    external_fallback: bool
    wandb: WandbMode
    wandb_project: str
    threads: int
    processes: int = 1
    """Processes that train it together."""
    gpu_share: float = 1.0
    """The part of a GPU that each process has."""
    micro_batch: int | None = None
    """Images at once that an earlier attempt was left to try when more did not fit into memory."""
    pack: str | None = None
    """Key of the pack that has the images, on a cluster; none: they are loaded from the data folder."""
    watched: bool = False
    """Whether its processes may be cut off from the driver, or their machine be taken away."""
    memory_cap: float | None = None
    """The fraction of a card that its tensors may take, where others have the rest."""
    measure: bool = False
    """Do in the first epoch all that takes memory, and leave a checkpoint: it is to find out what the trial needs."""
    storage: str | None = None
    """The study's place in a bucket, if it is kept in one; each node then works in a folder of its own."""
    storage_patience: float = 0.0
    """Seconds to wait for storage that fails."""

    @property
    def trials(self) -> Path:
        return Path(self.folder) / "trials"


@functools.lru_cache(maxsize=2)
def _data(pair: str, native: int, data_dir: str | None, external_dir: str | None, fallback: bool) -> PairData:
    """The pair, kept between the trials of a process."""
    folder, external = (Path(p) if p else None for p in (data_dir, external_dir))
    return load_pair(pair, native_size=native, data_dir=folder, external_dir=external, external_fallback=fallback)


@functools.lru_cache(maxsize=2)
def _packed(key: str) -> PairData:
    return fetched(key)


@dataclass(frozen=True, eq=False)
class Begun:
    """A training that is set up, and what it was set up from."""

    fit: Fit
    data: PairData
    device: torch.device
    store: CheckpointStore
    remembered: Remembered
    shares: bool
    """Whether its card has a limit for it, which says nothing of the card."""


def begin_fit(spec: AttemptSpec, config: TrialConfig, group: Group) -> Begun:
    """Load the data and set up the training on this process's device, from the newest checkpoint of all attempts."""
    from medtune.ops.engines import scan_engine  # brings torch's compiler, which a driver does without

    torch.set_num_threads(spec.threads)
    device = default_device()
    scan_engine(device)  # raises here, before any work, where MEDTUNE_SCAN asks for what is not there
    limit_memory(device, spec.memory_cap)
    if spec.pack is not None:
        data = _packed(spec.pack)
    else:
        data = _data(config.pair, config.native_size, spec.data_dir, spec.external_dir, spec.external_fallback)
    data = limit(data, train_limit=config.train_limit, external_limit=config.external_limit)
    here, *earlier = (
        attempt_folder(spec.trials, spec.number, n) / "checkpoints" for n in range(spec.attempt, 0, -1)
    )
    store = CheckpointStore(here, earlier=earlier)
    folder = Path(spec.folder).parent / "micro-batches"
    remembered = Remembered(folder, config, device, spec.gpu_share, group.world)
    try:
        fitting = fit(
            config,
            data,
            device=device,
            checkpoints=store,
            save_at=spec.rungs,
            group=group,
            micro_batch=least(spec.micro_batch, remembered.read()),
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise no_room(config, data, device) from None
        raise
    return Begun(fitting, data, device, store, remembered, spec.memory_cap is not None)


SHEET = 4
"""Images on a Grad-CAM sheet: few, as each takes a pass there and back."""


class Attempt:
    """Trains one configuration, tests it at rungs and at the end, and reports after each epoch.

    Of a group, it is the first process's: the one that writes, tests and reports.
    """

    def __init__(self, spec: AttemptSpec, group: Group = SOLO) -> None:
        self.spec = spec
        self.group = group
        self.config = TrialConfig.from_dict(spec.config)
        self.started = time.perf_counter()
        self.record = LocalRecord(attempt_folder(spec.trials, spec.number, spec.attempt))
        self.fit: Fit | None = None
        self.wandb: WandbRun | None = None
        self.external: dict[str, Any] = {}
        self.external_epoch = 0
        self.predicted: predictions.Predictions = {}
        """Of the weights that were tested last, on the external set."""
        self._unheard: list[EpochResult] = []
        """An epoch that an earlier attempt trained and left a checkpoint of, but did not live to test and record."""
        self._problem_told = False
        self.failure: Report | None = None
        self.ended = False
        self.leaving: Callable[[], bool] = lambda: False
        """Whether this machine is about to be taken away."""

    def next_report(self) -> Report:
        """Train one more epoch. A trial's own error becomes a `fail` report: it is the trial's, not the machine's."""
        try:
            return self._advance()
        except OutOfMemory as error:
            return self._out_of_memory(error)
        except MachineFault:
            raise
        except Exception as error:
            if self.fit is not None and is_out_of_memory(error):  # in a test of the best weights, say
                return self._out_of_memory(fewer(self.config, self.device, self.fit.micro_batch))
            return self._fail(error)

    def _out_of_memory(self, error: OutOfMemory) -> Report:
        return self._fail(error) if error.fits is None else self._go_again(error, error.fits)

    def _fail(self, error: Exception) -> Report:
        report = failed(self._report("fail"), error)
        if self.group.world == 1:
            self._end(report)
        else:  # the failure may be another process's: who conducts the group knows
            self.failure = report
        return report

    def _go_again(self, error: OutOfMemory, fits: int) -> Report:
        """The trial goes on in another attempt, from its last checkpoint, with fewer images at once."""
        remember(self.begun, fits)
        report = replace(self._report("out_of_memory", cause=str(error)), micro_batch=fits)
        if self.group.world == 1:
            note_out_of_memory(self.record, report)
        return report

    def _advance(self) -> Report:
        if self.fit is None:
            self._start()
        assert self.fit is not None
        result = self._unheard.pop() if self._unheard else next(self.fit, None)
        if result is None:
            # The last epoch was trained by an earlier attempt that did not live to test it.
            return self._complete(None)
        if self.leaving():
            self.fit.save()
        self._note_problem(self.fit)
        line = {**result.to_dict(), "attempt": self.spec.attempt}
        last = result.epoch >= self.config.epochs
        measure = self.spec.measure and result.epoch == self.fit.start_epoch
        if result.epoch in self.spec.rungs or last or measure:
            self._test_external(self.fit)
        if measure:
            self.fit.save()
        if measure or last or self.leaving() or result.epoch in self.spec.rungs:
            self.fit.settle()  # written while the tests ran; others rely on it from here on
        report = self._report("running", result)
        self.record.epoch({**line, "report": report.to_dict()})
        if self.wandb:
            self.wandb.epoch(line)
        return self._complete(result) if last else report

    def _start(self) -> None:
        spec = self.spec
        begun = self.begun = begin_fit(spec, self.config, self.group)
        self.fit, self.data, self.device, store = begun.fit, begun.data, begun.device, begun.store
        if self.group.world == 1:  # others of a group would be an epoch ahead
            recorded = {line["epoch"] for line in earlier_epochs(self.record.folder)}
            self._unheard = [result for result in begun.fit.history[-1:] if result.epoch not in recorded]
        self._note_micro_batch(begun.fit)
        for note in begun.fit.notes:
            self.record.event("pretrained", message=note)
        for problem in store.problems:
            self.record.event("checkpoint", message=problem)
        if spec.wandb != "off":
            self.wandb = WandbRun(
                study_id=spec.study,
                number=spec.number,
                attempt=spec.attempt,
                config=self.config.to_dict() | {"number": spec.number, "external_set": self.data.external_name},
                folder=Path(spec.folder) / "wandb",
                project=spec.wandb_project,
                tags=[self.config.model, self.config.optimizer, *(["synthetic"] if self.data.synthetic else [])],
                mode="offline",
                record=self.record,
            )

    def _note_micro_batch(self, run: Fit) -> None:
        # On GPUs BatchNorm counts the images of all processes.
        counted = run.micro_batch * (self.group.world if self.device.type == "cuda" else 1)
        normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in run.model.modules())
        whole = run.micro_batch * self.group.world >= self.config.batch_size
        if whole and (counted >= self.config.batch_size or not normed):
            return
        message = f"a device computes {run.micro_batch} images at once; gradients add up to batch {self.config.batch_size}"
        if normed and counted < self.config.batch_size:
            message += f". BatchNorm's statistics are those of {counted} images, not of the batch"
        self.record.event("micro_batch", message=message, micro_batch=run.micro_batch)

    def _note_problem(self, run: Fit) -> None:
        """Tell once that steps are slower than they could be, and why."""
        problem = run.stepper.problem if run.stepper else None
        if problem and not self._problem_told:
            self._problem_told = True
            self.record.event("warning", message=f"steps run kernel by kernel, as they could not be recorded: {problem}")

    def _test_external(self, run: Fit) -> None:
        """Test the best weights so far, unless these very weights were tested before."""
        if self.external_epoch == run.best_epoch:
            return
        outcome = external_test(run.best_model(), self.config, self.data, self.device)
        curves = outcome.pop("curves", {})
        self.predicted = outcome.pop("predictions", {})
        self.external = outcome
        self.external_epoch = run.best_epoch
        if self.wandb:
            self.wandb.external(outcome | {"epoch": run.best_epoch}, curves)

    def _complete(self, result: EpochResult | None) -> Report:
        assert self.fit is not None
        self._test_external(self.fit)
        model = self.fit.best_model()
        own, shifted = (test(model, self.config, self.data, self.device) for test in (own_test, shift_test))
        predictions.write(self.record.folder, {**own.pop("predictions"), **shifted.pop("predictions"), **self.predicted})
        self.fit.settle()
        self.external = self.external | own | shifted
        report = self._report("complete", result)
        self._show_sheets(model)
        self._end(report)
        return report

    def _show_sheets(self, model: nn.Module) -> None:
        """What a trial's surest hits and misses on the external set rest on, in its W&B run."""
        if self.wandb is None:
            return
        from medtune.deploy.sheets import sheets

        try:
            found = sheets(self.config, model, self.data, "external", self.predicted["external"], SHEET)
        except Exception as error:  # a picture is no reason for a trial to fail
            self.record.event("warning", message=f"no Grad-CAM pictures: {type(error).__name__}: {error}")
            return
        self.wandb.pictures({f"gradcam/external-{kind}": sheet for kind, sheet in found.items()})

    def _report(self, status: Any, result: EpochResult | None = None, cause: str | None = None) -> Report:
        run = self.fit
        return Report(
            number=self.spec.number,
            attempt=self.spec.attempt,
            status=status,
            epoch=result.epoch if result else (self.config.epochs if status == "complete" else 0),
            value=run.best_value if run else None,
            best={"epoch": run.best_epoch, **run.best_metrics} if run and run.best_epoch else {},
            external={"epoch": self.external_epoch, **self.external} if self.external else {},
            cause=cause,
            node=socket.gethostname(),
            seconds=time.perf_counter() - self.started,
            micro_batch=run.micro_batch if run else None,
            leaving=self.leaving(),
            memory=used(self.device) if run and self.spec.gpu_share == 1 and self.spec.memory_cap is None else None,
        )

    def _end(self, report: Report) -> None:
        self.ended = True
        self.record.final(report.to_dict())
        self._close("FAIL" if report.status == "fail" else "COMPLETE", report)

    def close(self) -> None:
        """Let go of everything. A trial that did not end by itself was pruned or interrupted."""
        if not self.ended:
            self.ended = True
            outcome = read_outcome(trial_folder(self.spec.trials, self.spec.number))
            self._close(outcome or "INTERRUPTED", self.failure or self._report("running"))

    def _close(self, state: str, report: Report) -> None:
        if self.wandb:
            cause = {"cause": report.cause} if report.cause else {}
            self.wandb.finish(state, {f"best/{k}": v for k, v in report.best.items()} | report.external | cause)
            self.wandb = None
        if self.fit is not None:
            self.fit.close()
            self.fit = None


def failed(report: Report, error: Exception) -> Report:
    """The report of a trial's own error."""
    repeats = isinstance(error, TrainingDiverged | OutOfMemory)
    return replace(report, status="fail", cause=f"{type(error).__name__}: {error}", repeats=repeats)


def remember(begun: Begun, fits: int) -> None:
    """For the trials to come: what ran out in the first epoch of an attempt was its own need, later a neighbour's."""
    if not begun.shares and begun.fit.epoch < begun.fit.start_epoch:
        begun.remembered.write(fits)


def note_out_of_memory(record: LocalRecord, report: Report) -> None:
    """Write down why an attempt ended whose trial goes on."""
    message = f"{report.cause}. The trial goes on with {report.micro_batch} at once"
    record.event("out_of_memory", message=message, micro_batch=report.micro_batch)


RESIDENT_BYTES = 1 << 27
"""Device memory that a process may keep between trials, beside its libraries' workspaces."""


def memory_returned() -> bool:
    """Whether the last trial's device memory was given back."""
    if not torch.cuda.is_initialized() or torch.cuda.memory_allocated() <= RESIDENT_BYTES:
        return True
    # Some 50 MB for each stream that a trial's steps ran on: no trial's, and made anew where they are wanted.
    torch._C._cuda_clearCublasWorkspaces()
    if torch.cuda.memory_allocated() <= RESIDENT_BYTES:
        return True
    # A full collection takes 0.1 s and more with torch loaded: only when something still holds on.
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() <= RESIDENT_BYTES


def begin_watch(spec: AttemptSpec, line: Lifeline | None, attempt: Attempt | None = None) -> Lifeline | None:
    """Have this process's lifeline (`line`, when it has one) look after an attempt; none in a study that is not watched."""
    if not spec.watched:
        return None
    line = line or to_this_cluster()
    folder = attempt_folder(spec.trials, spec.number, spec.attempt)
    line.note = lambda words: LocalRecord(folder).event("cut off", message=words)
    if attempt is not None:
        attempt.leaving = lambda: line.leaving
    return line


class MedtuneTrial(tune.Trainable):
    """One epoch a step. Starting is left to the first step, so that its errors are the trial's and are reported."""

    attempt_class = Attempt

    team: Any = None
    lifeline: Lifeline | None = None

    def setup(self, config: dict[str, Any]) -> None:
        self.place = workplace(AttemptSpec(**json.loads(config["spec"])))
        spec = self.place.begin()
        if spec.processes == 1:
            self.attempt: Any = self.attempt_class(spec)
            self.lifeline = begin_watch(spec, self.lifeline, self.attempt)
            return
        from medtune.team import TeamAttempt  # which is made of this module's parts

        self.team = self.team or self.new_team(spec)
        self.attempt = TeamAttempt(spec, self.team)
        self.lifeline = begin_watch(spec, self.lifeline)

    def new_team(self, spec: AttemptSpec) -> Any:
        """The processes of a trial that several train together."""
        from medtune.team import Team

        return Team(spec.processes, spec.threads)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this warm process.

        Raises MachineFault, so that the trial is started in a process of its own, when the device is not fit for another,
        and Leaving when its machine is about to be taken away.
        Returning False would do in Ray's contract, but Tune then drops the trial without telling the searcher.
        """
        self.leave()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises here when the last trial left the device broken
        if self.lifeline is not None:
            self.lifeline.require_staying()
        if why := broken_recording():
            raise MachineFault(f"a recording of the last trial's steps broke off in this process: {why}")
        if not memory_returned():
            raise MachineFault(f"the last trial left {torch.cuda.memory_allocated() / 2**20:.0f} MB of device memory behind")
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self.attempt.spec.watched:
            self.place.require_current()
        report = self.attempt.next_report()
        self.place.before_report(report.leaving)
        return {"report": json.dumps(report.to_dict())}

    def leave(self) -> None:
        """Let go of the attempt; nothing of it is only here."""
        self.place.before_close()
        self.attempt.close()
        self.place.end()

    def cleanup(self) -> None:
        self.leave()
        if self.team is not None:
            self.team.stop()


def to_config(spec: AttemptSpec) -> dict[str, str]:
    """The spec as Tune carries it: one string, so that Tune neither flattens nor copies it field by field."""
    return {"spec": json.dumps(asdict(spec))}
