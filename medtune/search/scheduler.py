"""Ray Tune's scheduler: hands each report to the conductor, whose word (ASHA's, in `asha.py`) is final."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from medtune.errors import StorageFault
from medtune.search.conductor import Conductor, Report
from medtune.search.searcher import LedgerSearcher, nothing


class LedgerScheduler(FIFOScheduler):
    """Passes each result to the conductor, whose word is final."""

    def __init__(self, conductor: Conductor, searcher: LedgerSearcher) -> None:
        super().__init__()
        self.conductor = conductor
        self.searcher = searcher

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

    def __reduce__(self) -> Any:
        return nothing, ()


class Ticker(Callback):
    """Calls a function after every step of Tune's loop."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.tick()

    def __reduce__(self) -> Any:
        return nothing, ()
