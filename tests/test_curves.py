"""`medtune curves`: what is drawn of which trials, and what is refused."""

import math

import pytest
from PIL import Image

from medtune import cli
from medtune import curves as drawing
from medtune.errors import ConfigError, StudyError
from tests.support.made_study import MadeStudy, figure

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture
def made(tmp_path):
    return MadeStudy(tmp_path / "made")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a study and returns the figure that was saved."""
    figures = []
    real = drawing._figure
    monkeypatch.setattr(drawing, "_figure", lambda *args: figures.append(real(*args)) or figures[-1])

    def draw(study, *numbers):
        drawing.draw(study, numbers, tmp_path / "c.png")
        return figures[-1]

    return draw


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def lines(figure, title, style):
    """Epochs and values of the lines of a style in a panel, in the order of the trials."""
    found = [line for line in panel(figure, title).lines if line.get_linestyle() == style and len(set(line.get_xdata())) > 1]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


def marks(figure, title, marker):
    return [list(line.get_xdata()) for line in panel(figure, title).lines if line.get_marker() == marker]


def words(figure):
    return "\n".join(text.get_text() for legend in figure.legends for text in legend.get_texts())


def test_the_lines_are_the_recorded_figures_train_dashed_val_solid(made, drawn):
    made.trial(0.3)
    made.trial(0.5, lr=1e-2)
    picture = drawn(made.read(), 0, 1)
    for metric, title in drawing.PANELS.items():
        for split, style in (("train", "--"), ("val", "-")):
            assert lines(picture, title, style) == [
                ([1, 2, 3, 4], [pytest.approx(figure(level, e, f"{split}/{metric}")) for e in (1, 2, 3, 4)])
                for level in (0.3, 0.5)
            ]
    colours = {line.get_color() for line in panel(picture, "OA").lines if line.get_linestyle() in ("-", "--")}
    assert colours == set(drawing.COLOURS[:2])


def test_best_epoch_milestones_and_rungs_are_marked_and_the_legend_says_the_rest(made, drawn):
    made.trial(0.3)
    picture = drawn(made.read(), 0)
    assert marks(picture, "AUC", "o") == [[1]]
    assert marks(picture, "AUC", "v") == [[1, 2]], "a third and a half of 4 epochs"
    rungs = [line.get_xdata()[0] for line in panel(picture, "AUC").lines if line.get_linestyle() == ":"]
    assert rungs == [2], "first rung at half of the epochs"
    said = words(picture)
    assert f"trial 0, COMPLETE: best epoch 1, val/loss {figure(0.3, 1, 'val/loss'):.4f}" in said
    assert "model=medmamba_s optimizer=adam lr=0.001" in said and "rung" in said and "milestone" in said
    assert picture.get_suptitle() == "made: trial 0"


def test_a_constant_schedule_has_no_milestones(made, drawn):
    made.trial(0.3, schedule="constant")
    picture = drawn(made.read())
    assert marks(picture, "AUC", "v") == [[]] and "milestone" not in words(picture)


def test_a_pruned_trial_ends_where_it_ended(made, drawn):
    made.trial(0.3)
    made.trial(0.5, state="PRUNED", epochs=2)
    made.trial(0.5, state="RUNNING", epochs=3)
    picture = drawn(made.read(), 0, 1, 2)
    assert [x for x, _ in lines(picture, "F1", "-")] == [[1, 2, 3, 4], [1, 2], [1, 2, 3]]
    assert marks(picture, "F1", "x") == [[2]], "a trial that goes on has not ended"
    assert "trial 1, PRUNED at epoch 2" in words(picture) and "trial 2, WAITING at epoch 3" in words(picture)


def test_an_undefined_figure_is_a_gap(made, drawn):
    made.trial(0.3, more={"val/auc": None})
    ((_, values),) = lines(drawn(made.read(), 0), "AUC", "-")
    assert all(map(math.isnan, values))


def test_a_diverging_trial_does_not_flatten_the_others(made, drawn):
    made.trial(0.3)
    made.trial(90.0)
    picture = drawn(made.read(), 0, 1)
    assert panel(picture, "loss, logarithmic").get_yscale() == "log" and panel(picture, "OA").get_yscale() == "linear"


def test_attempts_are_one_curve(made, drawn):
    made.trial(0.3, attempts=2)
    assert lines(drawn(made.read(), 0), "OA", "-")[0][0] == [1, 2, 3, 4]


def test_the_best_three_by_default_and_those_in_the_lead_while_none_has_ended(made, tmp_path):
    for level in (0.9, 0.3, 0.5, 0.4):
        made.trial(level, state="RUNNING", epochs=2)
    assert drawing.draw(made.read(), (), tmp_path / "c.png") == [1, 3, 2]
    ended = MadeStudy(tmp_path / "ended")
    for level in (0.9, 0.3, 0.5, 0.4):
        ended.trial(level)
    ended.trial(0.1, state="PRUNED", epochs=1)
    assert drawing.draw(ended.read(), (), tmp_path / "c.png") == [1, 3, 2]


def test_many_trials_have_a_colour_each(made, drawn):
    for _ in range(9):
        made.trial(0.3)
    picture = drawn(made.read(), *range(9))
    assert len({line.get_color() for line in panel(picture, "OA").lines if line.get_linestyle() == "--"}) == 9


@pytest.mark.parametrize("suffix", drawing.FORMATS)
def test_every_format_is_written_and_is_what_its_name_says(made, tmp_path, suffix):
    made.trial(0.3)
    path = tmp_path / "new" / f"c{suffix}"
    drawing.draw(made.read(), (), path)
    assert path.read_bytes().startswith(SIGNATURES[suffix])


def test_the_command_draws_beside_the_study_and_says_where(made, capsys, tmp_path):
    made.trial(0.3)
    assert cli.main(["curves", "made", "0", "--storage", str(tmp_path)]) == 0
    assert f"trials 0 drawn: {made.folder / 'curves.png'}" in capsys.readouterr().out
    with Image.open(made.folder / "curves.png") as picture:
        assert picture.width > 1000
    assert cli.main(["curves", str(made.folder), "-o", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").read_bytes().startswith(SIGNATURES[".svg"])


@pytest.mark.parametrize(
    ("numbers", "name", "error", "message"),
    [
        ((7,), "c.png", ConfigError, r"unknown trial of study 'made' '7'"),
        ((1,), "c.png", StudyError, r"trial 1 of study 'made' \(WAITING\) has no epochs to draw"),
        ((0,), "c.jpg", ConfigError, r"must end in one of .png, .svg, .pdf, got 'c.jpg'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(made, tmp_path, numbers, name, error, message):
    made.trial(0.3)
    made.trial(0.5, state="RUNNING", epochs=0)
    with pytest.raises(error, match=message):
        drawing.draw(made.read(), numbers, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_study_without_epochs_has_nothing_to_draw(made, tmp_path):
    with pytest.raises(StudyError, match="has finished an epoch yet"):
        drawing.draw(made.read(), (), tmp_path / "c.png")


def test_a_picture_that_cannot_be_written_is_named(made, tmp_path):
    made.trial(0.3)
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"cannot write .* with -o"):
        drawing.draw(made.read(), (), tmp_path / "file" / "c.png")


def test_synthetic_figures_are_marked(made, drawn):
    made.trial(0.3)
    study = made.read()
    study.record["synthetic"] = True
    assert "SYNTHETIC" in drawn(study, 0).get_suptitle()
