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
from medtune.search.plan import plan
from medtune.search.space import SearchSpace
from medtune.study import run_study
from medtune.tracking import read_epochs
from tests.support.cluster import Nodes
from tests.support.tiny_trial import TinyTrial

TRIAL = TrialConfig(
    pair="synthetic", image_size=28, epochs=8, batch_size=16, train_limit=32, external_limit=16, resamples=0
)
EPOCH = 0.6


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_SECONDS", str(EPOCH))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("driver")))
        found = Nodes(tmp_path_factory.mktemp("nodes"), patch)
        yield found
        found.down()


def run(storage: Path, trials: int = 3, during: Callable[[Path], None] | None = None, **settings: Any) -> Study:
    """A study of planned settings, in order; `during` gets the study's folder and works beside it."""
    trial = TRIAL.replace(**settings)
    base = StudyConfig(
        preset="laptop", name="faults", storage=storage, trials=trials, trial=trial, first_rung=1.0, wandb="off"
    )
    first = plan([{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)][:trials], base.trial, seeds=1)
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            assert during is not None
            during(storage / "faults")
        except BaseException as error:
            failed.append(error)

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


def all_train(folder: Path) -> bool:
    return all(len(epochs(folder, number)) >= 2 for number in range(3))


def lost_one(study: Study) -> int:
    """The number of the one trial of three that had to be started again."""
    again = [row.number for row in study.rows if row.attempt > 1]
    assert len(again) == 1 and [row.attempt for row in study.rows].count(2) == 1, [row.attrs for row in study.rows]
    assert [row.faults for row in study.rows] == [int(number == again[0]) for number in range(3)]
    return again[0]


def redone(study: Study, number: int) -> int:
    """Epochs of the first attempt that the second one trained again."""
    return epochs(study.folder, number)[-1] + 1 - epochs(study.folder, number, 2)[0]


def test_a_raylet_is_killed(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("two")

    def power_off(folder: Path) -> None:
        wait_for(lambda: all_train(folder))
        nodes.kill_raylet("two")

    study = run(tmp_path, during=power_off, checkpoint_seconds=2 * EPOCH)
    number = lost_one(study)
    assert figures(study) == figures(undisturbed)
    assert redone(study, number) <= 2, "what takes longer than that was saved"
    assert study.rows[number].faults_here <= 1 and not study.rows[number].errors


def test_a_trials_process_is_killed(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("three")

    def kill(folder: Path) -> None:
        wait_for(lambda: all_train(folder))
        assert nodes.kill_trial("three") == 1

    study = run(tmp_path, during=kill, checkpoint_seconds=0)
    nodes.remove("three")
    assert redone(study, lost_one(study)) == 0, "a checkpoint an epoch"
    assert figures(study) == figures(undisturbed)


def test_a_node_is_drained_and_taken_away(undisturbed: Study, nodes: Nodes, tmp_path: Path) -> None:
    nodes.add("four")
    known: list[list[int]] = []

    def take_away(folder: Path) -> None:
        wait_for(lambda: all_train(folder))
        nodes.drain("four", 30)
        time.sleep(2 * EPOCH + 1)  # one epoch that is being trained, one look at what the cluster says
        known.extend(epochs(folder, number) for number in range(3))
        nodes.kill_raylet("four")

    study = run(tmp_path, during=take_away, checkpoint_seconds=1000)
    number = lost_one(study)
    assert figures(study) == figures(undisturbed)
    assert epochs(study.folder, number, 2)[0] >= known[number][-1], "it was saved though no checkpoint was due"
    assert study.rows[number].attrs["faults_at"][1] == 0, "charged to no budget"
