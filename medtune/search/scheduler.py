"""Ray Tune's scheduler: hands each report to the conductor, whose word (ASHA's, in `asha.py`) is final."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from medtune.search.conductor import Conductor, Report
from medtune.search.searcher import nothing


class LedgerScheduler(FIFOScheduler):
    """Passes each result to the conductor, whose word is final."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self.conductor.report(Report(**json.loads(result["report"])))
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

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
