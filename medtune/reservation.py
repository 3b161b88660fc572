"""What a trial reserves of the cluster, and how many trials the cluster holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medtune.config import StudyConfig
from medtune.errors import ConfigError
from medtune.placement import Place


@dataclass(frozen=True)
class Reservation:
    """`processes` places on any nodes, each with `cpus` cores and `gpus` of one GPU, or a whole one."""

    processes: int
    cpus: int
    gpus: float

    @classmethod
    def of(cls, config: StudyConfig, cluster_gpus: float) -> Reservation:
        """What `config` asks for, on a cluster with that many GPUs. Raises ConfigError for numbers that do not fit."""
        gpus = config.gpus_per_trial
        if gpus is None:
            gpus = float(config.processes()) if cluster_gpus else 0.0
        return cls(config.processes(), config.cpus_per_trial, gpus / config.processes() if gpus else 0.0)

    def bundle(self) -> dict[str, float]:
        """One process's part, in Ray's words."""
        return {"CPU": float(self.cpus), **({"GPU": self.gpus} if self.gpus else {})}

    def slots(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        """How many such trials the nodes (`ray.nodes()`) hold at a time."""
        return sum(self._places(node) for node in nodes) // self.processes

    def _places(self, node: Mapping[str, Any]) -> int:
        if not node["Alive"]:
            return 0
        have = node["Resources"]
        places = int(have.get("CPU", 0) // self.cpus)
        return min(places, int(have.get("GPU", 0) / self.gpus + 1e-9)) if self.gpus else places

    def require_room(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """A trial that fits nowhere would wait for ever. Raises ConfigError with what there is."""
        if self.slots(nodes):
            return
        most = {
            name: max((node["Resources"].get(name, 0.0) for node in nodes if node["Alive"]), default=0.0)
            for name in ("CPU", "GPU")
        }
        for setting, asked, name in (("cpus_per_trial", self.cpus, "CPU"), ("gpus_per_trial", self.gpus, "GPU")):
            if asked > most[name]:
                raise ConfigError(
                    f"{setting} is {asked * (self.processes if name == 'GPU' else 1):g}, but no machine here has more than "
                    f"{most[name]:g} {name}s: lower --{setting.replace('_', '-')}, or add a machine that has them"
                )
        places = sum(self._places(node) for node in nodes)
        raise ConfigError(
            f"a trial of {self.processes} processes needs as many places with {self.cpus} CPU cores"
            f"{f' and {self.gpus:g} GPU' if self.gpus else ''} each; the machines here have {places}: "
            "lower --gpus-per-trial or --processes-per-trial, or add machines"
        )


NODE = "ray.io/node-id"
"""Ray's label of a machine."""


def request(place: Place) -> Any:
    """Tune's request for a place. With several processes the trial's own actor takes nothing: it computes nothing.

    Requests of equal places are equal, so that a warm process serves the next trial there.
    """
    from ray.tune import PlacementGroupFactory

    several = len(place.nodes) > 1
    bundle = {"CPU": float(place.cores), **({"GPU": place.part} if place.part else {})}
    bundles = [*([{}] if several else []), *[bundle] * len(place.nodes)]
    selectors = [{NODE: node} for node in place.nodes]
    return PlacementGroupFactory(bundles, strategy="PACK", bundle_label_selector=selectors)
