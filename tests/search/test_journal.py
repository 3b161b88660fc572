"""The ledger's file: several facts in one write, strangers in between, ledgers of earlier versions."""

import json
import os

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from medtune.config import StudyConfig, TrialConfig
from medtune.errors import StudyError
from medtune.search.conductor import Conductor, Report
from medtune.search.journal import DriverJournal
from medtune.search.ledger import Ledger
from medtune.search.space import Real, SearchSpace

SPACE = SearchSpace(lr=Real(low=1e-4, high=1e-2, log=True), gamma=Real(low=0.01, high=0.5))
CONFIG = StudyConfig(trials=4, trial=TrialConfig(epochs=5, pair="synthetic"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.journal"


@pytest.fixture
def ledger(path):
    return Ledger.open(path, "s", "minimize")


@pytest.fixture
def writes(monkeypatch):
    """How often the disk was waited for."""
    seen = []
    monkeypatch.setattr(os, "fsync", seen.append)
    return seen


def as_optuna_reads_it(path):
    """As its dashboard does."""
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))


def test_a_proposal_is_one_write_and_a_report_another(ledger, path, tmp_path, writes):
    conductor = Conductor(ledger, CONFIG, SPACE, tmp_path / "trials")
    ledger.ask(SPACE, CONFIG, None)
    assert len(writes) == 1
    launch = conductor.next_launch()
    writes.clear()
    best = {"val/loss": 0.5}
    conductor.report(Report(number=launch.number, attempt=1, status="running", epoch=1, value=0.5, best=best))
    assert len(writes) == 1
    trial = as_optuna_reads_it(path).trials[launch.number]
    assert trial.intermediate_values == {1: 0.5} and trial.user_attrs["rung:1"]["kept"]
    assert trial.user_attrs["best"] == best


def test_what_is_together_is_read_back_as_from_the_file(ledger, path):
    with ledger.together():
        number = ledger.ask(SPACE, CONFIG, {"lr": 1e-3})
        ledger.note(number, latest={"seconds": {1: 2.0}, "marks": (0.25, 0.5)})
        before = path.read_bytes()
        inside = ledger.row(number)
        assert path.read_bytes() == before, "written before the end"
    assert inside == ledger.row(number) == Ledger.read(path).row(number)
    assert inside.latest == {"seconds": {"1": 2.0}, "marks": [0.25, 0.5]}


def test_the_end_of_a_row_is_on_disk_at_once(ledger, path):
    with ledger.together():
        number = ledger.ask(SPACE, CONFIG, None)
        ledger.finish(number, "FAIL", None, "no reason")
        assert Ledger.read(path).row(number).state == "FAIL"


def test_what_an_exception_left_goes_before_what_follows(ledger, path):
    number = ledger.ask(SPACE, CONFIG, None)
    with pytest.raises(KeyboardInterrupt), ledger.together():
        ledger.note(number, attempt=1)
        raise KeyboardInterrupt
    assert Ledger.read(path).row(number).attempt == 0 and ledger.row(number).attempt == 1
    ledger.note(number, cause="later")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["user_attr"] for line in lines[-2:]] == [{"attempt": 1}, {"cause": "later"}]
    assert Ledger.read(path).row(number) == ledger.row(number)


def test_trials_that_another_process_adds_are_seen_or_refused(ledger, path):
    first = ledger.ask(SPACE, CONFIG, None)
    stranger = as_optuna_reads_it(path)
    stranger.enqueue_trial({"lr": 2e-3})
    assert ledger.ask(SPACE, CONFIG, None) == first + 1
    assert ledger.row(first + 1).params["lr"] == 2e-3
    with pytest.raises(StudyError, match="another process added trials"), ledger.together():
        ledger.note(first, attempt=1)
        stranger.enqueue_trial({"lr": 3e-3})


def test_a_note_of_the_dashboard_does_no_harm(ledger, path):
    number = ledger.ask(SPACE, CONFIG, None)
    stranger = as_optuna_reads_it(path)
    with ledger.together():
        ledger.note(number, attempt=1)
        stranger.set_user_attr("note", "looks good")
    ledger.note(number, cause="none")
    assert ledger.row(number).cause == "none" and Ledger.read(path).row(number).attempt == 1
    assert Ledger.open(path, "s", "minimize").study.user_attrs == {"note": "looks good"}


def test_where_lines_begin_is_not_kept(ledger):
    for _ in range(5):
        ledger.ask(SPACE, CONFIG, None)
    assert isinstance(ledger._journal, DriverJournal) and len(ledger._journal._log_number_offset) == 1


def test_a_trial_of_an_earlier_version_keeps_its_metrics(ledger, path, tmp_path):
    number = ledger.ask(SPACE, CONFIG, None)
    best, external = {"epoch": 1, "val/loss": 0.5}, {"external/auc": 0.9}
    ledger.note(number, attempt=0, latest={"node": "a", "seconds": {}, "best": best, "external": external})
    conductor = Conductor(Ledger.open(path, "s", "minimize"), CONFIG, SPACE, tmp_path / "trials")
    conductor.recover()
    launch = conductor.next_launch()
    conductor.report(Report(number=number, attempt=launch.attempt, status="running", epoch=2, value=0.5, best=best))
    latest = Ledger.read(path).row(number).latest
    assert latest["best"] == best and latest["external"] == external and latest["node"] == "a"


def test_metrics_that_are_not_new_are_not_written_again(ledger, path, tmp_path):
    conductor = Conductor(ledger, CONFIG, SPACE, tmp_path / "trials")
    launch = conductor.next_launch()
    best = {"epoch": 1, "val/loss": 0.5}
    for epoch in (1, 2, 3):
        told = {"best": best, "external": {"external/auc": 0.9} if epoch == 1 else {}}
        conductor.report(Report(number=0, attempt=launch.attempt, status="running", epoch=epoch, value=0.5, **told))
    text = path.read_text()
    assert text.count("val/loss") == 1 and text.count("external/auc") == 1
    assert conductor.rows[0].latest["external"] == {"external/auc": 0.9}
