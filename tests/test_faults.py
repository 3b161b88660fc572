"""Studies on a cluster of real processes, some of which are killed: trials go on elsewhere and end as undisturbed ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medtune.config import StudyConfig, TrialConfig
from medtune.definition import Definition
from medtune.results import Study, load_study
from medtune.search.conductor import attempt_folder
from medtune.search.ledger import Row
from medtune.search.plan import plan
from medtune.search.space import SearchSpace
from medtune.study import run_study
from medtune.tracking import read_epochs
from tests.support.cluster import Nodes
from tests.support.tiny_trial import TinyTrial

TRIAL = TrialConfig(
    pair="synthetic", image_size=28, epochs=8, batch_size=16, train_limit=32, external_limit=16, resamples=0
)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("driver")))
        found = Nodes(tmp_path_factory.mktemp("nodes"), patch)
        yield found
        found.down()


def run(storage: Path, during: Callable[[Path], None] | None = None, hold: int | None = None, **settings: Any) -> Study:
    """A study of three planned trials; `during` gets the study's folder and works beside it.

    `hold`: the epoch that is not trained until `during` has it so.
    """
    trial = TRIAL.replace(**settings)
    base = StudyConfig(
        preset="laptop", name="faults", storage=storage, trials=3, trial=trial, first_rung=1.0, wandb="off"
    )
    first = plan([{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)], base.trial, seeds=1)
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            assert during is not None
            during(storage / "faults")
        except BaseException as error:
            failed.append(error)

    if hold is not None:
        (storage / "faults").mkdir()
        (storage / "faults" / "hold").write_text(str(hold))
    helper = threading.Thread(target=beside, daemon=True)
    if during is not None:
        helper.start()
    definition = Definition(script="faults", space=SearchSpace.of(first), first=first, planned=True)
    run_study(base, definition, TinyTrial)
    if during is not None:
        helper.join(60)
    assert not failed, failed
    return load_study("faults", storage)


def figures(study: Study) -> list[Any]:
    """All that a trial came to."""
    return [(row.state, row.epoch, row.value, row.latest["best"], row.latest["external"]) for row in study.rows]


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """What the planned trials come to when nothing happens."""
    nodes.add("one", cpus=2)
    return run(tmp_path_factory.mktemp("undisturbed"))


def wait_for(true: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)
    return found


def epochs(folder: Path, number: int, attempt: int = 1) -> list[int]:
    return [line["epoch"] for line in read_epochs(attempt_folder(folder / "trials", number, attempt))]


def test_nothing_happens(undisturbed: Study, nodes: Nodes) -> None:
    assert [(row.state, row.attempt, row.faults) for row in undisturbed.rows] == [("COMPLETE", 1, 0)] * 3
    (pack,) = (path for path in (nodes.cache("one") / "packs").iterdir() if path.is_dir())
    assert (pack / "about.json").exists(), "the images came to the node"


def trained(folder: Path, last: int) -> bool:
    """Whether each trial's first attempt is through that epoch."""
    return all(epochs(folder, number)[-1:] == [last] for number in range(3))


def one_is_lost(folder: Path) -> bool:
    return sum(row.faults for row in load_study(str(folder)).rows) == 1


def lost_one(study: Study) -> Row:
    """The one trial of three that had to be started again, once or, where it was first sent to a dead node, twice."""
    (again,) = (row for row in study.rows if row.attempt > 1)
    assert [row.faults for row in study.rows] == [int(row is again) for row in study.rows]
    return again


def afterwards(study: Study) -> list[int]:
    """The epochs that it was trained for in its last attempt."""
    row = lost_one(study)
    return epochs(study.folder, row.number, row.attempt)


def losing_one(lose: Callable[[], object]) -> Callable[[Path], None]:
    """What happens beside a study: one of its trials is lost after the third epoch, and then all go on."""

    def beside(folder: Path) -> None:
        wait_for(lambda: trained(folder, 3))
        lose()
        wait_for(lambda: one_is_lost(folder))
        (folder / "hold").unlink()

    return beside


@pytest.mark.slow
def test_a_raylet_is_killed(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("two")
    study = run(tmp_path, losing_one(lambda: nodes.kill_raylet("two")), hold=4, checkpoint_seconds=1000)
    assert figures(study) == figures(undisturbed)
    assert afterwards(study) == list(range(1, 9)), "no checkpoint was due yet"


@pytest.mark.slow
def test_a_trials_process_is_killed(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("three")
    killed: list[int] = []
    study = run(tmp_path, losing_one(lambda: killed.append(nodes.kill_trial("three"))), hold=4, checkpoint_seconds=0)
    assert killed == [1]
    nodes.remove("three")
    assert afterwards(study) == list(range(4, 9)), "of a checkpoint an epoch, nothing is redone"
    assert figures(study) == figures(undisturbed)


@pytest.mark.slow
def test_a_node_is_drained_and_taken_away(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("four")

    def take_away(folder: Path) -> None:
        wait_for(lambda: trained(folder, 3))
        nodes.drain("four", 60)
        time.sleep(3)  # until its process has asked the cluster
        (folder / "hold").write_text("5")
        wait_for(lambda: trained(folder, 4))
        nodes.kill_raylet("four")
        wait_for(lambda: one_is_lost(folder))
        (folder / "hold").unlink()

    study = run(tmp_path, take_away, hold=4, checkpoint_seconds=1000)
    assert figures(study) == figures(undisturbed)
    last = afterwards(study)
    # From the sixth where the old process outlived its raylet by another epoch.
    assert last == list(range(last[0], 9)) and last[0] >= 5, "it was saved though no checkpoint was due"
    assert lost_one(study).attrs["faults_at"][1] == 0, "charged to no budget"
