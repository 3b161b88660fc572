"""The report's figures: all there, and each consistent with the images it was measured on."""

import csv
import fnmatch
import tomllib
from pathlib import Path

import pytest

from medtune.reference import METRICS, MODELS, RECIPES, report_rows, table

ROOT = Path(__file__).parents[1]
GIVEN = ROOT.parent / "shared" / "reference" / "report_tables.csv"
COUNTS = {"train": (1214, 3494), "val": (135, 389), "cpn": (1802, 1800)}
"""Normal and pneumonia images of the official splits and of CPN X-ray."""


def test_seven_models_in_each_table_and_seven_settings_in_each_part_of_the_appendix():
    for name in ("3", "4", "5", "6"):
        assert {row.model for row in table(name)} == set(MODELS) == set(RECIPES)
        assert {(row.optimizer, row.lr, row.milestones, row.gamma) for row in table(name)} == {("adam", 1e-3, (50, 75), 0.1)}
    settings = [[(row.optimizer, row.lr, row.gamma) for row in table(name)] for name in ("7.1", "7.2", "7.3")]
    assert settings[0] == settings[1] == settings[2] and len(set(settings[0])) == 7
    assert len(report_rows()) == 4 * 7 + 3 * 7


def with_counts():
    return [row for row in report_rows() if row.table in ("4", "5", "7.2", "7.3")]


@pytest.mark.parametrize("row", with_counts(), ids=lambda row: f"{row.table} {row.model} {row.describe()}")
def test_the_figures_of_a_row_belong_to_one_confusion_matrix(row):
    """A digit that was mistyped does not survive this: sensitivity and specificity give OA and F1."""
    negative, positive = COUNTS[row.split]
    found = {name: float(value) for name, value in row.figures.items()}
    right, true_negative = round(found["sensitivity"] * positive), round(found["specificity"] * negative)
    assert right / positive == pytest.approx(found["sensitivity"], abs=1.01e-4)
    assert true_negative / negative == pytest.approx(found["specificity"], abs=1.01e-4)
    assert (right + true_negative) / (positive + negative) == pytest.approx(found["oa"], abs=4e-4)
    assert 2 * right / (positive + right + negative - true_negative) == pytest.approx(found["f1"], abs=4e-4)


def test_table_6_repeats_table_3_in_fewer_digits_but_for_one_row():
    train = {row.model: row.figures for row in table("3")}
    differing = [
        row.model
        for row in table("6")
        if any(abs(float(row.figures[m]) - float(train[row.model][m])) > 6e-4 for m in ("oa", "auc"))
    ]
    assert differing == ["medmamba_s"]


def test_digits_are_kept_as_printed():
    assert str(table("3")[5].figures["loss"]) == "0.1480" and str(table("6")[0].figures["oa"]) == "0.949"


def test_the_file_is_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["medtune"]
    shipped = [path for path in ("reference.csv", "compare/page.html.jinja") if (ROOT / "medtune" / path).exists()]
    assert len(shipped) == 2 and all(any(fnmatch.fnmatch(path, p) for p in patterns) for path in shipped)


@pytest.mark.skipif(not GIVEN.exists(), reason="the report's tables as they were given are not here")
def test_every_figure_that_was_given_is_there():
    renamed = {"oa_self": "oa", "auc_self": "auc", "oa_author": "authors_oa", "auc_author": "authors_auc"}
    ours = {
        (row.table, row.model, f"{row.optimizer} lr={row.lr:g} milestones=50;75 gamma={row.gamma:g}", name): str(value)
        for row in report_rows()
        for name, value in row.figures.items()
    }
    with GIVEN.open() as file:
        given = {
            (line["table"], line["model"], line["setting"], renamed.get(line["metric"], line["metric"])): line["value"]
            for line in csv.DictReader(file)
        }
    assert ours == given and {name for *_, name in ours} == set(METRICS)
