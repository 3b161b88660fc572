"""Two raylets in one machine, one with another package: asked, refused before any trial, left out when it joins late."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from medtune import cli
from medtune.cluster import facts
from medtune.cluster.findings import diagnose
from medtune.cluster.nodes import ask, here
from medtune.cluster.preflight import preflight
from medtune.cluster.roster import Roster
from medtune.errors import StudyError
from tests.support.two_nodes import Cluster, private_cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def stale(folder: Path) -> Path:
    """A copy of the package in which one file was not renewed."""
    shutil.copytree(ROOT / "medtune", folder / "stale" / "medtune", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "stale" / "medtune" / "trial.py").open("a") as file:
        file.write("# as it was last week\n")
    return folder / "stale"


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A head with this package; the driver sits where there is none, or Ray would hand its folder to all nodes."""
    with pytest.MonkeyPatch.context() as patch, private_cluster(num_cpus=1, env_vars={"PYTHONPATH": str(ROOT)}) as cluster:
        patch.setenv("RAY_ADDRESS", cluster.address)
        patch.setenv("WANDB_MODE", "offline")
        patch.chdir(folder)
        yield cluster


@pytest.fixture
def attached(cluster: Cluster) -> Iterator[Cluster]:
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


def test_a_node_alone_costs_no_look(attached: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("medtune.cluster.preflight.ask", lambda *_: pytest.fail("asked"))
    roster = preflight(str(folder), lambda line: pytest.fail(line))
    assert [node["NodeID"] for node in roster.fit_nodes()] == [attached.head_node.node_id]


def test_facts_of_a_node_are_those_of_the_machine(attached: Cluster, folder: Path):
    [node] = ask(ray.nodes(), str(folder))
    mine = facts.gather(str(folder))
    same = ("hostname", "python", "packages", "medtune", "torch_cuda", "gpus", "kernels")
    assert {name: node.facts[name] for name in same} == {name: mine[name] for name in same}
    assert diagnose([node], here()) == []
    assert node.storage_seen and node.facts["storage"]["read"]
    least, most = node.skew
    assert least <= 0 <= most < 5
    assert not list(folder.glob(".doctor-*")), "nothing is left in the storage folder"


def test_a_late_joiner_with_stale_code_takes_no_trials_until_it_is_renewed(
    attached: Cluster, folder: Path, stale: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medtune.cluster.roster.AGAIN", 0.5)
    said: list[str] = []
    roster = Roster([attached.head_node.node_id], storage=str(folder), say=said.append)
    joined = attached.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(stale)})

    def until(true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not true() and time.monotonic() < deadline:
            roster.fit_nodes()
            time.sleep(0.05)

    try:
        until(lambda: said)
        assert len(roster.fit_nodes()) == 1
        assert "has joined and takes no trials until this is mended" in said[0]
        assert "trial.py differs" in said[1] and "ray up --no-restart cluster.yaml" in said[1]
        shutil.copy(ROOT / "medtune" / "trial.py", stale / "medtune")
        until(lambda: len(roster.fit_nodes()) == 2)
        assert {node["NodeID"] for node in roster.fit_nodes()} == {attached.head_node.node_id, joined.node_id}
        assert len(said) == 2, "named once"
        roster.close()
    finally:
        attached.remove_node(joined)


def test_preflight_and_doctor_name_the_node_and_what_differs(
    cluster: Cluster, folder: Path, stale: Path, capsys: pytest.CaptureFixture[str]
):
    (stale / "medtune" / "added.py").touch()
    joined = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(stale)})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        with pytest.raises(StudyError, match=r"nothing was started\nerror: .*added.py differs"):
            preflight(str(folder), lambda line: None)
        ray.shutdown()
        assert cli.main(["doctor", "--cluster", "--storage", str(folder), "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert [finding["severity"] for finding in told["findings"]] == ["error"]
        assert len(told["nodes"]) == 2 and not ray.is_initialized()
        assert cli.main(["doctor", "--cluster", "--storage", str(folder)]) == 1
        assert "1 thing to mend before a study can begin" in capsys.readouterr().out
    finally:
        ray.shutdown()
        cluster.remove_node(joined)
