"""What a running study shows."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from medtune.config import StudyConfig, TrialConfig
from medtune.data import limit, load_pair
from medtune.estimate import expected_epochs
from medtune.progress import Progress, brief, duration, rung_warnings, search_warnings
from medtune.search.ledger import Row
from medtune.search.space import Milestones, SearchSpace


def row(number, state, epoch, value, seconds=10.0, **attrs):
    settings = {"model": "medmamba_t", "lr": 0.00123, "milestones": (1 / 3, 0.5)}
    return Row(number, state, {}, value, epoch, {"settings": settings, "latest": {"seconds": {"1": seconds}}, **attrs})


def progress(rows, width=100, height=20, terminal=True, **settings):
    config = StudyConfig(trials=10, trial=TrialConfig(pair="synthetic", epochs=5, train_limit=64), **settings)
    shown = Progress("s", "folder", config, load_pair("synthetic"))
    shown.console = Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal)
    shown.conductor = SimpleNamespace(
        rows={r.number: r for r in rows},
        live={r.number: r for r in rows if r.state == "RUNNING"},
        minimise=True,
        planned=False,
    )
    return shown


def conductor(*epochs, planned=False, space=None, **more):
    """What Progress asks of a conductor, for trials of these epochs."""
    return SimpleNamespace(space=space or SearchSpace(), planned=planned, epochs=lambda: list(epochs or (5,)), **more)


ROWS = [
    row(0, "COMPLETE", 5, 0.30, 50.0),
    row(1, "PRUNED", 1, 0.10, 10.0),
    row(2, "RUNNING", 3, 0.25, 30.0),
    row(3, "FAIL", 0, None, 1.0, cause="TrainingDiverged: train loss is nan"),
]


def test_summary_counts_states_names_the_best_and_what_was_saved():
    lines = "\n".join(progress(ROWS).summary())
    assert "1 COMPLETE" in lines and "1 PRUNED" in lines and "1 FAIL" in lines and "6 to come" in lines
    assert "best so far: trial 2, val/loss 0.2500" in lines, "a pruned trial is not a candidate"
    assert "stopped early: 4 epochs, about 40 s of computing saved" in lines
    assert "time left" in lines


@pytest.mark.parametrize(("width", "height"), [(40, 12), (100, 24), (200, 60)])
def test_the_table_fits_the_terminal(width, height):
    shown = progress([row(n, "COMPLETE", 5, 0.3) for n in range(100)], width, height)
    text = shown.console.render_lines(shown._table())
    assert len(text) <= height and all(sum(len(part.text) for part in line) <= width for line in text)


def test_one_line_per_change_when_the_output_is_no_terminal():
    shown = progress(ROWS, terminal=False)
    shown._show()
    shown._show()
    said = shown.console.file.getvalue().splitlines()
    assert len(said) == len(ROWS)
    assert "trial   3 FAIL" in said[3] and "train loss is nan" in said[3]
    shown.conductor.rows[2] = row(2, "COMPLETE", 5, 0.2)
    shown._show()
    assert "trial   2 COMPLETE epoch 5 val/loss 0.2000" in shown.console.file.getvalue().splitlines()[-1]


def test_it_says_which_images_and_that_they_are_synthetic():
    shown = progress([], terminal=False)
    shown.begin(conductor(rows={}, first=()), ["trial 3: goes on after epoch 2 of 5"])
    said = shown.console.file.getvalue()
    for words in ("64 class-balanced training images", "SYNTHETIC", "rungs at epochs 1, 2, 4", "goes on after epoch 2"):
        assert words in said
    assert len(limit(shown.data, train_limit=64, external_limit=None).train) == 64


def test_trials_of_different_epochs_are_told_by_their_own():
    rows = [row(0, "PRUNED", 20, 0.3, 40.0), row(1, "PRUNED", 30, 0.2, 30.0), row(2, "RUNNING", 7, 0.1)]
    for one, epochs in zip(rows, (100, 150, 100), strict=True):
        one.settings["epochs"] = epochs
    shown = progress(rows, terminal=False)
    assert "stopped early: 200 epochs, about 5 min of computing saved" in shown.summary()
    shown._show()
    said = shown.console.file.getvalue().splitlines()
    assert "PRUNED epoch 20/100 val/loss" in said[0] and "PRUNED epoch 30/150" in said[1] and "epoch 7/100" in said[2]
    assert any("7/100" in str(cell) for cell in shown._table().renderables[0].columns[2]._cells)
    shown.begin(conductor(150, 100, 100, rows={}, first=()), [])
    said = " ".join(shown.console.file.getvalue().split())
    assert "trials of 100 or 150 epochs" in said
    assert "rungs at epochs 20, 40, 80 (of 100) and 30, 60, 120 (of 150); search by val/loss" in said


def test_a_plan_says_that_it_stops_nothing_and_warns_of_no_search():
    shown = progress([], terminal=False, first_rung=1.0)
    shown.begin(conductor(100, 150, planned=True, rows={}, first=tuple(range(10))), [])
    said = shown.console.file.getvalue()
    assert "10 planned trials of 100 or 150 epochs" in said and "none of them stopped early" in said
    assert "TPE" not in said and "rung" not in said


def test_the_time_left_of_a_plan_counts_its_epochs():
    rows = [row(0, "COMPLETE", 10, 0.3, 100.0), row(1, "RUNNING", 5, 0.3, 50.0)]
    shown = progress(rows)
    shown.conductor = conductor(10, 10, 30, planned=True, rows=dict(enumerate(rows)), live={1: rows[1]}, minimise=True)
    for one in rows:
        one.settings["epochs"] = 10
    assert "time left: about 6 min" in shown.summary()  # 35 epochs of 10 s


def test_the_epochs_expected_of_trials_are_their_own():
    config = StudyConfig()
    assert expected_epochs(config, 100) == 20 + 20 / 2 + 40 / 4 + 20 / 8
    assert expected_epochs(StudyConfig(first_rung=1.0), 100) == 100


def test_a_rung_before_the_learning_rate_drops_is_warned_of():
    late = conductor(150, space=SearchSpace(milestones=Milestones(first=(0.1, 0.9))))
    fine = conductor(150, 100, space=SearchSpace(milestones=Milestones()))
    config = StudyConfig()
    assert "second rung (epoch 60) comes before the latest first milestone (epoch 135)" in rung_warnings(config, late)[0]
    assert rung_warnings(config, fine) == []
    assert rung_warnings(StudyConfig(trial=TrialConfig(schedule="constant")), late) == []


def test_a_search_that_leaves_little_to_tpe_is_warned_of():
    eight = conductor(first=tuple(range(8)))
    assert "TPE proposes only 4 of 12 trials" in search_warnings(StudyConfig(trials=12), eight)[0]
    assert "TPE proposes only 0 of 64" in search_warnings(StudyConfig(random_starts=1000), eight)[0]
    assert search_warnings(StudyConfig(), eight) == []


def test_short_forms():
    assert brief({"lr": 0.0012345, "milestones": (1 / 3, 0.5), "model": "x"}) == "lr=0.00123 milestones=0.333,0.5 model=x"
    assert [duration(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]


def test_a_table_that_takes_long_is_drawn_less_often(monkeypatch):
    shown, clock, drawn = progress([]), [100.0], []
    monkeypatch.setattr("medtune.progress.time.monotonic", lambda: clock[0])

    def draw():
        drawn.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(shown, "_show", draw)
    for _ in range(100):
        shown.tick()
        clock[0] += 0.5
    assert len(drawn) == 3 and drawn[1] - drawn[0] >= 20
