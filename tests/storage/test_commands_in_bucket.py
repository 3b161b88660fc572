"""What the commands say of a study in a bucket, what they leave there, and that another machine reads it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from medtune import cli
from medtune.audit import verdict_of
from medtune.choose import read_choice
from medtune.choose.stage import fresh_seeds, open_stage, settings_of
from medtune.dashboard_storage import ShownLedger
from medtune.driver import LOG, RECORD
from medtune.record import write_json
from medtune.results import load_study, sheets
from medtune.search.conductor import attempt_folder
from medtune.search.ledger import Ledger
from medtune.storage.home import LEDGER, BucketHome
from medtune.storage.segments import Segments
from medtune.wandb_run import MARK
from tests.deploy.conftest import train, with_tiny
from tests.support.fake_wandb import FakeWandb, refusing_url
from tests.support.made_study import MadeStudy
from tests.support.s3 import put_study
from tests.support.wandb_home import KEY
from tests.support.wandb_trial import play

CHOOSE = ("choose", "made", "--top", "1", "--seeds", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study with a trained trial, and its stage: two trainings of it, which are that same one."""
    with with_tiny():
        study = train(tmp_path_factory.mktemp("studies") / "made", "tiny", epochs=1)
    settings = settings_of(study, study.rows[0])
    plan = [{**settings, "seed": seed} for seed in fresh_seeds(study, 2)]
    shared = {name: study.record["settings"][name] for name in ("image_size", "train_limit", "external_limit", "precision")}
    stage = MadeStudy(study.folder / "stages" / "finalists", external="synthetic", plan=plan, **shared)
    for place, one in enumerate(plan):
        number = stage.trial(0.5 + place / 10, **one)
        trained = attempt_folder(study.folder / "trials", 0, 1)
        shutil.copytree(trained, attempt_folder(stage.folder / "trials", number, 1), dirs_exist_ok=True)
    log = stage.folder / LOG
    log.write_text("--- what the driver said\n")
    about = {"state": "ended", "status": 0, "message": "trained", "host": socket.gethostname(), "log": str(log)}
    write_json(stage.folder / RECORD, about)
    return study.folder


@pytest.fixture
def run(bucket, head, folder, capsys, monkeypatch, tmp_path):
    """Types a command on a machine that has nothing of the study yet, or on one that was named before; returns its words."""
    put_study(bucket, folder)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def command(machine: str, *words: str, status: int = 0) -> str:
        head(machine)
        with with_tiny():
            found = cli.main([*words, "--storage", bucket.uri])
        said = capsys.readouterr()
        assert found == status, said.err
        return said.err if status else said.out

    yield command
    assert not list(here.iterdir()), "nothing is left where one happens to be"


def test_a_choice_is_made_on_one_machine_and_exported_on_another(run, bucket, tmp_path):
    assert "chosen: trial 0 of study made" in run("first", *CHOOSE)
    assert "chosen with evidence: trial 0" in run("second", "best", "made")
    study = load_study("made", bucket.uri)
    assert read_choice(study)["seeds"] == fresh_seeds(study, 2) and open_stage(study).bucket is not None
    stage = bucket.under("made/stages/finalists")
    assert json.loads(stage.read(RECORD))["message"].startswith("chosen: trial 0, val/loss 0.56")
    log = stage.read(LOG).decode()
    assert log.startswith("--- what the driver said\nchosen: trial 0 of study made") and log.count("chosen: trial") == 2
    said = run("third", "export", "made", "-o", str(tmp_path / "bundle"))
    assert "the only finalist, trained again from 2 fresh seeds" in said and (tmp_path / "bundle" / "MODEL_CARD.md").exists()
    assert json.loads(run("fourth", "studies", "--json"))[0]["folder"] == f"{bucket.uri}/made"


def test_sheets_and_the_page_are_in_the_bucket_and_the_page_shows_sheets_of_another_machine(run, bucket):
    assert f"{bucket.uri}/made/gradcam/trial-0000/val-hits.png (here: " in run("first", "gradcam", "made")
    said = run("second", "report", "made")
    place = said.partition("(here: ")[2].partition(")")[0]
    page = bucket.under("made").read("report.html")
    assert f"written: {bucket.uri}/made/report.html" in said and Path(place).read_bytes() == page
    assert b"Trial 0, val: hits" in page and b"data:image/png;base64" in page
    study = load_study("made", bucket.uri)
    one, *_ = sheets(study, 0)
    one.write_bytes(b"x" * one.stat().st_size)
    assert sheets(study, 0)[0].read_bytes()[:4] == b"\x89PNG", "as they are in the bucket, whatever is here"


def test_an_audit_is_in_the_bucket_and_a_driver_puts_no_older_one_there(run, bucket, head, monkeypatch):
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)
    head("driver")
    home = BucketHome(bucket, "made", 1.0)
    with home.driven(print):
        write_json(home.folder / "audit.json", {"threshold": 0.95})
    with home.driven(print):
        audit = {"threshold": 0.9, "words": "another", "external_leaked": [], "external_seen": []}
        monkeypatch.setattr("medtune.audit.verdict.kept_audit", lambda *_: audit)
        monkeypatch.setattr("medtune.audit.command.print_audit", print)
        run("first", "data", "audit", "--study", "made")
        head("driver")
    assert verdict_of(load_study("made", bucket.uri))["threshold"] == 0.9
    with home.driven(print):
        assert json.loads((home.folder / "audit.json").read_text())["threshold"] == 0.9
    assert json.loads(bucket.read("made/audit.json"))["threshold"] == 0.9


def test_the_dashboard_follows_the_ledger_in_the_bucket(run, bucket, folder, tmp_path, monkeypatch):
    shown = ShownLedger(load_study("made", bucket.uri))
    (study,) = shown.get_all_studies()
    assert len(shown.get_all_trials(study._study_id)) == 1
    ledger = Path(shutil.copy(folder / LEDGER, tmp_path / "ledger"))
    opened = Ledger.open(ledger, "made", "minimize")
    opened.study.enqueue_trial({"lr": 1e-3})
    segments = Segments(bucket.under("made", "ledger"))
    segments.begin(ledger, segments.newest())
    assert len(shown.get_all_trials(study._study_id)) == 1, "not at every look"
    monkeypatch.setattr("medtune.dashboard_storage.AGAIN", 0.0)
    assert len(shown.get_all_trials(study._study_id)) == 2


def test_a_dashboard_shows_what_it_has_while_the_bucket_does_not_answer(run, bucket, monkeypatch):
    shown = ShownLedger(load_study("made", bucket.uri))
    monkeypatch.setattr("medtune.dashboard_storage.AGAIN", 0.0)

    def gone(self, key):
        raise OSError("nobody answers")

    monkeypatch.setattr("medtune.storage.bucket.Bucket.read", gone)
    (study,) = shown.get_all_studies()
    assert len(shown.get_all_trials(study._study_id)) == 1


def test_wandb_without_runs_or_a_key_names_the_bucket(run, bucket, nobody):
    nobody.setenv("WANDB_BASE_URL", refusing_url())
    assert f"Then `medtune wandb {bucket.uri}/made`" in run("first", "wandb", "made", status=2)
    nobody.setenv("WANDB_API_KEY", KEY)
    assert f"no W&B runs in {bucket.uri}/made/wandb" in run("first", "wandb", "made", status=2)


@pytest.mark.slow
def test_a_workspace_is_known_to_other_machines(run, bucket, nobody, tmp_path):
    play(tmp_path / "played", 0)
    nobody.setenv("WANDB_API_KEY", KEY)
    for path in (tmp_path / "played" / "wandb").rglob("*"):
        if path.is_file() and (path.suffix == ".wandb" or path.name == MARK):
            bucket.under("made").upload(path, str(path.relative_to(tmp_path / "played")))
    call = [sys.executable, "-m", "medtune.cli", "wandb", f"{bucket.uri}/made"]
    with FakeWandb() as wandb:
        nobody.setenv("WANDB_BASE_URL", wandb.url)
        for machine in ("first", "second"):
            environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / machine)}
            done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120)
            assert done.returncode == 0 and "workspace of study made" in done.stdout, done.stderr
        assert len(wandb.views) == 1


def test_figures_go_to_the_bucket_unless_told_elsewhere_and_no_output_is_a_uri(run, bucket, tmp_path):
    assert f"drawn: {bucket.uri}/made/curves.png (here: " in run("first", "curves", "made")
    assert bucket.read("made/curves.png")[:4] == b"\x89PNG"
    assert f"drawn: {tmp_path}/own/c.svg\n" in run("first", "curves", "made", "-o", str(tmp_path / "own" / "c.svg"))
    assert "must be a place on this machine" in run("first", "export", "made", "-o", "s3://sweeps/b", status=2)


def test_nothing_is_kept_of_a_study_of_that_name_that_is_no_more(run, bucket, head, tmp_path):
    run("first", "trials", "made")
    old = load_study("made", bucket.uri)
    write_json(old.folder / "audit.json", {"words": "of the old one"})
    record = json.loads(bucket.read("made/study.json"))
    bucket.under("made").write("study.json", json.dumps({**record, "id": "made-2"}).encode())
    assert verdict_of(load_study("made", bucket.uri)) is None


def test_a_bucket_that_is_gone_is_named(run, bucket, monkeypatch):
    assert run("first", "trials", "made")
    monkeypatch.setenv("AWS_ENDPOINT_URL", refusing_url())
    assert f"cannot read {bucket.uri}" in run("first", "best", "made", status=2)
