"""Ray Tune's scheduler: hands each report to the conductor, whose word (ASHA's, in `asha.py`) is final."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from medtune.errors import Leaving, StorageFault
from medtune.search.conductor import Conductor, Launch, Report
from medtune.search.searcher import LedgerSearcher, nothing
from medtune.search.warm import WarmProcesses


class LedgerScheduler(FIFOScheduler):
    """Passes each result to the conductor, whose word is final."""

    def __init__(
        self, conductor: Conductor, searcher: LedgerSearcher, gone: Callable[[], Sequence[Launch]] = lambda: ()
    ) -> None:
        """`gone`: launches whose machines cannot take trials any more."""
        super().__init__()
        self.conductor = conductor
        self.searcher = searcher
        self.gone = gone

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Tune's own choice, after what waits for a machine that is gone was taken back."""
        controller = tune_controller._tune_controller
        if not isinstance(controller._actor_cache, WarmProcesses):
            controller._actor_cache = WarmProcesses()  # before the first process is started
        for launch in self.gone():
            found = [t for t in tune_controller.get_live_trials() if self.searcher.launches.get(t.trial_id) == launch]
            for trial in found:
                try:
                    self._take_back(tune_controller, trial, launch)
                except StorageFault as error:
                    self.searcher.stop_for(error)
                    return None
        return super().choose_trial_to_run(tune_controller)

    def _take_back(self, tune_controller: Any, trial: Any, launch: Launch) -> None:
        controller = tune_controller._tune_controller
        if trial.status != Trial.PENDING or trial in controller._resetting_trials:
            return  # its process is there, or was: if it ends, Tune says so
        self.conductor.take_back(launch)
        if trial in controller._staged_trials:
            # Tune would go on counting on it, and keep no warm process for others.
            controller._unstage_trial_with_resources(trial)
        tune_controller.stop_trial(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        try:
            goes_on = self.conductor.report(Report(**json.loads(result["report"])))
        except StorageFault as error:  # an exception here is the trial's failure to Tune
            self.searcher.stop_for(error)
            goes_on = False
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune tells the scheduler first, with the reason, and then the searcher, without."""
        error = trial.get_error()
        lines = [line for line in str(error).splitlines() if line.strip()] if error else []
        if lines:
            self.searcher.causes[trial.trial_id] = f"{type(error).__name__}: {lines[-1].strip()}"
        if _announced(trial.get_pickled_error()):
            self.searcher.announced.add(trial.trial_id)

    def __reduce__(self) -> Any:
        return nothing, ()


def _announced(error: Exception | None) -> bool:
    """Whether a trial ended because its machine was taken away with notice."""
    return getattr(error, "preempted", False) or isinstance(getattr(error, "cause", None), Leaving)


class Ticker(Callback):
    """Calls a function after every step of Tune's loop."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.tick()

    def __reduce__(self) -> Any:
        return nothing, ()
