"""`medtune compare`: which trials count where, and that every printed figure is the one computed by hand."""

import csv
import io
import json
import re
import statistics

import pytest
from rich.console import Console

import medtune.models
from medtune import cli, compare
from medtune.compare.match import matches
from medtune.config import TrialConfig
from medtune.reference import table
from medtune.results import trial_config
from medtune.search.ledger import Row
from tests.support.made_study import MadeStudy, figure

EXTERNAL = {"external/oa": 0.61, "external/auc": 0.72, "cpn/oa": 0.83, "test/oa": 0.88, "test/auc": 0.94}


@pytest.fixture
def made(tmp_path):
    return MadeStudy(tmp_path / "made")


def shown(study):
    console = Console(file=io.StringIO(), width=100)
    compare.print_comparison(compare.compare(study), console)
    return console.file.getvalue()


def lines_of(text, head, entry):
    """The lines of one entry of one table."""
    part = text.split(head)[1].split("\nTable")[0].split("\nAppendix")[0]
    lines = part.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(entry))
    rest = lines[start + 1 :]
    return rest[: next((i for i, line in enumerate(rest) if not line.startswith(" ")), len(rest))]


def rows(study, **wanted):
    return [row for row in compare.flat(compare.compare(study)) if all(row[k] == v for k, v in wanted.items())]


def test_mean_range_and_difference_of_the_last_epoch_are_those_by_hand(made):
    levels = (0.3, 0.5, 0.4)
    for level in levels:
        made.trial(level)
    for name, split in (("3", "train"), ("4", "val")):
        reported = next(row for row in table(name) if row.model == "medmamba_s").figures
        for metric, report in reported.items():
            (row,) = rows(made.read(), table=name, model="medmamba_s", metric=metric)
            values = [figure(level, 4, f"{split}/{metric}") for level in levels]
            assert (row["n"], row["trials"], row["state"]) == (3, "0 1 2", "run")
            assert row["report"] == str(report) and row["source"] == f"{split}/{metric}"
            assert row["mean"] == pytest.approx(statistics.mean(values))
            assert (row["low"], row["high"]) == (min(values), max(values))
            assert row["difference"] == pytest.approx(statistics.mean(values) - float(report))


def test_the_screen_shows_these_figures_within_80_columns(made):
    for level in (0.3, 0.5):
        made.trial(level)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    compare.print_comparison(compare.compare(made.read()), console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    found = lines_of(text, "Table 3", "MedMamba-s")
    means = [figure(0.4, 4, f"train/{m}") for m in ("oa", "sensitivity", "specificity", "f1", "auc", "loss")]
    assert found[0].split() == ["report", "0.9446", "0.9674", "0.8789", "0.9628", "0.9851", "0.1341"]
    assert found[1].split() == ["schedule", "stepped,", "n", "2", *(f"{mean:.4f}" for mean in means)]
    assert found[2].split() == ["lowest", *(f"{mean - 0.1:.4f}" for mean in means)]
    assert found[3].split() == ["highest", *(f"{mean + 0.1:.4f}" for mean in means)]
    assert found[4].split()[:2] == ["difference", f"{means[0] - 0.9446:+.4f}"]


def test_what_was_not_run_is_shown_so_beside_the_reports_figures(made):
    made.trial(0.3)
    text = shown(made.read())
    assert [line.split() for line in lines_of(text, "Table 4", "MedViT-large")] == [
        ["report", "0.9618", "0.9692", "0.9407", "0.9742", "0.9924", "0.1212"],
        ["schedule", "stepped:", "not", "run"],
    ]
    (row,) = rows(made.read(), table="4", model="medvit_large", metric="oa")
    assert (row["state"], row["n"], row["mean"], row["difference"], row["trials"]) == ("not run", 0, None, None, "")
    assert compare.to_html(compare.compare(made.read())).count(">not run<") == 6 * 4 + 7 * 3


def test_trials_that_did_not_end_are_counted_and_named_not_averaged(made):
    made.trial(0.3)
    made.trial(0.9, state="PRUNED", epochs=2)
    made.trial(0.9, state="FAIL", epochs=1)
    made.trial(0.9, state="RUNNING", epochs=1, lr=1e-2)
    made.trial(0.9, lr=3e-4)
    study = made.read()
    (row,) = rows(study, table="3", model="medmamba_s", metric="oa")
    assert (row["n"], row["mean"]) == (1, figure(0.3, 4, "train/oa"))
    text = shown(study)
    for line in (
        "1 trained to the end, at settings of the report: 0\n",
        "1 trained to the end, at other settings (not shown): 4\n",
        "1 PRUNED: not counted (1 of them at settings of the report): 1\n",
        "1 WAITING: not counted (1 of them at settings of the report): 3\n",
        "trial 2 failed: TrainingDiverged: train loss is nan\n",
    ):
        assert line in text
    assert lines_of(text, "Appendix 7.1", "Adam, lr 0.01, gamma 0.1")[1].split() == ["schedule", "stepped:", "1", "WAITING"]


def test_a_study_without_trials_is_compared_and_says_so(made):
    text = shown(made.read())
    assert "no trials yet" in text and "No trial of this study has a setting of the report." in text
    assert {row["state"] for row in rows(made.read())} == {"not run"}


def test_both_schedules_stand_side_by_side_and_are_not_mixed(made):
    made.trial(0.3)
    made.trial(0.5, schedule="constant")
    made.trial(0.6, schedule="constant")
    found = rows(made.read(), table="3", model="medmamba_s", metric="oa")
    assert [(row["section"], row["n"]) for row in found] == [("schedule stepped", 1), ("as run", 2)]
    assert found[1]["mean"] == pytest.approx(figure(0.55, 4, "train/oa"))
    assert [line.split()[:2] for line in lines_of(shown(made.read()), "Table 3", "MedMamba-s")][1::2] == [
        ["schedule", "stepped,"],
        ["as", "run,"],
        ["highest", "0.6410"],
    ]


def test_as_run_gamma_keeps_its_row_and_a_footnote_says_that_it_had_no_effect(made):
    made.trial(0.3, schedule="constant")
    made.trial(0.5, schedule="constant", gamma=0.001)
    (row,) = rows(made.read(), table="7.1", gamma=0.001, optimizer="adam", metric="oa")
    assert row["trials"] == "1" and "gamma had no effect" in row["footnote"]
    assert rows(made.read(), table="3", model="medmamba_s", metric="oa")[0]["trials"] == "0"
    assert "Adam, lr 0.001, gamma 0.001 [d]" in shown(made.read())
    assert "[d]" not in shown(made.read()).split("Adam, lr 0.0001, gamma 0.1")[1].split("report")[0]


def test_auc_by_raw_logit_has_a_row_of_its_own_as_run_alone(made):
    logits = {"train/auc_logit": 0.77, "val/auc_logit": 0.88}
    made.trial(0.3, more=logits)
    made.trial(0.5, more=logits, schedule="constant", external={"external/auc_logit": 0.66})
    found = {row["table"]: row for row in rows(made.read(), metric="auc_logit")}
    assert {name: (row["mean"], row["report"], row["section"]) for name, row in found.items()} == {
        "3": (0.77, "0.9851", "as run"),
        "4": (0.88, "0.9961", "as run"),
        "5": (0.66, "0.9815", "as run"),
        "6": (0.77, "0.985", "as run"),
    }
    assert "AUC by raw logit" in shown(made.read())
    assert compare.to_html(compare.compare(made.read())).count("AUC by raw logit (as the scripts)") == 4


@pytest.mark.parametrize(
    ("verified", "mean", "words"), [(True, 0.83, "CPN X-ray (verified)"), (False, 0.61, "NOT CPN X-ray: elsewhere")]
)
def test_cpn_figures_only_when_verified_and_plainly_marked_when_not(tmp_path, verified, mean, words):
    made = MadeStudy(tmp_path / "made", verified=verified)
    made.trial(0.3, external=EXTERNAL)
    (row,) = rows(made.read(), table="5", model="medmamba_s", metric="oa")
    assert row["mean"] == mean and row["measured_on"].startswith(words)
    text = shown(made.read())
    assert f"ours: {words}" in text and ("NOT on CPN X-ray" in text) is not verified


def test_table_6_sets_ours_on_train_beside_the_reports_and_ours_on_test_beside_the_authors(made):
    made.trial(0.3, external=EXTERNAL)
    found = {row["metric"]: row for row in rows(made.read(), table="6", model="medmamba_s")}
    assert {m: (row["report"], row["source"], row["mean"]) for m, row in found.items()} == {
        "oa": ("0.947", "train/oa", figure(0.3, 4, "train/oa")),
        "auc": ("0.985", "train/auc", figure(0.3, 4, "train/auc")),
        "authors_oa": ("0.936", "test/oa", 0.88),
        "authors_auc": ("0.976", "test/auc", 0.94),
    }
    swapped = {r["model"] for r in rows(made.read(), table="6") if "swapped" in r["footnote"]}
    assert swapped == {"medvit_large", "medvit_base"}


def test_a_figure_that_is_undefined_in_one_trial_is_a_mean_of_the_others(made):
    made.trial(0.3, more={"val/auc": None})
    made.trial(0.5)
    (row,) = rows(made.read(), table="4", model="medmamba_s", metric="auc")
    assert (row["n"], row["mean"], row["trials"]) == (1, figure(0.5, 4, "val/auc"), "0 1")
    assert f"(1) {figure(0.5, 4, 'val/auc'):.4f}" in shown(made.read())


def test_a_trial_of_several_attempts_gives_its_last_epoch_and_one_whose_record_is_cut_is_named(made):
    made.trial(0.3, attempts=2)
    made.trial(0.5, epochs=3)
    (row,) = rows(made.read(), table="3", model="medmamba_s", metric="oa")
    assert (row["n"], row["mean"]) == (1, figure(0.3, 4, "train/oa"))
    assert "trial 1: its record does not hold its last epoch, 4" in shown(made.read())


def test_what_differs_from_the_reports_recipe_is_said_loudly(tmp_path):
    made = MadeStudy(tmp_path / "made", image_size=32, epochs=5, train_limit=512, batch_size=32)
    made.trial(0.3)
    (first, second) = compare.compare(made.read()).loud
    assert first.startswith("Ours at 32 px, 5 epochs, 512 training images, batch 32, trained on synthetic: not comparable")
    assert "on elsewhere" in second
    recipe = compare.compare(MadeStudy(tmp_path / "recipe", verified=True, pair="pneumoniamnist-cpn", epochs=150).read())
    assert recipe.loud == ("No trial of this study has a setting of the report.",)


def test_the_reports_own_recipe_is_not_called_different(tmp_path):
    made = MadeStudy(tmp_path / "made", verified=True, pair="pneumoniamnist-cpn", epochs=150)
    made.trial(0.3)
    made.trial(0.3, model="resnet50")
    assert compare.compare(made.read()).loud == ()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"milestones": (0.3333, 0.5)}, True),
        ({"clip_norm": 1.0, "image_size": 32, "batch_size": 8, "momentum": 0.9, "micro_batch": 4}, True),
        ({"schedule": "constant", "milestones": (0.2,)}, True),
        ({"milestones": (0.2, 0.5)}, False),
        ({"milestones": (0.5, 0.75)}, False),
        ({"lr": 1.1e-3}, False),
        ({"gamma": 0.2}, False),
        ({"optimizer": "adamw"}, False),
        ({"weight_decay": 1e-4}, False),
        ({"augmentation": 0.1}, False),
        ({"imbalance": "weighted"}, False),
        ({"pretrained": "timm", "model": "resnet50"}, False),
        ({"model": "medmamba_t"}, False),
    ],
)
def test_which_configurations_are_the_base_setting(change, found):
    base = next(row for row in table("3") if row.model == "medmamba_s")
    assert matches(TrialConfig(**change), base) is found


def test_less_loss_and_more_of_all_else_is_better(made):
    made.trial(0.01)
    entries = compare.compare(made.read()).tables[0].entries
    cells = next(entry for entry in entries if entry.row.model == "medmamba_s").sections[0].cells
    assert {cell.metric: cell.better for cell in cells} == {
        "oa": False, "sensitivity": False, "specificity": False, "f1": False, "auc": False, "loss": True,
    }  # fmt: skip


def test_an_external_set_tested_in_part_is_said(tmp_path):
    made = MadeStudy(tmp_path / "made", external_limit=400)
    made.trial(0.3, external={"external/n": 395})
    assert not any("stratified" in line for line in compare.compare(made.read()).quiet)  # all that there were
    made.trial(0.3, external={"external/n": 400})
    assert "External test: ours on a fixed stratified choice of 400 images." in compare.compare(made.read()).quiet


def test_neighbouring_numbers_are_drawn_together(made):
    for lr in (1e-3, 1e-3, 3e-4, 1e-3, 3e-4, 1e-3, 1e-3):
        made.trial(0.3, lr=lr)
    assert compare.compare(made.read()).trials == (
        "5 trained to the end, at settings of the report: 0-1, 3, 5-6",
        "2 trained to the end, at other settings (not shown): 2, 4",
    )


def test_momentum_tells_sgd_settings_apart(made):
    sgd = next(row for row in table("7.1") if row.optimizer == "sgd" and row.lr == 1e-4)
    plain = TrialConfig(optimizer="sgd", lr=1e-4)
    assert matches(plain, sgd) and not matches(plain.replace(momentum=0.9), sgd)


@pytest.mark.parametrize(
    ("model", "milestones", "found"),
    [
        ("medvit_small", (1 / 2, 3 / 4), True),
        ("medvit_small", (1 / 3, 1 / 2), False),
        ("resnet50", (1 / 2, 3 / 4), True),
        ("resnet50", (1 / 3, 1 / 2), True),
    ],
)
def test_milestones_are_fractions_of_each_models_own_epochs(monkeypatch, model, milestones, found):
    monkeypatch.setattr(medtune.models, "available", lambda: ("medvit_small", "resnet50"))
    row = next(row for row in table("3") if row.model == model)
    assert matches(TrialConfig(model=model, milestones=milestones), row) is found


def test_a_seed_among_the_settings_wins_over_the_trials_number(made):
    made.trial(0.3)
    study = made.read()
    given = Row(3, "COMPLETE", {}, 0.1, 4, {"settings": {"seed": 11}})
    without = Row(3, "COMPLETE", {}, 0.1, 4, {"settings": {}})
    assert (trial_config(study, given).seed, trial_config(study, without).seed) == (11, 3)


def test_trials_of_one_setting_that_differ_in_more_than_the_seed_are_named(made, monkeypatch):
    made.trial(0.3)
    made.trial(0.5)
    study = made.read()
    study.rows[1].attrs["settings"]["batch_size"] = 128
    assert any("MedMamba-s" in line and "batch_size" in line for line in compare.compare(study).quiet)


def test_synthetic_figures_are_marked_everywhere(made, capsys):
    made.trial(0.3)
    record = json.loads((made.folder / "study.json").read_text()) | {"synthetic": True}
    (made.folder / "study.json").write_text(json.dumps(record))
    found = compare.compare(made.read())
    assert "SYNTHETIC" in shown(made.read()) and "SYNTHETIC" in compare.to_html(found)
    assert {row["synthetic"] for row in compare.flat(found)} == {True}


def test_the_command_writes_a_page_and_a_table_beside_the_study(made, capsys, tmp_path):
    made.trial(0.3, external=EXTERNAL)
    assert cli.main(["compare", "made", "--storage", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"written: {made.folder / 'compare.html'}\nwritten: {made.folder / 'compare.csv'}\n")
    with (made.folder / "compare.csv").open() as file:
        found = list(csv.DictReader(file))
    documented = re.findall(r"\w+", " ".join(re.findall(r"^\| ([\w, ]+?) +\|", compare.__doc__, re.M)))
    assert sorted(found[0]) == sorted(set(documented) - {"column"})
    wanted = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows(made.read())]
    assert found == wanted
    page = (made.folder / "compare.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)|@import|url\(|<script", page), "the page must need nothing else"
    assert f"<b>{figure(0.3, 4, 'train/oa'):.4f}</b>" in page


def test_json_has_all_figures_and_says_where_the_files_are(made, capsys, tmp_path):
    made.trial(0.3)
    out = tmp_path / "out"
    assert cli.main(["compare", str(made.folder), "--json", "-o", str(out)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["figures"] == rows(made.read())
    assert answer["files"] == [str(out / "compare.html"), str(out / "compare.csv")]
    assert (out / "compare.html").exists() and not (made.folder / "compare.csv").exists()


def test_a_folder_that_cannot_be_written_is_named(made, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", str(made.folder), "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot write to" in capsys.readouterr().err
