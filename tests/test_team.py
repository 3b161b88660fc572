"""A study whose trials are trained by two processes each, through Ray: as it should go, and when one process fails alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from medtune.config import StudyConfig, TrialConfig
from medtune.definition import Definition
from medtune.errors import ConfigError
from medtune.reservation import Reservation
from medtune.results import Study, load_study
from medtune.search.conductor import attempt_folder
from medtune.search.space import Real, SearchSpace
from medtune.study import run_study
from medtune.tracking import read_epochs, read_events
from tests.support.faulty_team import FaultyTrial

TRIAL = TrialConfig(
    pair="synthetic",
    image_size=28,
    epochs=3,
    batch_size=16,
    train_limit=32,
    external_limit=16,
    resamples=0,
    checkpoint_seconds=0,
)
SPACE = SearchSpace(lr=Real(low=1e-4, high=1e-2, log=True))


def study(folder: Path) -> Study:
    config = StudyConfig(
        preset="laptop",
        name="team",
        storage=folder,
        trials=2,
        trial=TRIAL,
        processes_per_trial=2,
        first_rung=1.0,
        wandb="off",
    )
    run_study(config, Definition(script="team", space=SPACE), FaultyTrial)
    return load_study("team", folder)


@pytest.mark.parametrize("fault", ["die", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("memory", "error"))])
def test_one_process_of_two_fails(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTY_TEAM", fault)
    monkeypatch.setenv("FAULTY_TEAM_MARK", str(tmp_path / "died"))
    found = study(tmp_path / "studies")
    row, after = found.rows
    wanted = ("FAIL", 1, None) if fault == "error" else ("COMPLETE", 1, 4 if fault == "memory" else 8)
    assert (after.state, after.attempt, after.latest["micro_batch"] if fault != "error" else None) == wanted
    folders = [attempt_folder(found.folder / "trials", 0, n) for n in range(1, row.attempt + 1)]
    if fault == "error":
        assert (row.state, row.cause, row.attempt) == ("FAIL", "ValueError: this process alone", 1)
        return
    assert row.state == "COMPLETE" and row.latest["external"]["external/n"] == 16
    if fault == "die":
        assert (row.attempt, row.faults) == (2, 1)
        assert [line["epoch"] for line in read_epochs(folders[1])] == [2, 3]  # the first epoch's checkpoint was gone on from
    else:  # 16 images are 8 for each process
        assert (row.attempt, row.faults, row.latest["micro_batch"]) == (2, 0, 4)
        assert [event["kind"] for event in read_events(folders[1])] == ["micro_batch"]


def nodes(*machines: tuple[float, float]) -> list[dict[str, object]]:
    return [{"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in machines]


def test_places_are_counted_machine_by_machine() -> None:
    lab = nodes((8, 1), (8, 1), (16, 4))
    assert Reservation.of(StudyConfig(gpus_per_trial=2), 6).slots(lab) == 3  # one of them on two machines
    assert Reservation.of(StudyConfig(gpus_per_trial=0.5), 6).slots(lab) == 12
    assert Reservation.of(StudyConfig(cpus_per_trial=5), 6).slots(lab) == 5  # 3 on the large one
    assert Reservation.of(StudyConfig(processes_per_trial=3), 0).slots(nodes((4, 0))) == 1
    assert Reservation.of(StudyConfig(processes_per_trial=3), 6).gpus == 1.0
    assert Reservation.of(StudyConfig(), 6).slots([{**lab[0], "Alive": False}, lab[1]]) == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (StudyConfig(gpus_per_trial=4), "trial of 4 processes needs as many places .*1 CPU cores and 1 GPU each.* have 2"),
        (StudyConfig(cpus_per_trial=9), "cpus_per_trial is 9, but no machine here has more than 8 CPUs"),
    ],
)
def test_no_room_is_said_at_once(config: StudyConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Reservation.of(config, 2).require_room(nodes((8, 1), (8, 1)))


def test_a_batch_too_small_for_its_processes_is_refused(tmp_path: Path) -> None:
    config = StudyConfig(name="team", storage=tmp_path, processes_per_trial=9, trial=TRIAL)
    with pytest.raises(ConfigError, match="batch_size must be at least 2 for each of a trial's 9 processes, got 16"):
        run_study(config, Definition(script="team", space=SPACE))


@pytest.mark.parametrize("gpus", [0.5, 1, 3])
def test_gpus_and_processes_must_agree(gpus: float) -> None:
    with pytest.raises(ConfigError, match="gpus_per_trial must be 0 or one for each of 2 processes"):
        StudyConfig(processes_per_trial=2, gpus_per_trial=gpus)
