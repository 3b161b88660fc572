"""The simulated study: every trial is accounted for, and the driver's time is the only thing that GPUs wait for."""

import pytest

from benchmarks.scale import answer_seconds
from benchmarks.simulated import Recorded, Simulation, reopen_seconds
from medtune import cli
from medtune.config import StudyConfig, TrialConfig
from medtune.results import load_study
from medtune.search.space import Choice, Real, SearchSpace

SPACE = SearchSpace(
    model=Choice(options=("medmamba_s", "vim_tiny", "medvit_small")), lr=Real(low=1e-4, high=1e-2, log=True)
)


CONFIG = StudyConfig(trials=40, trial=TrialConfig(epochs=10, pair="synthetic"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A simulated study's folder, the simulation, and its blocks' figures."""
    folder = tmp_path_factory.mktemp("storage") / "simulated"
    folder.mkdir()
    simulation = Simulation(folder, CONFIG, SPACE, 8, Recorded.load(), 30.0)
    return folder, simulation, list(simulation.run(20))


def test_every_simulated_trial_is_in_the_ledger_with_its_curve(simulated):
    folder, simulation, blocks = simulated
    assert [figures["trials"] for figures in blocks] == [20, 40]
    rows = load_study(str(folder)).rows
    assert [row.number for row in rows] == list(range(40))
    assert {row.state for row in rows} == {"COMPLETE", "PRUNED"}
    assert all(row.epoch == 10 if row.state == "COMPLETE" else row.epoch in CONFIG.rungs() for row in rows)
    outcome = simulation.outcome()
    assert 0 <= outcome["idle_share_while_trials_wait"] < outcome["idle_share"] < 1
    epochs = sum(row.epoch for row in rows)
    assert epochs * 10 < 8 * 3600 * outcome["simulated_hours"], "more epochs than the GPUs had time for"
    assert reopen_seconds(folder, CONFIG, SPACE) > 0 and answer_seconds("best", folder) > 0


def test_a_long_table_says_what_a_short_one_does(simulated, monkeypatch, capsys):
    folder, _, _ = simulated
    said = []
    for limit in (1000, 10):
        monkeypatch.setattr(cli, "LONG", limit)
        assert cli.main(["trials", folder.name, "--storage", str(folder.parent)]) == 0
        said.append([line.split() for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1] and len(said[0]) > 40
