"""The study's state machine, driven without Ray: launches, reports, losses, resumes."""

import json

import pytest

from benchmarks.played import FAMILIES, TWO_FAMILIES, curve
from medtune.claim import require_current
from medtune.config import StudyConfig, TrialConfig
from medtune.errors import Superseded
from medtune.placement import Place
from medtune.recipes import report_settings
from medtune.search.asha import keep
from medtune.search.conductor import Conductor, Report, attempt_folder, trial_folder
from medtune.search.ledger import Ledger
from medtune.search.plan import plan
from medtune.search.space import Choice, Real, SearchSpace

SPACE = SearchSpace(lr=Real(low=1e-4, high=1e-2, log=True))


class Bench:
    """A study whose trials are played by hand."""

    def __init__(self, folder, space=SPACE, first=(), planned=False, **settings):
        self.folder = folder
        self.what = {"space": space, "first": first, "planned": planned}
        self.config = StudyConfig(**{"trials": 4, "trial": TrialConfig(epochs=5, pair="synthetic")} | settings)
        self.slots = 2
        self.reopen()

    def reopen(self):
        """As after a kill: nothing but what is on disk."""
        ledger = Ledger.open(self.folder / "ledger.journal", "s", "minimize")
        self.ended = []
        self.conductor = Conductor(
            ledger,
            self.config,
            trials=self.folder / "trials",
            slots=lambda: self.slots,
            on_finish=self.ended.append,
            **self.what,
        )
        return self.conductor.recover()

    def launch(self):
        launch = self.conductor.next_launch()
        assert not isinstance(launch, str), launch
        return launch

    def write(self, report, final=False):
        """What the trial's process does before it reports."""
        folder = attempt_folder(self.folder / "trials", report.number, report.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        if final:
            (folder / "final.json").write_text(json.dumps(report.to_dict()))
        else:
            with open(folder / "epochs.jsonl", "a") as file:
                file.write(json.dumps({"epoch": report.epoch, "report": report.to_dict()}) + "\n")

    def rows(self):
        return Ledger.read(self.folder / "ledger.journal").rows()

    def state(self, number):
        return Ledger.read(self.folder / "ledger.journal").rows()[number].state

    def run(self, launch, values, start=1):
        """Report these values epoch by epoch until stopped; returns epochs done."""
        for epoch, value in enumerate(values, start):
            last = epoch == self.config.trial.epochs
            if not self.conductor.report(say(launch, epoch, value, "complete" if last else "running")):
                return epoch
        return start + len(values) - 1


def say(launch, epoch, value, status="running", **more):
    return Report(number=launch.number, attempt=launch.attempt, status=status, epoch=epoch, value=value, **more)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_never_more_at_a_time_than_slots_nor_more_trials_than_asked(bench):
    launches = [bench.launch(), bench.launch()]
    assert bench.conductor.next_launch() == "later"
    for _ in range(bench.config.trials):
        bench.run(launches.pop(0), [0.5] * 5)
        following = bench.conductor.next_launch()
        if not isinstance(following, str):
            launches.append(following)
    assert bench.conductor.next_launch() == "done"
    assert len(bench.conductor.rows) == bench.config.trials


def test_a_row_is_in_the_ledger_before_the_launch(bench):
    launch = bench.launch()
    row = Ledger.read(bench.folder / "ledger.journal").rows()[launch.number]
    assert (row.state, row.attempt) == ("RUNNING", 1)
    assert row.settings["lr"] == launch.config.lr


def test_rungs_prune_at_their_step_and_the_rest_complete(bench):
    first, second = bench.launch(), bench.launch()
    assert bench.run(first, [0.5, 0.4, 0.4, 0.4, 0.3]) == 5
    assert bench.run(second, [0.6, 0.1]) == 1  # worse than the first at rung 1; what came later is never seen
    rows = Ledger.read(bench.folder / "ledger.journal").rows()
    assert [(r.state, r.epoch, r.value) for r in rows] == [("COMPLETE", 5, 0.3), ("PRUNED", 1, 0.6)]
    assert [r.number for r in bench.ended] == [0, 1]


def test_a_failure_has_its_cause_and_no_value(bench):
    launch = bench.launch()
    assert not bench.conductor.report(say(launch, 1, None, "fail", cause="TrainingDiverged: loss is nan"))
    row = bench.conductor.rows[0]
    assert (row.state, row.cause, row.value) == ("FAIL", "TrainingDiverged: loss is nan", None)


def test_reports_of_another_attempt_are_refused(bench):
    old = bench.launch()
    bench.conductor.lost(old, "gone")
    new = bench.launch()
    assert (new.number, new.attempt) == (old.number, 2)
    assert not bench.conductor.report(say(old, 5, 0.0, "complete"))
    assert bench.state(0) == "RUNNING"
    bench.run(new, [0.5] * 5)
    assert bench.conductor.rows[0].value == 0.5


def test_machine_faults_have_their_own_budget(tmp_path):
    bench = Bench(tmp_path, machine_faults=2, trials=1)
    for _ in range(3):
        bench.conductor.lost(bench.launch(), "node died")
    row = bench.conductor.rows[0]
    assert row.state == "FAIL" and "died 3 times, last: node died" in row.cause
    assert bench.conductor.next_launch() == "done"


def test_killed_driver_goes_on_with_the_same_trials(bench):
    first, second = bench.launch(), bench.launch()
    bench.conductor.report(say(first, 1, 0.5))
    settings = [bench.conductor.rows[n].settings for n in (0, 1)]
    notes = bench.reopen()
    assert len(notes) == 2
    again = [bench.launch(), bench.launch()]
    assert [(a.number, a.attempt) for a in again] == [(0, 2), (1, 2)]
    assert [a.config for a in again] == [first.config, second.config]
    assert [bench.conductor.rows[n].settings for n in (0, 1)] == settings


def test_a_result_written_but_not_heard_counts_once(bench):
    launch = bench.launch()
    for epoch in range(1, 5):
        report = say(launch, epoch, 0.5)
        bench.write(report)
        bench.conductor.report(report)
    bench.write(say(launch, 5, 0.4, "complete"), final=True)
    bench.reopen()
    assert bench.conductor.rows[0].state == "COMPLETE" and bench.conductor.rows[0].value == 0.4
    assert bench.launch().number == 1, "the finished trial is not run twice"


def test_epochs_written_but_not_heard_pass_through_their_rungs(bench):
    good, poor = bench.launch(), bench.launch()
    bench.run(good, [0.1, 0.1])
    bench.write(say(poor, 1, 0.9))
    bench.reopen()
    assert bench.state(poor.number) == "PRUNED"


def test_an_older_attempts_folder_is_not_heard(bench):
    old = bench.launch()
    bench.conductor.lost(old, "gone")
    bench.launch()
    bench.write(say(old, 5, 0.0, "complete"), final=True)
    bench.reopen()
    assert bench.state(0) == "RUNNING"


def test_rungs_are_rebuilt_from_the_ledger(tmp_path):
    values = [0.5, 0.6, 0.4, 0.45, 0.3, 0.7, 0.2, 0.35]

    def outcome(folder, interrupt):
        folder.mkdir()
        bench = Bench(folder, trials=len(values))
        bench.slots = 1
        for value in values:
            bench.run(bench.launch(), [value] * 5)
            if interrupt:
                bench.reopen()
        return [(r.state, r.epoch, r.params) for r in Ledger.read(folder / "ledger.journal").rows()]

    straight = outcome(tmp_path / "a", False)
    assert straight == outcome(tmp_path / "b", True)
    assert {"PRUNED", "COMPLETE"} == {state for state, *_ in straight}


@pytest.mark.parametrize("selection", ["val/loss", "val/auc"])
def test_the_ranking_is_that_of_the_rows_resumed_or_not(tmp_path, selection):
    values = [0.5, 0.3, 0.3, 0.9, 0.1]
    bench = Bench(tmp_path, trials=5, first_rung=1.0, trial=TrialConfig(epochs=1, pair="synthetic", selection=selection))
    for value in values:
        bench.conductor.report(say(bench.launch(), 1, value, "complete"))
    sign = 1 if selection == "val/loss" else -1
    wanted = sorted(range(5), key=lambda number: (sign * values[number], number))
    assert [number for _, number in bench.conductor.ranking] == wanted
    bench.reopen()
    assert [number for _, number in bench.conductor.ranking] == wanted


def test_a_decision_made_before_the_kill_stands(bench):
    good, poor = bench.launch(), bench.launch()
    bench.run(good, [0.1])
    bench.conductor.ledger.record_epoch(poor.number, 1, 0.9)
    bench.conductor.ledger.record_rung(poor.number, 1, 0.9, False, index=0, order=1)  # killed before the row was ended
    bench.reopen()
    assert bench.state(poor.number) == "PRUNED"


def test_a_rung_that_was_reached_but_not_decided_is_decided_on_resume(bench):
    good, poor = bench.launch(), bench.launch()
    bench.run(good, [0.1])
    bench.write(say(poor, 1, 0.9))
    bench.conductor.ledger.record_epoch(poor.number, 1, 0.9)  # killed between the epoch and the decision
    bench.reopen()
    assert bench.state(poor.number) == "PRUNED"


def test_killed_while_asking_leaves_no_zombie(bench):
    bench.conductor.ledger.study.ask()  # a row without settings, as when the driver dies inside ask
    bench.reopen()
    launch = bench.launch()
    assert launch.number == 0 and 1e-4 <= launch.config.lr <= 1e-2


def test_a_torn_last_line_of_the_ledger_is_dropped(bench):
    bench.run(bench.launch(), [0.5] * 5)
    path = bench.folder / "ledger.journal"
    with open(path, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    bench.reopen()
    assert bench.conductor.rows[0].state == "COMPLETE"
    bench.run(bench.launch(), [0.5])
    assert len(Ledger.read(path).rows()) == 2


def test_settings_to_try_first_come_first_and_only_once(bench):
    bench.conductor.first = ({"lr": 1e-3}, {"lr": 2e-3})
    assert bench.launch().config.lr == 1e-3
    bench.reopen()
    bench.conductor.first = ({"lr": 1e-3}, {"lr": 2e-3})
    assert [bench.launch().config.lr, bench.launch().config.lr] == [1e-3, 2e-3]


def test_each_trial_has_a_seed_of_its_own(bench):
    assert bench.launch().config.seed != bench.launch().config.seed


def test_undefined_metric_in_every_epoch_is_a_failure(bench):
    launch = bench.launch()
    bench.conductor.report(say(launch, 5, None, "complete"))
    assert bench.conductor.rows[0].state == "FAIL" and "undefined" in bench.conductor.rows[0].cause


def play(bench, killed):
    """Run the study to its end along `curve`, one trial at a time; `killed`: the driver, before and after each report."""
    bench.slots = 1
    while not isinstance(launch := bench.conductor.next_launch(), str):
        epoch, goes_on = bench.conductor.rows[launch.number].epoch, True
        while goes_on:
            epoch += 1
            last = epoch == launch.config.epochs
            report = say(launch, epoch, curve(launch.config, epoch), "complete" if last else "running")
            bench.write(report, final=last)
            if killed:
                bench.reopen()
                break
            goes_on = bench.conductor.report(report)
    return [(row.state, row.epoch, row.value, row.settings) for row in bench.rows()]


def two_families(folder, **settings):
    folder.mkdir()
    return Bench(folder, TWO_FAMILIES, **{"trials": 12} | settings)


def test_each_trial_is_stopped_at_rungs_of_its_own_epochs(tmp_path):
    bench = two_families(tmp_path / "a")
    play(bench, killed=False)
    rungs = {model: bench.config.rungs(epochs) for model, epochs in FAMILIES.items()}
    assert len(set(rungs.values())) == 2
    pruned = [row for row in bench.rows() if row.state == "PRUNED"]
    assert {row.settings["model"] for row in pruned} == set(FAMILIES)
    for row in bench.rows():
        own = rungs[row.settings["model"]]
        assert row.settings["epochs"] == FAMILIES[row.settings["model"]]
        assert row.epoch in own if row.state == "PRUNED" else row.epoch == row.settings["epochs"]
        assert [epoch for epoch in range(1, 8) if row.rung(epoch)] == [epoch for epoch in own if epoch <= row.epoch]


def test_trials_of_other_epochs_compete_at_the_same_rung(tmp_path):
    bench = two_families(tmp_path / "a")
    play(bench, killed=False)
    for index in range(3):
        records = [row.rung(bench.config.rungs(row.settings["epochs"])[index]) for row in bench.rows()]
        records = sorted((record for record in records if record), key=lambda record: record["order"])
        assert [(record["index"], record["order"]) for record in records] == [(index, n) for n in range(len(records))]
        seen = []
        for record in records:
            assert record["kept"] == keep(record["value"], seen, 2, minimise=True)
            seen.append(record["value"])


def test_killed_at_every_epoch_a_study_of_two_families_ends_as_an_uninterrupted_one(tmp_path):
    straight = play(two_families(tmp_path / "a"), killed=False)
    assert straight == play(two_families(tmp_path / "b"), killed=True)
    assert {"PRUNED", "COMPLETE"} == {state for state, *_ in straight}


def test_what_is_left_of_a_trial_is_told_in_its_own_epochs(tmp_path):
    bench = two_families(tmp_path / "a")
    launch = bench.launch()
    bench.conductor.report(say(launch, 1, 0.5))
    assert bench.reopen() == [f"trial 0: goes on after epoch 1 of {FAMILIES[launch.config.model]}"]


def planned(folder, seeds, models=("medmamba_s", "resnet50"), **settings):
    settings_of = [one for one in report_settings(False) if one["model"] in models]
    first = plan(settings_of, TrialConfig(pair="synthetic"), seeds=seeds)
    base = {"trials": len(first), "trial": TrialConfig(pair="synthetic"), "first_rung": 1.0}
    return Bench(folder, SearchSpace.of(first), first, True, **base | settings)


def test_a_plan_is_trained_in_order_with_every_setting_as_planned(tmp_path):
    bench = planned(tmp_path, seeds=2)
    bench.slots = 1
    trained = []
    while not isinstance(launch := bench.conductor.next_launch(), str):
        trained.append(launch.config)
        assert not bench.conductor.report(say(launch, launch.config.epochs, 0.5, "complete"))
    assert trained == [TrialConfig(pair="synthetic").replace(**settings) for settings in bench.what["first"]]
    assert {row.state for row in bench.rows()} == {"COMPLETE"}


def test_a_plan_killed_while_asking_goes_on_with_the_same_settings(tmp_path):
    bench = planned(tmp_path, seeds=1)
    first = bench.launch()
    bench.launch()
    path = bench.folder / "ledger.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    settled = max(i for i, line in enumerate(lines) if b'"settings"' in line)
    path.write_bytes(b"".join(lines[:settled]))
    assert bench.rows()[1].params and bench.rows()[1].settings is None
    assert bench.reopen() and len(bench.rows()) == 2
    again = [bench.launch().config for _ in range(2)]
    wanted = [TrialConfig(pair="synthetic").replace(**settings) for settings in bench.what["first"][:2]]
    assert again == wanted and first.config == wanted[0]


def test_more_seeds_go_on_where_fewer_ended(tmp_path):
    bench = planned(tmp_path, seeds=1, trials=3)
    while not isinstance(launch := bench.conductor.next_launch(), str):
        bench.conductor.report(say(launch, launch.config.epochs, 0.5, "complete"))
    assert len(bench.rows()) == 3
    more = planned(tmp_path, seeds=2)
    while not isinstance(launch := more.conductor.next_launch(), str):
        more.conductor.report(say(launch, launch.config.epochs, 0.5, "complete"))
    found = [row.settings for row in more.rows()]
    assert found == [json.loads(json.dumps(settings)) for settings in more.what["first"]]
    assert [settings["seed"] for settings in found] == [0] * 9 + [1] * 9


def test_the_dashboard_sees_what_is_planned(tmp_path):
    bench = planned(tmp_path, seeds=1)
    bench.launch()
    params = bench.rows()[0].params
    assert params["model"] == "medmamba_s" and params["lr"] == 1e-3 and params["milestones"] == f"[{1 / 3}, 0.5]"


def test_machines_that_come_and_go_exhaust_no_budget_while_the_trial_gets_on(tmp_path):
    bench = Bench(tmp_path, machine_faults=1, trials=1)
    for epoch in range(1, 5):
        launch = bench.launch()
        bench.conductor.report(say(launch, epoch, 0.5))
        bench.conductor.lost(launch, "spot node gone")
        bench.reopen()
    assert (bench.rows()[0].state, bench.rows()[0].faults, bench.rows()[0].faults_here) == ("RUNNING", 4, 1)
    launch = bench.launch()
    bench.conductor.report(say(launch, 4, 0.5))  # again, from the checkpoint: no further than before
    bench.conductor.lost(launch, "spot node gone")
    row = bench.rows()[0]
    assert row.state == "FAIL" and "died 2 times without getting past epoch 4, last: spot node gone" in row.cause


def test_a_machine_taken_away_with_notice_is_charged_to_no_budget(tmp_path):
    bench = Bench(tmp_path, machine_faults=0, trials=1)
    for _ in range(2):
        bench.conductor.lost(bench.launch(), "drained", announced=True)
    launch = bench.launch()
    bench.conductor.report(say(launch, 1, 0.5, leaving=True))
    bench.conductor.lost(launch, "gone, as its process had said")
    bench.run(bench.launch(), [0.5] * 5)
    row = bench.rows()[0]
    assert (row.state, row.faults, row.errors, row.attempt) == ("COMPLETE", 3, {}, 4)


def fail(launch, cause, epoch=1, **more):
    return say(launch, epoch, None, "fail", cause=cause, **more)


def test_a_trials_own_errors_have_a_budget_of_their_own(tmp_path):
    bench = Bench(tmp_path, retries=2, machine_faults=0, trials=2)
    for n in range(2):
        assert not bench.conductor.report(fail(bench.launch(), f"OSError: {n}"))
    assert (bench.state(0), bench.rows()[0].errors) == ("RUNNING", {"1": "OSError: 0", "2": "OSError: 1"})
    launch = bench.launch()
    assert (launch.number, launch.attempt) == (0, 3), "before any other trial"
    bench.conductor.report(fail(launch, "OSError: 2"))
    assert (bench.state(0), bench.rows()[0].cause, bench.rows()[0].faults) == ("FAIL", "OSError: 2", 0)


def test_what_would_come_again_is_not_tried_again(tmp_path):
    bench = Bench(tmp_path, retries=2)
    bench.conductor.report(fail(bench.launch(), "TrainingDiverged: train loss is nan", repeats=True))
    assert bench.state(0) == "FAIL"


@pytest.mark.parametrize("heard", [True, False])
def test_an_error_that_was_written_down_is_charged_once_however_the_driver_ends(tmp_path, heard):
    bench = Bench(tmp_path, retries=1, trials=1)
    report = fail(bench.launch(), "OSError: once")
    bench.write(report, final=True)
    if heard:
        bench.conductor.report(report)
    for _ in range(2):
        bench.reopen()
        assert bench.rows()[0].errors == {"1": "OSError: once"} and bench.conductor.waiting == [0]
    again = bench.launch()
    assert again.attempt == 2 and bench.conductor.waiting == []
    bench.write(fail(again, "OSError: twice"), final=True)
    bench.conductor.lost(again, "and died")  # what it wrote down counts
    assert bench.conductor.next_launch() == "done"
    assert (bench.state(0), bench.rows()[0].cause) == ("FAIL", "OSError: twice")


def test_the_study_gives_up_when_the_first_trials_all_fail_alike(tmp_path):
    bench = Bench(tmp_path, trials=20, alike_failures=3)
    for n in range(3):
        assert bench.conductor.hopeless is None
        cause = f"OutOfMemory: medmamba_s at 224 px does not fit, {10 + n} images, /data/{n}.npz, 0x7f{n}abcdef0"
        bench.conductor.report(fail(bench.launch(), cause))
    assert "first 3 trials that ended all failed alike" in bench.conductor.hopeless
    assert "12 images" in bench.conductor.hopeless and bench.conductor.next_launch() == "done"
    bench.reopen()  # the same command again: three more are tried
    assert bench.conductor.hopeless is None
    for _ in range(3):
        bench.conductor.report(fail(bench.launch(), "DataError: no such file"))
    assert bench.conductor.hopeless and len(bench.rows()) == 6


@pytest.mark.parametrize("enough", [0, 3])
def test_trials_that_do_not_fail_alike_stop_nothing(tmp_path, enough):
    bench = Bench(tmp_path, trials=20, alike_failures=enough)
    if enough:
        bench.run(bench.launch(), [0.5] * 5)
    for _ in range(6):
        bench.conductor.report(fail(bench.launch(), "ValueError: the same"))
    assert bench.conductor.hopeless is None


def test_failures_that_differ_stop_nothing(tmp_path):
    other = Bench(tmp_path, trials=20, alike_failures=3)
    for what in "abcabc":
        other.conductor.report(fail(other.launch(), f"ValueError: {what}"))
    assert other.conductor.hopeless is None


def test_the_current_attempt_is_left_for_its_processes_to_see(bench):
    old = bench.launch()
    folder = trial_folder(bench.folder / "trials", old.number)
    require_current(folder, 1)
    bench.conductor.lost(old, "cut off")
    require_current(folder, 1)  # nobody else is at it yet
    new = bench.launch()
    require_current(folder, new.attempt)
    with pytest.raises(Superseded, match="attempt 1 goes on elsewhere as attempt 2"):
        require_current(folder, old.attempt)
    (folder / "current.json").write_text("{torn")
    require_current(folder, old.attempt)  # decides nothing


class OneKind:
    """Places only trials of one model, `room` of them at a time."""

    def __init__(self, conductor, model, room=1):
        self.conductor, self.model, self.room, self.moving = conductor, model, room, False

    def place(self, number, config):
        fits = config.model == self.model and len(self.conductor.live) < self.room
        return Place(("a",), "a", "GPU", 1) if fits else None

    def moves(self, launch, report):
        return self.moving


def test_a_trial_that_has_no_place_waits_and_others_go_before_it(tmp_path):
    settings = [{"model": "resnet50"}, {"model": "medmamba_t"}, {"model": "resnet50"}, {"model": "resnet50"}]
    space = SearchSpace(model=Choice(options=("resnet50", "medmamba_t")))
    bench = Bench(tmp_path, space, settings, True, first_rung=1.0)
    bench.conductor.placing = OneKind(bench.conductor, "medmamba_t")
    assert bench.launch().number == 1
    assert bench.conductor.next_launch() == "later"
    assert bench.conductor.waiting == [0, 2] and len(bench.conductor.rows) == 3, "two for the free place, and no more"
    bench.conductor.placing.model, bench.conductor.placing.room = "resnet50", 2
    launch = bench.launch()
    assert (launch.number, launch.attempt, launch.place.host) == (0, 1, "a")
    bench.reopen()
    assert bench.conductor.waiting == [0, 1, 2], "none is forgotten when the driver is killed"


def test_a_trial_that_moves_goes_on_as_it_is_in_another_attempt(bench):
    launch = bench.launch()
    bench.conductor.placing = OneKind(bench.conductor, launch.config.model)
    bench.conductor.placing.moving = True
    assert not bench.conductor.report(say(launch, 1, 0.5))
    again = bench.launch()
    assert (again.number, again.attempt, again.micro_batch) == (0, 2, None)
    assert not bench.conductor.report(say(again, 0, None, "out_of_memory", micro_batch=8))
    assert bench.launch().micro_batch is None, "where there is more room nothing is halved"
    assert bench.conductor.rows[0].faults == 0 and bench.conductor.rows[0].epoch == 1


def test_what_was_not_started_is_taken_back_at_no_charge(bench):
    launch = bench.launch()
    bench.conductor.take_back(launch)
    again = bench.launch()
    assert (again.number, again.attempt) == (0, 2) and bench.conductor.rows[0].faults == 0
    bench.conductor.take_back(launch)
    assert bench.conductor.live[0] == again, "an attempt that is no longer current is not"
