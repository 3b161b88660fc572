"""Where a trial runs: which machine, which card of it, which part of the card. Knows nothing of Ray.

Ray is told the outcome as a placement group tied to the machine, with the part as its GPU fraction. A card is an index of
ours: Ray picks the real one by the same rule (of the cards with enough room the fullest), so the count per card agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DUST = 1e-6
"""Sums of fractions are compared with this tolerance; Ray counts GPUs in ten-thousandths."""
STEPS = 100
"""A shared card is given away in this many steps, so that fractions add up without dust."""
MARGIN = 1.05
"""What a trial on a shared card gets of its measured need: memory is cut up otherwise in every run."""

Card = tuple[str, int]
"""A machine's id and an index among its cards."""


@dataclass(frozen=True)
class Machine:
    """A machine that may take trials now."""

    id: str
    """Ray's node id."""
    host: str
    cores: float
    cards: int = 0
    """GPUs, all of one kind."""
    kind: str = "CPU"
    """The GPUs' name."""
    memory: float | None = None
    """Bytes of one GPU; None when nothing is known."""


@dataclass(frozen=True)
class Place:
    """Where one attempt runs: a machine, and a card of it, for each of its processes."""

    nodes: tuple[str, ...]
    host: str
    """Of the first process."""
    kind: str
    cores: float
    """Of each process."""
    part: float = 0.0
    """Of a card, for each process; 0: no GPU."""
    cards: tuple[int, ...] = ()
    measuring: bool = False
    """Alone on a card that is to be shared, until it is known what the trial needs."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def on(self) -> list[Card]:
        """The cards it is on, each once."""
        return list(dict.fromkeys(zip(self.nodes, self.cards, strict=False)))


@dataclass(frozen=True)
class Request:
    """What a trial asks for: `processes` seats with `cores` each, on machines of one kind."""

    processes: int
    cores: float
    part: Callable[[Machine], float | None]
    """The part of a card that a process takes on a machine; 0: no GPU; None: the machine will not do."""
    measures: Callable[[Machine], bool] = lambda machine: False
    """Whether it goes there to find out what it needs."""


class Room:
    """What is free, by machine and by card, while seats are given away."""

    def __init__(self, machines: Sequence[Machine], taken: Iterable[Place]) -> None:
        self.machines = machines
        self.cores = {machine.id: float(machine.cores) for machine in machines}
        self.cards = {machine.id: [1.0] * machine.cards for machine in machines}
        for place in taken:
            for index, node in enumerate(place.nodes):
                if node in self.cores:
                    self._take(node, place.cores, place.cards[index] if place.cards else None, place.part)

    def _take(self, node: str, cores: float, card: int | None, part: float) -> None:
        self.cores[node] -= cores
        if card is not None and card < len(self.cards[node]):
            self.cards[node][card] -= part

    def card(self, node: str, part: float, closed: Collection[Card]) -> int | None:
        """The fullest card with that much room."""
        fitting = [(free, n) for n, free in enumerate(self.cards[node]) if free >= part - DUST and (node, n) not in closed]
        return min(fitting)[1] if fitting else None

    def seat(self, machine: Machine, cores: float, part: float, closed: Collection[Card]) -> Card | None:
        """Give away one process's seat on a machine; the card is -1 where none is asked for."""
        if self.cores[machine.id] < cores - DUST:
            return None
        card = self.card(machine.id, part, closed) if part else -1
        if card is None:
            return None
        self._take(machine.id, cores, card if part else None, part)
        return machine.id, card

    def emptiest(self, machines: Iterable[Machine]) -> list[Machine]:
        """Those with the most free cards first, then the most free cores: trials spread over hosts."""
        return sorted(machines, key=lambda m: (-sum(self.cards[m.id]), -self.cores[m.id]))


def find(
    machines: Sequence[Machine], taken: Iterable[Place], request: Request, closed: Collection[Card] = ()
) -> Place | None:
    """The place for a trial, or None while there is none. Small cards first: large ones are left to those that need them.

    `closed`: cards that are kept free for another trial.
    """
    taken = list(taken)
    for kind in kinds(machines):
        fitting = [m for m in machines if m.kind == kind.kind and m.memory == kind.memory and request.part(m) is not None]
        room = Room(machines, taken)
        seats: list[Card] = []
        for machine in room.emptiest(fitting):
            part = request.part(machine) or 0.0
            while len(seats) < request.processes and (seat := room.seat(machine, request.cores, part, closed)):
                seats.append(seat)
        if len(seats) == request.processes:
            first = next(m for m in fitting if m.id == seats[0][0])
            part = request.part(first) or 0.0
            cards = tuple(card for _, card in seats) if part else ()
            nodes = tuple(node for node, _ in seats)
            return Place(nodes, first.host, first.kind, request.cores, part, cards, request.measures(first))
    return None


def kinds(machines: Sequence[Machine]) -> list[Machine]:
    """One machine of each kind, the one with the least memory on a card first."""
    found = {(machine.kind, machine.memory): machine for machine in machines}
    return sorted(found.values(), key=lambda m: (math.inf if m.memory is None else m.memory, m.kind))


def seats(machines: Sequence[Machine], cores: float, part: float) -> int:
    """How many processes the machines hold at a time when each takes so much."""
    total = 0
    for machine in machines:
        by_cores = int((machine.cores + DUST) // cores)
        total += min(by_cores, machine.cards * int((1 + DUST) // part)) if 0 < part <= 1 else by_cores
    return total


def share(need: float, memory: float) -> float:
    """The part of a card of `memory` bytes that holds a need of `need` bytes; more than 1 when it does not fit."""
    if need > memory:
        return need / memory
    return min(1.0, math.ceil(need * MARGIN / memory * STEPS) / STEPS)
