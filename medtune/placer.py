"""Decides for a running study where each trial goes: by what the machines have, what trials need, and what runs where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from medtune.config import TrialConfig
from medtune.needs import Needs
from medtune.placement import Card, Machine, Place, Request, Room, find, kinds, seats, share
from medtune.reservation import Reservation
from medtune.search.conductor import Launch, Report

PATIENCE = 900.0
"""Seconds that a trial waits for a larger card that was there, or may be added, before it makes do with what is there."""


class Study(Protocol):
    """What is asked of the conductor."""

    live: dict[int, Launch]
    waiting: list[int]

    def to_come(self) -> int:
        """Trials that were not begun yet."""


class Placer:
    """Places trials; see `medtune.search.conductor.Placing`."""

    def __init__(
        self,
        study: Study,
        reservation: Reservation,
        machines: Callable[[], Sequence[Machine]],
        needs: Needs,
        *,
        share: bool = False,
        most: int | None = None,
        limit: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`machines`: those that may take trials now. `share`: several trials may have a card together.

        `most`: trials at a time. `limit`: GPUs (without them cores) that the cluster can grow to by itself.
        """
        self.study = study
        self.reservation = reservation
        self.machines = machines
        self.needs = needs
        self.share = share
        self.most = most
        self.limit = limit
        self.clock = clock
        self.seen: dict[str, Machine] = {}
        """The kinds that were there since the study was launched."""
        self.unfit: dict[int, float] = {}
        """When a trial was first found to fit no machine there is."""
        self.claims: dict[int, Card] = {}
        """The card that is being emptied for a trial that waits for it."""

    def taken(self) -> list[Place]:
        """The places of the trials that run."""
        return [launch.place for launch in self.study.live.values() if launch.place is not None]

    def slots(self) -> int:
        """How many trials may run at a time now."""
        machines = self.machines()
        self.seen.update({machine.kind: machine for machine in kinds(machines)})
        if self.share:
            room = Room(machines, self.taken())
            fit = len(self.study.live) + sum(free > 0 for m in machines for free in room.cards[m.id])
        else:
            fit = seats(machines, self.reservation.cpus, self.reservation.gpus) // self.reservation.processes
        return fit if self.most is None else min(fit, self.most)

    def place(self, number: int, config: TrialConfig) -> Place | None:
        """Where a trial may start now; None: nowhere yet."""
        machines = self.machines()
        allowed = self._allowed(number, config, machines)
        ids = {machine.id for machine in allowed}
        closed = {card for other, card in self.claims.items() if other != number and other in self.study.waiting}
        found = find(machines, self.taken(), self._request(config, lambda machine: machine.id in ids), closed)
        self.claims.pop(number, None)
        if found is None and self.share and allowed:
            self._claim(number, allowed, closed)
        return found

    def _request(self, config: TrialConfig, allows: Callable[[Machine], bool]) -> Request:
        return Request(
            self.reservation.processes,
            self.reservation.cpus,
            lambda machine: self.part(machine, config) if allows(machine) else None,
            lambda machine: self.share and self.needs.need(config, machine.kind) is None,
        )

    def part(self, machine: Machine, config: TrialConfig) -> float | None:
        """The part of a card that a trial takes on a machine; 0: none; None where the machine has no card."""
        if not self.reservation.gpus:
            return 0.0
        if not machine.cards:
            return None
        if not self.share:
            return self.reservation.gpus
        need = self.needs.need(config, machine.kind)
        return 1.0 if need is None or machine.memory is None else min(1.0, share(need, machine.memory))

    def fits(self, machine: Machine, config: TrialConfig) -> bool:
        """Whether a machine holds a trial at all, as far as is known."""
        if self.part(machine, config) is None:
            return False
        known = self.reservation.gpus and machine.memory is not None
        return not known or self.needs.fits(config, machine.kind, machine.memory or 0.0)

    def _allowed(self, number: int, config: TrialConfig, machines: Sequence[Machine]) -> list[Machine]:
        """The machines that a trial may go to: those that it fits, else, after a while, those with the largest cards."""
        fitting = [machine for machine in machines if self.fits(machine, config)]
        if fitting or not machines:
            self.unfit.pop(number, None)
            return fitting
        since = self.unfit.setdefault(number, self.clock())
        if self.may_come(config) and self.clock() - since < PATIENCE:
            return []
        able = [machine for machine in machines if self.part(machine, config) is not None]
        largest = max((machine.memory or 0.0 for machine in able), default=0.0)
        return [machine for machine in able if (machine.memory or 0.0) == largest]

    def grows(self) -> bool:
        """Whether machines may be added that are not known yet."""
        there = sum(machine.cards if self.reservation.gpus else machine.cores for machine in self.machines())
        return there < self.limit

    def possible(self, config: TrialConfig) -> bool:
        """Whether the machines that are there could take a trial, if nothing else ran."""
        return find(self.machines(), (), self._request(config, lambda machine: self.fits(machine, config))) is not None

    def may_come(self, config: TrialConfig) -> bool:
        """Whether a machine that the trial fits was there before, or may be added."""
        return self.grows() or any(self.fits(machine, config) for machine in self.seen.values())

    def _claim(self, number: int, allowed: Iterable[Machine], closed: set[Card]) -> None:
        """Keep what comes free on the emptiest card for a trial that was passed over, or small ones would go on first."""
        room = Room(list(allowed), self.taken())
        cards = [(free, (m.id, n)) for m in room.machines for n, free in enumerate(room.cards[m.id])]
        left = [(free, card) for free, card in cards if card not in closed]
        if left:
            self.claims[number] = max(left, key=lambda one: one[0])[1]

    def moves(self, launch: Launch, report: Report) -> bool:
        """Take in what a report says of memory; whether the trial should go on elsewhere, as it is."""
        place = launch.place
        if place is None or not place.part:
            return False
        if report.memory is not None:
            self.needs.note(launch.config, report.memory)
        machine = next((m for m in self.machines() if m.id == place.nodes[0]), None)
        if report.status == "out_of_memory":
            return machine is not None and machine.memory is not None and self._outgrown(launch, place, machine.memory)
        if report.status != "running" or not place.measuring or machine is None:
            return False
        part = self.part(machine, launch.config)
        return part is not None and part < place.part and bool(self.study.waiting or self.study.to_come())

    def _outgrown(self, launch: Launch, place: Place, memory: float) -> bool:
        """A part of a card was too little: a larger one. A whole card was too little: a larger card where there is one."""
        if self.share and place.part < 1:
            self.needs.grow(launch.config, place.kind, memory)
            return True
        if place.part < 1:
            return False  # --gpus-per-trial 0.5: nobody knows what the neighbour took
        self.needs.note_too_small(launch.config, memory)
        larger = [m for m in self.machines() if (m.memory or 0.0) > memory and self.fits(m, launch.config)]
        return bool(larger) and launch.micro_batch is None

    def cap(self, launch: Launch) -> float | None:
        """The fraction of a card that torch may give to tensors in a trial's process; None: all of it."""
        place = launch.place
        if place is None or not self.share or place.part >= 1:
            return None
        memory = next((m.memory for m in self.machines() if m.id == place.nodes[0]), None)
        return place.part - self.needs.overhead(launch.config, place.kind) / memory if memory else None

    def gone(self) -> list[Launch]:
        """The launches whose machines cannot take trials any more."""
        there = {machine.id for machine in self.machines()}
        placed = [launch for launch in self.study.live.values() if launch.place is not None]
        return [launch for launch in placed if not there.issuperset(launch.place.nodes)]  # type: ignore[union-attr]
