"""What a study took of the machines: trials per GPU, the share of time that GPUs were idle, GPU-hours by model.

`usage.json` in the study's folder adds up over launches. Without GPUs the same is told of CPU cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medtune.placement import Machine, Place
from medtune.record import read_json, write_json

FILE = "usage.json"
UNITS = {"gpu": "GPU", "core": "core"}


class Usage:
    """Counts time while a study runs."""

    def __init__(self, folder: Path, gpus: bool) -> None:
        """`gpus`: whether trials compute on GPUs."""
        self.path = folder / FILE
        self.unit = "gpu" if gpus else "core"
        self.all = read_json(self.path) or {}
        found = self.all.setdefault(self.unit, {"seconds": 0.0, "launches": 0, "machines": {}, "models": {}})
        found["launches"] += 1
        self.found: dict[str, Any] = found

    def count(self, seconds: float, machines: Sequence[Machine], running: Iterable[tuple[int, str, Place]]) -> None:
        """The last `seconds`: machines that were there; number, model and place of each trial that was being trained."""
        running = list(running)
        busy: dict[str, set[tuple[str, int]]] = {}
        cores: dict[str, float] = {}
        for number, model, place in running:
            size = place.part if self.unit == "gpu" else place.cores
            models = self.found["models"]
            models[model] = models.get(model, 0.0) + seconds * size * len(place.nodes)
            for node in dict.fromkeys(place.nodes):
                machine = next((m for m in machines if m.id == node), None)
                if machine is None:
                    continue
                entry = self._entry(machine)
                if number not in entry["trials"]:
                    entry["trials"].append(number)
                busy.setdefault(node, set()).update(card for card in place.on() if card[0] == node)
                cores[node] = cores.get(node, 0.0) + place.cores * place.nodes.count(node)
        self.found["seconds"] += seconds
        for machine in machines:
            have = machine.cards if self.unit == "gpu" else machine.cores
            if have:
                entry = self._entry(machine)
                used = len(busy.get(machine.id, ())) if self.unit == "gpu" else min(have, cores.get(machine.id, 0.0))
                entry["there"] += seconds * have
                entry["busy"] += seconds * used

    def _entry(self, machine: Machine) -> dict[str, Any]:
        """By host, not by Ray's id of it: a machine that left and came back is the same."""
        kind = machine.kind if self.unit == "gpu" else "CPU"
        new = {"host": machine.host, "kind": kind, "units": 0.0, "there": 0.0, "busy": 0.0, "trials": []}
        entry = self.found["machines"].setdefault(f"{machine.host} {kind}", new)
        entry["units"] = machine.cards if self.unit == "gpu" else machine.cores
        return entry

    def save(self) -> None:
        """Write `usage.json`, whole or not at all; a disk that refuses costs these figures, not the study."""
        with contextlib.suppress(OSError):
            write_json(self.path, self.all)


def read_usage(folder: Path) -> dict[str, Any]:
    """The summary as `medtune studies --json` gives it, by unit; empty for a study that was never counted."""
    found = read_json(folder / FILE) or {}
    return {unit: summary(found[unit]) for unit in UNITS if unit in found}


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Hours, idle share and trials, from what was counted."""
    machines = sorted(found["machines"].values(), key=lambda entry: entry["host"])
    there = sum(entry["there"] for entry in machines)
    return {
        "launches": found["launches"],
        "hours": found["seconds"] / 3600,
        "hours_there": there / 3600,
        "idle_share": 1 - sum(entry["busy"] for entry in machines) / there if there else None,
        "hours_by_model": {model: seconds / 3600 for model, seconds in sorted(found["models"].items())},
        "machines": [
            {
                "host": entry["host"],
                "kind": entry["kind"],
                "count": entry["units"],
                "trials": len(entry["trials"]),
                "idle_share": 1 - entry["busy"] / entry["there"] if entry["there"] else None,
            }
            for entry in machines
        ],
    }


def lines(usage: Mapping[str, Any]) -> list[str]:
    """The summary in words, a line or more for each unit."""
    said = []
    for unit, found in usage.items():
        name = UNITS[unit]
        if found["idle_share"] is None:
            continue
        models = ", ".join(f"{model} {_hours(hours)}" for model, hours in found["hours_by_model"].items())
        there = f"{name}-hours: {_hours(found['hours_there'])} there, {found['idle_share']:.0%} idle"
        said.append(f"{there}; by model: {models or 'none'}")
        for machine in found["machines"]:
            idle = "" if machine["idle_share"] is None else f", {machine['idle_share']:.0%} idle"
            count = machine["count"]
            trials = f"{machine['trials']} trial{'s' if machine['trials'] != 1 else ''}"
            if unit == "core":
                said.append(f"  {machine['host']} ({count:g} cores): {trials}{idle}")
                continue
            each = f", {machine['trials'] / count:.1f} per GPU" if count > 1 else ""
            said.append(f"  {machine['host']} ({count:g} x {machine['kind']}): {trials}{each}{idle}")
    return said


def _hours(hours: float) -> str:
    """`12.3`, `0.042`: three digits."""
    return f"{hours:.3g}"
