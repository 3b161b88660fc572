"""`medtune report`: the page's words, tables and plots say what the ledger, the logits and the choice say."""

import base64
import html
import json
import re
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from medtune import cli, predictions
from medtune.choose.hindsight import RUNS, correlations
from medtune.errors import StudyError
from medtune.metrics import classification, intervals, softmax
from medtune.predictions import Predicted
from medtune.record import write_json
from medtune.report.effort import computing
from medtune.report.finalists import GRID, roc_band
from medtune.report.keep import kept_up
from medtune.report.page import sections, write
from medtune.report.parts import Plot, Table, Words
from medtune.report.source import read_source
from medtune.report.space import ENOUGH, forests, head_lines
from medtune.results import predicted, print_outcome, rank, sheets_folder
from medtune.search.conductor import attempt_folder
from medtune.storage.home import Home
from tests.support.made_study import MadeStudy, figure


def logits_of(made, number, classes=2, seed=0):
    """Put down a trial's logits: 60 images a split, better than chance."""
    rng = np.random.default_rng([seed, number])
    labels = np.arange(60) % classes
    values = rng.normal(0, 1, (60, classes)) + 1.2 * np.eye(classes)[labels]
    found = Predicted(values.astype(np.float32), labels.astype(np.int64))
    folder = attempt_folder(made.folder / "trials", number, 1)
    predictions.write(folder, dict.fromkeys(("val", "test", "external", "external_matched"), found))
    return found


@pytest.fixture
def made(tmp_path):
    """Three trials trained to the end, one stopped, one failed."""
    study = MadeStudy(tmp_path / "made")
    for level, auc, lr in ((0.3, 0.8, 1e-3), (0.2, 0.9, 1e-2), (0.4, 0.7, 3e-4)):
        tested = {"external/auc": auc, "external/auc/low": auc - 0.1, "external/auc/high": auc + 0.1, "external/oa": auc}
        logits_of(study, study.trial(level, external={**tested, "external/n": 60}, lr=lr))
    study.trial(0.5, state="PRUNED", epochs=2, external={"external/auc": 0.6, "external/oa": 0.5})
    study.trial(0.6, state="FAIL", epochs=1)
    return study


def parts(study, kind):
    source = read_source(study)
    return [block for section in sections(source) for block in section.blocks if isinstance(block, kind)]


def plot(study, id):
    return next(block for block in parts(study, Plot) if block.id == id)


def words(study):
    return "\n".join(block.text for block in parts(study, Words))


def trace(found, name):
    return next(one for one in found.data if one.get("name", "").startswith(name))


def test_every_plot_is_one_that_plotly_knows(made):
    plots = parts(made.read(), Plot)
    assert len(plots) == 9 and len({one.id for one in plots}) == 9
    for one in plots:
        go.Figure(one.json)  # raises for a property that does not exist
        assert one.shows.endswith(".") and one.caution.endswith(".")


def test_the_answer_is_what_medtune_best_answers_and_says_that_it_was_trained_once(made):
    study = made.read()
    first = sections(read_source(study))[0].blocks
    assert first[0].text.startswith("Trial 1: model=medmamba_s optimizer=adam lr=0.01")
    assert f"val/loss = {figure(0.2, 1, 'val/loss'):.4f}" in first[1].text
    assert "medtune choose made" in first[2].text and first[2].kind == "loud"
    said = words(study)
    assert "not CPN X-ray, but elsewhere" in said and "not audited" in said and "Few trials: 3" in said


def test_generated_images_are_marked_first(made):
    study = made.read()
    study.record["synthetic"] = True
    loud = [block.text for block in sections(read_source(study))[0].blocks if getattr(block, "kind", "") == "loud"]
    assert "SYNTHETIC" in loud[1] and "audited" not in words(study)


def test_the_table_of_trials_is_the_ledger_and_the_best_comes_first(made):
    study = made.read()
    rows = next(table for table in parts(study, Table) if table.sortable).rows
    assert [row[0] for row in rows] == ["1", "0", "2", "3", "4"]
    by_number = {str(row.number): row for row in study.rows}
    for number, state, epochs, value, auc, *_ in rows:
        row = by_number[number]
        assert (state, epochs, value) == (row.state, f"{row.epoch}/4", f"{row.value:.4f}")
        expected = row.latest["external"].get("external/auc")
        assert auc == ("-" if expected is None else f"{expected:.4f}")
    assert rows[-1][-1] == "TrainingDiverged: train loss is nan"
    failed = next(table for table in parts(study, Table) if table.heads[0] == "failed")
    assert failed.rows == [["1 trial", "TrainingDiverged: train loss is nan", "4"]]


def test_learning_curves_are_the_recorded_epochs_and_end_where_the_trial_did(made):
    found = plot(made.read(), "learning-curves")
    best = trace(found, "trial 1")
    assert best["x"] == [1, 2, 3, 4]
    assert best["y"] == [pytest.approx(figure(0.2, epoch, "val/loss")) for epoch in (1, 2, 3, 4)]
    assert trace(found, "stopped or failed")["x"] == [2, 1]
    assert [shape["x0"] for shape in found.layout["shapes"]] == [2], "the rung at half of the epochs"


def test_best_so_far_never_gets_worse_and_ends_at_the_best(made):
    study = made.read()
    values = [row.value for row in study.rows if row.state == "COMPLETE"]
    for id in ("best-time", "best-hours"):
        found = plot(study, id)
        assert trace(found, "best so far")["y"] == pytest.approx([values[0], values[1], values[1]])
        assert trace(found, "trial")["y"] == pytest.approx(values)


def test_hours_that_were_counted_for_a_model_are_shared_out_among_its_trials(made):
    for number, seconds in enumerate((60.0, 180.0)):
        made.trial(0.3 + number / 100, state="RUNNING", model="resnet50")
        made.ledger.note(5 + number, latest={"seconds": {"1": seconds}})
    counted = {"seconds": 1.0, "launches": 1, "machines": {}, "models": {"resnet50": 7200.0}}
    write_json(made.folder / "usage.json", {"gpu": counted})
    hours, unit = computing(read_source(made.read()))
    assert unit == "GPU-hour" and (hours[5], hours[6]) == pytest.approx((0.5, 1.5))


def test_external_against_val_has_each_tested_trial_and_the_rank_correlation(made):
    found = plot(made.read(), "transfer-plot")
    drawn = sorted(y for one in found.data for y in one["y"])
    assert drawn == [0.6, 0.7, 0.8, 0.9]
    table = next(one for one in parts(made.read(), Table) if one.heads[0] == "selected by")
    assert table.rows[0][:2] == ["val/loss", "+1.00 (too few: 3)"], "the lower the loss, the higher the AUC"
    for number in range(5):
        made.trial(0.3 + 0.01 * number, external={"external/auc": 0.6 + 0.01 * (number % 2)})
    table = next(one for one in parts(made.read(), Table) if one.heads[0] == "selected by")
    for row, one in zip(table.rows, correlations(made.read().rows, "these"), strict=True):
        shown = "-" if one["rho"] is None else f"{one['rho']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
        assert row[:2] == [one["selection"], shown], "as `medtune choose` says it"


def test_roc_and_reliability_are_of_the_trials_logits(made):
    study = made.read()
    first = predicted(study, rank(study, "val/loss")[0])["val"]
    auc = classification(softmax(first.logits), first.labels)["auc"]
    found = plot(study, "roc-val")
    assert trace(found, "trial 1")["name"] == f"trial 1: AUC {auc:.3f}"
    bins = trace(plot(study, "calibration-external"), "trial 1")
    assert sum(int(text.split()[0]) for text in bins["text"]) == 60
    whiskers = zip(bins["y"], bins["error_y"]["arrayminus"], bins["error_y"]["array"], strict=True)
    assert all(y - low >= 0 and y + high <= 1 + 1e-9 for y, low, high in whiskers)


def test_the_area_under_the_bands_holds_the_auc_and_its_interval(made):
    found = logits_of(made, 0)
    probs = softmax(found.logits)
    low, high = roc_band(probs, found.labels)
    assert (low <= high).all() and high[-1] == 1
    auc = classification(probs, found.labels)["auc"]
    assert np.trapezoid(low, GRID) < auc < np.trapezoid(high, GRID)
    bounds = intervals(probs, found.labels, 200)["auc"]
    assert np.trapezoid(low, GRID) <= bounds[0] + 0.02 and np.trapezoid(high, GRID) >= bounds[1] - 0.02


def test_more_than_two_classes_have_a_mean_curve(made):
    for number in range(3):
        logits_of(made, number, classes=3)
    found = plot(made.read(), "roc-val")
    assert "mean of 3 curves" in found.shows
    assert trace(found, "trial 1")["y"][-1] == 1
    go.Figure(found.json)


def test_importance_finds_the_setting_that_matters_and_needs_enough_trials(made):
    assert f"it takes at least {ENOUGH}" in words(made.read())
    levels = {"adam": 0.1, "adamw": 0.5, "sgd": 0.9}
    for number in range(18):
        optimizer = list(levels)[number % 3]
        made.trial(levels[optimizer], optimizer=optimizer, lr=(1e-4, 3e-4, 1e-3, 1e-2)[number % 4])
    study = made.read()
    bars = plot(study, "importance").data[0]
    assert bars["y"][-1] == "optimizer" and bars["x"][-1] > 0.5
    assert max(bars["error_x"]["array"]) > 0, "it has a spread"
    few = [trial for trial in read_source(study).trials.values() if trial.value is not None][:3]
    assert forests(few, seed=1) == forests(few, seed=1)


@pytest.mark.parametrize("trials", [0, 1])
def test_a_study_without_a_trained_trial_says_so(tmp_path, trials):
    study = MadeStudy(tmp_path / "made")
    for _ in range(trials):
        study.trial(0.3, state="RUNNING", epochs=2)
    path = write(study.read(), tmp_path / "r.html")
    assert "nothing to choose from" in path.read_text()
    assert ("No trial has finished an epoch yet" in path.read_text()) == (trials == 0)


def test_a_running_study_is_marked_with_the_time(made, tmp_path):
    page = write(replace(made.read(), running=True), tmp_path / "r.html").read_text()
    assert re.search(r"this page is of \d{4}-\d\d-\d\d \d\d:\d\d [A-Z+-]+\d*, <b>while the study is running", page)
    assert "what follows may change" in page


def test_contact_sheets_are_on_the_page(made, tmp_path):
    study = made.read()
    assert "medtune gradcam" in words(study)
    number = rank(study, study.selection)[0].number
    folder = sheets_folder(study, number)
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "external-misses.png")
    page = write(study, tmp_path / "r.html").read_text()
    data = base64.b64encode((folder / "external-misses.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{data}"' in html.unescape(page) and f"Trial {number}," in page


def test_heads_of_axes_are_broken_and_long_ones_get_more_room(tmp_path):
    assert head_lines("milestones.first") == ["milestones", ".first"]
    assert head_lines("val_shift/loss") == ["val_shift", "/loss"] and head_lines("val/loss") == ["val/loss"]
    assert head_lines("activation_checkpointing") == ["activation", "_checkpointing"]
    study = MadeStudy(tmp_path / "made")
    study.trial(0.3)
    usual = plot(study.read(), "parallel")
    heads = [note["text"] for note in usual.layout["annotations"] if note["text"].startswith("<b>")]
    assert usual.width == 110 * len(heads) and heads[-1] == "<b>val/loss</b>"
    record = study.read()
    record.record["selection"] = "val/specificity"
    assert plot(record, "parallel").width > usual.width


def test_a_plan_says_that_it_searches_nothing(made):
    study = made.read()
    study.record["planned"] = True
    assert "A plan searches nothing" in words(study) and "The plan stops no trial early" in words(study)


def test_many_trials_are_sampled_and_the_page_says_so(tmp_path, monkeypatch):
    from medtune.report import learning, space, transfer, trials

    for module in (learning, space, transfer, trials):
        monkeypatch.setattr(module, "MOST", 6)
    study = MadeStudy(tmp_path / "made")
    for number in range(12):
        study.trial(0.2 + number / 100, external={"external/auc": 0.9 - number / 100})
    read = study.read()
    assert "6 of 12 trials are drawn" in plot(read, "learning-curves").shows
    assert "6 of 12 trials are drawn" in plot(read, "parallel").shows
    assert "6 of 12 trials are drawn" in plot(read, "transfer-plot").shows
    table = next(table for table in parts(read, Table) if table.sortable)
    assert len(table.rows) == 6 and "The first 6 of 12" in table.caption


def test_what_a_trial_says_is_text_on_the_page_not_markup(made, tmp_path):
    number = made.trial(0.6, state="RUNNING", epochs=1)
    made.ledger.finish(number, "FAIL", None, "Boom: </script><script>alert(1)</script>")
    page = write(made.read(), tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_the_page_names_no_address_and_its_plots_are_json(made, tmp_path):
    page = write(made.read(), tmp_path / "r.html").read_text()
    own = page[: page.index("<footer")]
    assert "http" not in own.replace("http-equiv", "")
    for text in re.findall(r'<script type="application/json">(.*?)</script>', own):
        assert json.loads(text)["data"]


def test_a_choice_comes_first_with_ties_threshold_and_cautions(made):
    def run(seed, value):
        return {"seed": seed, "number": 0, "value": value, "figures": {}, "folder": "trials/0000/attempt-1"}

    def finalist(trial, rank, tied):
        return {
            "trial": trial, "settings": {"lr": 0.01}, "config": {"model": "medmamba_s"}, "first_value": 0.91,
            "runs": [run(7, 0.88), run(8, 0.9)], "mean": 0.89, "low": 0.87, "high": 0.91, "rank": rank, "tied": tied,
        }  # fmt: skip

    at = {"oa": {"value": 0.8123, "low": 0.7, "high": 0.9}}
    figures = {"val": {"argmax": at, "at_threshold": at, "before": {"ece": at["oa"]}, "after": {}}}
    write_json(made.folder / "choice.json", {
        "study": "made", "by": "val/auc", "external_labels_used": False, "candidates": 3, "seeds": [7, 8],
        "finalists": [finalist(2, 1, False), finalist(0, 2, True)], "chosen": {"trial": 2, "run": 1, "why": "best mean"},
        "ties": "trial 0 cannot be told from trial 2", "threshold": {"rule": "youden", "value": 0.37, "set_on": "val"},
        "temperature": 1.4, "figures": figures, "correlations": correlations(made.read().rows, RUNS),
        "cautions": ["two seeds say little"],
    })  # fmt: skip
    study = made.read()
    first = sections(read_source(study))[0].blocks
    assert first[0].text.startswith("Trial 2:") and "seed 8" in first[1].text and "best mean" in first[1].text
    said = words(study)
    assert "trial 0 cannot be told" in said and "two seeds say little" in said and "Not yet retrained" not in said
    cells = [cell for table in parts(study, Table) for row in table.rows for cell in row]
    assert "from 0.370 on (youden, set on val)" in cells and "0.812 [0.700,\u00a00.900]" in cells
    assert "2 (tied with the first)" in cells
    assert any("the finalists' runs, by `medtune choose`" in table.caption for table in parts(study, Table))
    names = [one["name"] for one in plot(study, "calibration-val").data]
    assert "trial 2, seed 8 (chosen), temperature 1.40" in names


def test_the_command_writes_beside_the_study_or_where_it_is_told(made, tmp_path, capsys):
    assert cli.main(["report", str(made.folder)]) == 0
    assert (made.folder / "report.html").exists() and "report.html" in capsys.readouterr().out
    assert cli.main(["report", str(made.folder), "-o", str(tmp_path / "mine" / "a.html")]) == 0
    assert (tmp_path / "mine" / "a.html").exists()
    assert not list(made.folder.glob("*.part"))


def test_a_place_that_cannot_be_written_is_named(made):
    with pytest.raises(StudyError, match=r"cannot write .*/r\.html.*-o"):
        write(made.read(), made.folder / "study.json" / "r.html")


def test_a_sweep_ends_with_the_pages_path(made, capsys):
    assert print_outcome(made.folder)
    said = capsys.readouterr().out
    assert f"page for the browser: {made.folder}/report.html" in said and "medtune choose made" in said
    assert (made.folder / "report.html").stat().st_size > 1e6


@pytest.mark.slow
def test_while_a_study_runs_its_page_is_written_by_another_process(made):
    import time

    page = made.folder / "report.html"
    with kept_up(Home(made.folder, 1.0), every=0.1):
        end = time.monotonic() + 60
        while not page.exists() and time.monotonic() < end:
            time.sleep(0.1)
    assert page.exists()
