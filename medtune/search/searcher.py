"""Ray Tune's searcher: hands out what the conductor decides to launch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from medtune.errors import StorageFault
from medtune.search.conductor import Conductor, Launch
from medtune.storage.patience import ToldToStop


def nothing() -> None:
    """What Tune finds when it unpickles a part of ours: these live in the driver alone."""


class LedgerSearcher(Searcher):
    """Feeds a Tune run from the ledger, whatever the run's own trial ids are."""

    def __init__(
        self,
        conductor: Conductor,
        to_config: Callable[[Launch], dict[str, Any]],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`tick` is called as often as Tune asks."""
        super().__init__()
        self.tick = tick
        self.conductor = conductor
        self.to_config = to_config
        self.launches: dict[str, Launch] = {}
        self.causes: dict[str, str] = {}
        """Why a trial's process died, by Tune's trial id, where Ray knows."""
        self.announced: set[str] = set()
        """Trials, by Tune's id, whose machine was taken away with notice."""
        self.fault: StorageFault | None = None
        """Storage that failed for too long."""
        self.running = False
        """Whether Tune's run is on: its signal would end this process before and after."""
        self.stopping = False
        """Set on Ctrl-C: what ends from then on was interrupted, and stays unfinished in the ledger."""

    def suggest(self, trial_id: str) -> Any:
        """A configuration, None for later, or FINISHED."""
        if self.stopping:
            return Searcher.FINISHED
        self.tick()  # Tune's loop stands still while nothing runs and nothing can be started
        try:
            launch = self.conductor.next_launch()
        except StorageFault as error:
            self.stop_for(error)
            return Searcher.FINISHED
        if launch == "done":
            return Searcher.FINISHED
        if launch == "later":
            return None
        self.launches[trial_id] = launch
        return self.to_config(launch)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune's word that a trial is over counts only when its process died: all else was reported before."""
        if error and not self.stopping:
            cause = self.causes.pop(trial_id, "the process ended without a word")
            if StorageFault.__name__ in cause:
                # Neither the trial's fault nor its machine's: nothing is charged, and it goes on next time.
                self.stop_for(StorageFault(cause.rpartition(f"{StorageFault.__name__}: ")[2]))
            else:
                self._lost(trial_id, cause)

    def _lost(self, trial_id: str, cause: str) -> None:
        try:
            self.conductor.lost(self.launches[trial_id], cause, announced=trial_id in self.announced)
        except StorageFault as error:
            self.stop_for(error)

    def stop(self) -> None:
        """End Tune's run: what is running is interrupted and stays unfinished in the ledger."""
        self.stopping = True
        if self.running:
            os.kill(os.getpid(), signal.SIGUSR1)  # Tune's own word for it

    def stop_if_hopeless(self) -> None:
        """End Tune's run when the conductor has given up."""
        if self.conductor.hopeless and not self.stopping:
            self.stop()

    def stop_for(self, error: StorageFault) -> None:
        """End Tune's run, as storage has failed for too long. From any thread."""
        if not isinstance(error, ToldToStop):  # the reason to stop is another, and known
            self.fault = self.fault or error
        if not self.stopping:
            self.stop()

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state; Tune's snapshot is not used."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a study is resumed from its ledger, never from Tune's snapshot")

    def get_state(self) -> dict[str, Any]:
        return {}

    def __reduce__(self) -> Any:
        return nothing, ()  # Tune pickles what it was given for a restore that is never made

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save, as above."""
