"""Machines of several kinds under Ray: who runs where, how many on a card, what comes and goes. The GPUs are believed."""

import json
import time
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster

from benchmarks.kill_resume import config
from benchmarks.played import definition, two_families
from medtune import machines, waits
from medtune.errors import ConfigError
from medtune.needs import FOLDER, Needs
from medtune.reservation import request
from medtune.results import load_study
from medtune.study import run_study
from medtune.usage import read_usage
from tests.support.where import HeldTrial, NotedTrial, SmallTrial

GIB = 2**30
KINDS = {"large": ("H100", 80.0 * GIB), "small": ("2080 Ti", 11.0 * GIB)}


class Told(machines.Machines):
    """Knows each machine's GPUs by a resource that the test gave it. Whoever asks for them also turns `meanwhile` on."""

    meanwhile = iter(())

    def __call__(self):
        next(self.meanwhile, None)
        return super().__call__()

    def _ask(self, node):
        have = next(entry["Resources"] for entry in self._nodes() if entry["NodeID"] == node)
        self._gpus[node] = next(gpu for name, gpu in KINDS.items() if name in have)
        return True


class Several:
    """A cluster that machines join and leave."""

    def __init__(self):
        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def join(self, kind, gpus=1):
        node = self.cluster.add_node(num_cpus=4, num_gpus=gpus, resources={kind: 1})
        self.cluster.wait_for_nodes()
        return node

    def leave(self, node):
        self.cluster.remove_node(node, allow_graceful=True)

    def empty(self):
        for node in list(self.cluster.worker_nodes):
            self.leave(node)
        self.cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def head():
    with pytest.MonkeyPatch.context() as patch:
        # Else every study on this machine would attach to the test's cluster.
        patch.setattr("ray._private.utils.write_ray_address", lambda *_: None)
        found = Several()
        yield found
        found.cluster.shutdown()


@pytest.fixture
def several(head, monkeypatch):
    monkeypatch.setattr("medtune.launch.Machines", Told)
    monkeypatch.setenv("RAY_ADDRESS", head.cluster.address)
    monkeypatch.setenv("PLAYED_SECONDS", "0.2")
    yield head
    head.empty()


def where(folder):
    """All notes: (trial, attempt) -> lines."""
    found = {}
    for path in sorted(folder.glob("trials/*/attempt-*/where.jsonl")):
        key = (int(path.parents[1].name), int(path.parent.name.removeprefix("attempt-")))
        found[key] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def together(notes):
    """The most trials that computed at once on one card, by machine and card."""
    most = {}
    lines = [line for lines in notes.values() for line in lines]
    for line in lines:
        card = (line["node"], line["gpus"])
        same = {o["pid"] for o in lines if (o["node"], o["gpus"]) == card and o["begun"] <= line["begun"] < o["ended"]}
        most[card] = max(most.get(card, 0), len(same))
    return most


def processes(notes):
    return {line["pid"] for lines in notes.values() for line in lines}


def need(storage, settings, model, gib):
    trial = settings.trial.replace(model=model)
    Needs(storage / FOLDER).note(trial, {"kind": "H100", "reserved": gib * GIB, "overhead": 0})


@pytest.mark.slow
def test_large_trials_on_large_cards(several, tmp_path):
    large, small = several.join("large"), several.join("small")
    settings = replace(config(tmp_path, 10), name="mixed")
    need(tmp_path, settings, "resnet50", 14)
    need(tmp_path, settings, "medmamba_t", 4)
    folder = run_study(settings, two_families("mixed"), NotedTrial)
    rows = load_study(str(folder)).rows
    assert len(rows) == 10 and {row.state for row in rows} <= {"COMPLETE", "PRUNED"}
    notes = where(folder)
    model = {row.number: row.settings["model"] for row in rows}
    at = {(model[number], line["node"]) for (number, _), lines in notes.items() for line in lines}
    assert ("resnet50", large.node_id) in at and ("resnet50", small.node_id) not in at
    assert ("medmamba_t", small.node_id) in at
    assert max(together(notes).values()) == 1
    usage = read_usage(folder)["gpu"]
    assert sum(machine["trials"] for machine in usage["machines"]) == 10
    assert set(usage["hours_by_model"]) == {"resnet50", "medmamba_t"}


@pytest.mark.slow
def test_each_seat_has_one_process_for_all_its_trials(several, tmp_path):
    """Trials that end while another machine's process is being started leave theirs warm all the same."""
    several.join("large")
    several.join("small")
    folder = run_study(replace(config(tmp_path, 12), name="warm"), definition("warm"), NotedTrial)
    notes = where(folder)
    assert {number for number, _ in notes} == set(range(12))
    assert len(processes(notes)) == 2


@pytest.mark.slow
def test_small_trials_share_a_card_by_what_was_measured(several, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAYED_SECONDS", "1")  # long enough for the others to start meanwhile
    several.join("large")
    settings = replace(config(tmp_path, 6), name="share", share_gpus=True, first_rung=1.0)
    folder = run_study(settings, definition("share"), SmallTrial)
    rows = load_study(str(folder)).rows
    assert [(row.state, row.faults) for row in rows] == [("COMPLETE", 0)] * 6
    notes = where(folder)
    assert len(notes[0, 1]) == 1 and notes[0, 2][0]["epoch"] == 2, "one epoch alone, then goes on"
    assert notes[0, 1][0]["cap"] is None
    assert {line["cap"] for key, lines in notes.items() if key != (0, 1) for line in lines} == {0.27 - 1 / 80}
    assert max(together(notes).values()) == 3
    assert len(processes(notes)) <= 4, "one that measures, three that share, each for several trials"


@pytest.mark.slow
def test_machines_come_and_go(several, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(waits, "AFTER", 1.0)
    first = several.join("large")
    folder = tmp_path / "elastic"
    times, placed = {}, []

    def noted(place):
        placed.append((time.time(), place))
        return request(place)

    monkeypatch.setattr("medtune.launch.request", noted)

    def nodes():
        return [line["node"] for lines in where(folder).values() for line in lines]

    def changes():
        """One joins and has trials within seconds; then the first leaves, the other too, and one comes back."""
        while len(set(nodes())) < 1:
            yield
        second = several.join("large")
        times["joined"] = time.time()
        while second.node_id not in nodes():
            yield
        times["placed"] = min(at for at, place in placed if second.node_id in place.nodes)
        several.leave(first)
        while first.node_id in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            yield
        several.leave(second)
        while "GPU: no machine here has one now" not in capfd.readouterr().out:
            yield
        times["third"] = several.join("large").node_id
        (folder / "go").touch()

    monkeypatch.setattr(Told, "meanwhile", changes())
    # Held, and none stopped early: else the first machine may have done all of it before the second's process is up.
    run_study(replace(config(tmp_path, 6), name="elastic", first_rung=1.0), definition("elastic"), HeldTrial)
    rows = load_study(str(folder)).rows
    assert [row.state for row in rows] == ["COMPLETE"] * 6
    assert times["placed"] - times["joined"] < 10
    assert times["third"] in nodes()


def test_a_request_that_nothing_can_meet_leaves_no_study(several, tmp_path):
    several.join("small")
    settings = replace(config(tmp_path, 2), name="none", gpus_per_trial=2.0)
    with pytest.raises(ConfigError, match=r"a trial of 2 processes needs as many places .* the machines here have 1"):
        run_study(settings, definition("none"), NotedTrial)
    assert not (tmp_path / "none").exists()
