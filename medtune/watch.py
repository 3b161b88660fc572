"""What the driver looks after while trials run: time used, machines wanted, trials that wait in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune import Callback

from medtune.config import TrialConfig
from medtune.growth import Scouts
from medtune.placer import Placer
from medtune.search.conductor import Conductor
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
        self.begun: set[tuple[int, int]] = set()
        """Number and attempt of the launches whose process has started."""
        self.looked = time.monotonic()
        self.saved = self.looked

    def tick(self) -> None:
        """Look, at most once a second."""
        now = time.monotonic()
        if now - self.looked < EVERY:
            return
        seconds, self.looked = now - self.looked, now
        machines = self.placer.machines()
        live = {(launch.number, launch.attempt): launch for launch in self.conductor.live.values()}
        self.begun &= set(live)
        running = [live[key] for key in self.begun]
        self.usage.count(seconds, machines, [(n.number, n.config.model, n.place) for n in running if n.place is not None])
        if now - self.saved >= SAVED:
            self.saved = now
            self.usage.save()
        if self.scouts is not None:
            self.scouts.send(self.wanted())
        for line in self.waits.tell(self._waiting(), now):
            self.say(line)

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
            self.scouts.send(0)
        self.usage.save()


class WatchCallback(Callback):
    """Tune's word that a trial's process has started, and the time to look."""

    def __init__(self, watch: Watch, searcher: LedgerSearcher) -> None:
        self.watch = watch
        self.searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        launch = self.searcher.launches[trial.trial_id]
        self.watch.begun.add((launch.number, launch.attempt))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.watch.tick()

    def __reduce__(self) -> Any:
        return nothing, ()
