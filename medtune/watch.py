"""What the driver looks after while trials run: time used, machines wanted, trials that wait in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from medtune.config import TrialConfig
from medtune.growth import Scouts
from medtune.placer import Placer
from medtune.search.conductor import Conductor, Launch
from medtune.search.searcher import LedgerSearcher, nothing
from medtune.usage import Usage
from medtune.waits import ANY, Waits

EVERY = 1.0
"""Seconds between two looks."""
SAVED = 30.0
"""Seconds between two writings of the usage."""


class Watch:
    """One launch's watch. `tick` as often as there is time."""

    def __init__(
        self, conductor: Conductor, placer: Placer, usage: Usage, scouts: Scouts | None, say: Callable[[str], None]
    ) -> None:
        """`scouts`: None where the cluster does not grow."""
        self.conductor = conductor
        self.placer = placer
        self.usage = usage
        self.scouts = scouts
        self.say = say
        self.waits = Waits(placer)
        self.running: dict[str, Launch] = {}
        """The launches whose process has started, by Tune's trial id."""
        self.looked = self.counted = self.saved = time.monotonic()

    def tick(self) -> None:
        """Look, at most once a second."""
        now = time.monotonic()
        if now - self.looked < EVERY:
            return
        self.looked = now
        self.count()
        if now - self.saved >= SAVED:
            self.saved = now
            self.usage.save()
        if self.scouts is not None:
            self.scouts.send(self.wanted(), {machine.id for machine in self.placer.machines()})
        for line in self.waits.tell(self._waiting(), now):
            self.say(line)

    def count(self) -> None:
        """Note the time since the last call to what ran in it."""
        now = time.monotonic()
        seconds, self.counted = now - self.counted, now
        placed = [(one.number, one.config.model, one.place) for one in self.running.values() if one.place is not None]
        self.usage.count(seconds, self.placer.machines(), placed)

    def wanted(self) -> int:
        """Places that the cluster may be asked to grow by."""
        asked = self.placer.reservation
        there = sum(machine.cards if asked.gpus else machine.cores for machine in self.placer.machines())
        room = int((self.placer.limit - there) / (asked.gpus or asked.cpus))
        left = len(self.conductor.waiting) + self.conductor.to_come()
        if self.placer.most is not None:
            left = min(left, self.placer.most - len(self.conductor.live))
        return max(0, min(room, left * asked.processes))

    def _waiting(self) -> dict[int, TrialConfig]:
        waiting = {number: self.conductor.trial_config(number) for number in self.conductor.waiting}
        if not waiting and self.conductor.to_come():
            return {ANY: self.conductor.config.trial}
        return waiting

    def end(self) -> None:
        """Write down what was counted, and send no more scouts."""
        if self.scouts is not None:
            self.scouts.send(0, ())
        self.count()
        self.usage.save()


class WatchCallback(Callback):
    """Tune's word that a trial's process has started or ended, and the time to look."""

    def __init__(self, watch: Watch, searcher: LedgerSearcher) -> None:
        self.watch = watch
        self.searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch.count()
        self.watch.running[trial.trial_id] = self.searcher.launches[trial.trial_id]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch.count()
        self.watch.running.pop(trial.trial_id, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.watch.tick()

    def __reduce__(self) -> Any:
        return nothing, ()
