"""`medtune choose` from finalists that were trained in no time: its words, ties, failures and what it must not look at."""

import html
import json

import pytest

from medtune import cli
from medtune.choose import command
from medtune.choose.deployed import TESTED
from medtune.choose.record import mention, read_choice
from medtune.deploy.source import find
from medtune.errors import StudyError
from medtune.report.page import write
from tests.report.test_report import logits_of
from tests.support.made_stage import MEANS, trained
from tests.support.made_study import MadeStudy

RATES = (1e-3, 1e-2, 3e-4)


def made(folder, rates=RATES, classes=2):
    study = MadeStudy(folder, resamples=50)
    for place, lr in enumerate(rates):
        logits_of(study, study.trial(0.2 + place / 10, lr=lr, external={"external/auc": 0.8}), classes)
    return study


def choose(study, top=3, seeds=3, by=None, threshold=None):
    return command.make(str(study.folder), top, seeds, by, threshold, None, MEANS)


def test_the_clearly_better_is_chosen_and_the_page_and_the_bundle_follow(tmp_path, capsys):
    study = made(tmp_path / "s", RATES[:2])
    trained(study, 3, lambda one: 3.0 if one["lr"] == 1e-2 else 0.5, top=2)
    found = choose(study, top=2)
    assert found["chosen"]["trial"] == 1 and found["ties"] is None, "the search had it second"
    assert [one["rank"] for one in found["finalists"]] == [1, 2] and not found["finalists"][1]["tied"]
    assert set(found["figures"]) == set(TESTED) and found["figures"]["external"]["at_threshold"]["f1"]["low"] is not None
    assert {one["n"] for one in found["correlations"] if one["over"] == "the finalists' runs"} == {6}
    assert cli.main(["choose", str(study.folder), "--top", "2", "--seeds", "3", "--wandb", "off"]) == 0
    said = capsys.readouterr().out
    assert "chosen: trial 1" in said and "worse than the first" in said and "uses external labels" in said
    page = html.unescape(write(study.read(), tmp_path / "r.html").read_text())
    assert "Why: best mean val/loss over 3 fresh seeds" in page and "over the finalists' runs, by " in page
    assert mention(study.read()).startswith("trial 1, val/loss")
    with pytest.raises(StudyError, match="weights of trial 1 of study 's' were not kept"):
        find(study.read(), None, None)  # the run's weights, and no others


@pytest.mark.slow
def test_equal_finalists_are_tied_after_correction_for_all_pairs(tmp_path):
    study = made(tmp_path / "s")
    trained(study, 3, lambda one: 1.0)
    found = choose(study)
    assert [one["tied"] for one in found["finalists"]] == [False, True, True]
    assert "by both tests, over images and over seeds, at p 0.05, corrected for 3 comparisons" in found["ties"]
    assert "though tied: the first by the mean is taken" in found["chosen"]["why"]


def test_one_seed_and_one_finalist_are_said_to_be(tmp_path):
    study = made(tmp_path / "s", RATES[:1])
    trained(study, 1, lambda one: 1.0)
    found = choose(study, seeds=1)
    assert found["chosen"]["why"] == "the only finalist, trained again from 1 fresh seed"
    assert found["ties"] is None and found["finalists"][0]["low"] is None
    assert any(words.startswith("one seed says little") for words in found["cautions"])
    write(study.read(), tmp_path / "r.html")
    two = made(tmp_path / "t", RATES[:2])
    trained(two, 1, lambda one: 1.0)
    assert "by the test over images (a single seed allows none over seeds) at p 0.05" in choose(two, seeds=1)["ties"]


@pytest.mark.slow
def test_seeds_that_failed_are_left_out_and_told_and_a_finalist_without_any_comes_last(tmp_path):
    study = made(tmp_path / "s")
    first = {}

    def strength(one):
        """Of the first rate one seed fails, of the third all do."""
        alone = first.setdefault(one["lr"], one["seed"]) == one["seed"]
        return None if one["lr"] == 3e-4 or (one["lr"] == 1e-3 and alone) else 2.0

    trained(study, 3, strength)
    found = choose(study)
    assert [len(one["runs"]) for one in found["finalists"]][2] == 0 and found["finalists"][2]["trial"] == 2
    told = " ".join(found["cautions"])
    assert "trial 0: 1 of its runs were not trained" in told and "trial 2: 3 of its runs" in told
    write(study.read(), tmp_path / "r.html")
    none = made(tmp_path / "none")
    trained(none, 2, lambda one: None)
    with pytest.raises(StudyError, match="no run of any finalist was trained to the end: TrainingDiverged"):
        choose(none, seeds=2)
    assert read_choice(none.read()) is None


def test_nothing_of_the_choice_follows_from_the_external_set(tmp_path):
    def chosen(folder, external):
        study = made(folder, RATES[:2])
        trained(study, 2, lambda one: 1.5 if one["lr"] == 1e-3 else 1.4, top=2, external=external)
        found = choose(study, top=2, seeds=2)
        keys = ("trial", "mean", "rank", "tied", "p_corrected")
        finalists = [[one[key] for key in keys] for one in found["finalists"]]
        return json.dumps([finalists, found["chosen"], found["threshold"], found["temperature"], found["ties"]])

    same = chosen(tmp_path / "a", lambda one: 3.0 if one["lr"] == 1e-3 else 0.0)
    assert chosen(tmp_path / "b", lambda one: 0.0 if one["lr"] == 1e-3 else 3.0) == same


@pytest.mark.slow
@pytest.mark.parametrize("by", ["val/auc", "external/auc"])
def test_of_three_classes_the_most_probable_is_decided_whatever_it_is_chosen_by(tmp_path, by):
    study = made(tmp_path / "s", RATES[:2], classes=3)
    trained(study, 2, lambda one: 2.0, classes=3)
    found = choose(study, top=2, seeds=2, by=by)
    assert found["threshold"] is None and found["external_labels_used"] == (by == "external/auc")
    assert found["figures"]["val"]["argmax"]["auc"]["value"] > 0.8
    write(study.read(), tmp_path / "r.html")


def test_predictions_that_are_gone_are_named(tmp_path):
    study = made(tmp_path / "s", RATES[:1])
    trained(study, 2, lambda one: 1.0)
    (study.folder / "stages/finalists/trials/0001/attempt-1/predictions.npz").unlink()
    with pytest.raises(StudyError, match=r"run 1 in .* was trained to the end, but its predictions.npz is gone"):
        choose(study, seeds=2)
