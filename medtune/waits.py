"""Names trials that wait for what no machine here has. Waiting while others compute is nothing to name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from medtune.config import TrialConfig
from medtune.placer import PATIENCE, Placer

AFTER = 30.0
"""Seconds that a trial waits in vain before it is named: a machine that is being restarted is no news."""

ANY = -1
"""Stands for the trials that were not begun yet."""


class Waits:
    """Keeps count of what waits for how long."""

    def __init__(self, placer: Placer) -> None:
        self.placer = placer
        self.since: dict[tuple[int, str], float] = {}
        self.said: set[tuple[int, str]] = set()

    def tell(self, waiting: Mapping[int, TrialConfig], now: float) -> list[str]:
        """What there is to say now, a line for each reason. `waiting`: trials that were not placed; `ANY`: those to come."""
        reasons = {(number, why): now for number, config in waiting.items() if (why := self.why(config)) is not None}
        self.since = {key: self.since.get(key, now) for key in reasons}
        self.said &= set(reasons)
        named: dict[str, list[str]] = defaultdict(list)
        for key, since in self.since.items():
            if now - since >= AFTER and key not in self.said:
                self.said.add(key)
                number, why = key
                model = waiting[number].model
                named[why].append("the trials to come" if number == ANY else f"trial {number} ({model})")
        return [f"waiting: {', '.join(trials)} for {why}" for why, trials in named.items()]

    def why(self, config: TrialConfig) -> str | None:
        """What a trial waits for that no machine here has, and what would meet it; None when some machine can take it."""
        placer, asked = self.placer, self.placer.reservation
        machines = placer.machines()
        if placer.possible(config):
            return None
        added = " The cluster has been asked for more machines." if placer.grows() else ""
        with_cards = [machine for machine in machines if machine.cards]
        if asked.gpus and not with_cards:
            return f"a GPU: no machine here has one now. Add one; the study goes on by itself.{added}"
        able = [machine for machine in machines if placer.part(machine, config) is not None]
        if able and not any(placer.fits(machine, config) for machine in able):
            largest = max(able, key=lambda machine: machine.memory or 0.0)
            have = (largest.memory or 0.0) / 2**30
            least = max(placer.needs.least(config, largest.kind), placer.needs.too_small(config)) / 2**30
            more = f"{least:.1f} GiB" if least > have else f"more than {have:.1f} GiB"
            meanwhile = (
                f" {PATIENCE / 60:.0f} min after it began to wait it goes on there with fewer images at once."
                if placer.may_come(config)
                else ""
            )
            return (
                f"a GPU with {more}: the largest here has {have:.1f} GiB ({largest.kind} on {largest.host}). Add a machine "
                "with a larger one, go on with --activation-checkpointing, or begin a study with a lower --batch-size."
                f"{meanwhile}{added}"
            )
        seat = f"{asked.cpus} CPU cores" + (f" and {asked.gpus:g} GPU" if asked.gpus else "")
        count = "a machine" if asked.processes == 1 else f"machines of one kind with {asked.processes} places, each"
        most = max((machine.cores for machine in machines), default=0)
        return (
            f"{count} with {seat}: the {len(machines)} here, of at most {most:g} cores, cannot hold it. Add machines, or go "
            f"on with a lower --cpus-per-trial or --gpus-per-trial.{added}"
        )
