"""`medtune dashboard`: what Optuna's dashboard answers of a study, and that it changes nothing."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest

from medtune import cli, predictions
from medtune.dashboard import listen
from medtune.dashboard_storage import ShownLedger
from medtune.errors import ConfigError, StudyError
from medtune.predictions import Predicted
from medtune.search.conductor import attempt_folder
from tests.support.made_study import MadeStudy, figure

EXTERNAL = {"epoch": 1, "external/auc": 0.81234567, "external/auc/low": 0.7, "external/auc/high": 0.9}


@pytest.fixture
def made(tmp_path):
    """Trial 0 complete, with predictions; 1 pruned at a rung; 2 unfinished, and nobody trains it."""
    made = MadeStudy(tmp_path / "made")
    made.trial(0.3, external=EXTERNAL)
    logits = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    labels = np.arange(40) % 2
    folder = attempt_folder(made.folder / "trials", 0, 1)
    predictions.write(folder, {name: Predicted(logits, labels) for name in ("val", "test", "external", "external_matched")})
    made.trial(0.5, epochs=2, state="RUNNING")
    made.ledger.record_rung(1, 2, 0.5, False, index=0, order=0)
    made.ledger.finish(1, "PRUNED", 0.5)
    made.trial(0.4, epochs=1, state="RUNNING")
    return made


@contextmanager
def shown(study):
    with listen(study, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def get(url, method="GET"):
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
        return answer.read()


def study_of(base):
    return json.loads(get(f"{base}/api/studies/0"))


def attributes(trial):
    return {item["key"]: item["value"] for item in trial["user_attrs"]}


def test_trials_states_and_readable_attributes(made):
    with shown(made.read()) as base:
        found = study_of(base)
    assert [trial["state"] for trial in found["trials"]] == ["Complete", "Pruned", "Waiting"]
    assert found["objective_names"] == ["val/loss"] and "`external*/...` and `test/...`" in found["note"]["body"]
    complete, pruned, _ = found["trials"]
    assert [value["step"] for value in complete["intermediate_values"]] == [1, 2, 3, 4]
    assert {param["name"] for param in complete["params"]} >= {"model", "lr"}
    about = attributes(complete)
    assert about["external/auc"] == "0.812346" and about["external/auc 95 %"] == "0.7000 to 0.9000"
    assert float(about["val/auc"]) == pytest.approx(figure(0.3, 1, "val/auc")) and about["best epoch"] == "1"
    assert attributes(pruned)["rung at epoch 2"] == "stopped at 0.5000"
    # Nothing nested is left, and figures can be sorted by.
    assert not any(value.startswith("{") for trial in found["trials"] for value in attributes(trial).values())
    assert {"key": "external/auc", "sortable": True} in found["union_user_attrs"]


def test_pictures_of_a_trial_that_left_predictions(made):
    with shown(made.read()) as base:
        trials = study_of(base)["trials"]
        assert [item["filename"] for item in trials[0]["artifacts"]] == ["confusion.png", "roc.png"]
        assert trials[1]["artifacts"] == [] == trials[2]["artifacts"]
        for item in trials[0]["artifacts"]:
            assert get(f"{base}/artifacts/0/0/{item['artifact_id']}").startswith(b"\x89PNG")
        for missing in ("1-0", "0-9", "77-0"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(f"{base}/artifacts/0/0/{missing}")


def test_new_trials_appear_while_it_is_shown(made):
    storage = ShownLedger(made.read())
    assert len(storage.get_all_trials(0)) == 3
    made.trial(0.6)
    assert [trial.state.name for trial in storage.get_all_trials(0)] == ["COMPLETE", "PRUNED", "WAITING", "COMPLETE"]


def test_nothing_can_be_changed(made):
    before = (made.folder / "ledger.journal").read_bytes()
    calls = [("DELETE", "studies/0"), ("PUT", "studies/0/note"), ("POST", "trials/2/tell"), ("POST", "studies/0/rename")]
    with shown(made.read()) as base:
        for method, path in [*calls, ("POST", "studies/0/preference"), ("POST", "artifacts/0/2")]:
            with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                get(f"{base}/api/{path}", method)
            assert "only shows a study" in json.loads(refused.value.read())["reason"]
    storage = ShownLedger(made.read())
    with pytest.raises(StudyError, match="driver alone"):
        storage.set_study_system_attr(0, "dashboard:note_ver", 1)
    with pytest.raises(StudyError, match="driver alone"):
        storage.delete_study(0)
    assert (made.folder / "ledger.journal").read_bytes() == before


def test_ports_that_are_not_to_be_had(made, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["dashboard", str(made.folder), "--port", str(port)]) == 2
        assert f"port {port} on 127.0.0.1 is taken: name another with --port" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="0 to 65535, got 70000"):
        listen(made.read(), 70000)


def test_a_study_without_trials_is_named(tmp_path):
    made = MadeStudy(tmp_path / "made")
    with pytest.raises(StudyError, match="'made' has no trials yet"):
        listen(made.read(), 0)


def test_trials_that_have_ended_are_put_into_words_once(made):
    storage = ShownLedger(made.read())
    first, again = (storage.get_all_trials(0, deepcopy=False) for _ in range(2))
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, False]


@pytest.mark.browser
def test_a_browser_shows_the_study_without_errors(made):
    from playwright.sync_api import sync_playwright

    said = []
    with shown(made.read()) as base, sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{base}/dashboard/studies/0/trials?numbers=0")
        page.get_by_text("external/auc 95 %").first.wait_for(timeout=20000)
        for item in ("0-0", "0-1"):
            picture = page.locator(f"img[src*='/artifacts/0/0/{item}']")
            picture.wait_for(timeout=20000)
            end = time.monotonic() + 20
            while not picture.evaluate("image => image.naturalWidth") and time.monotonic() < end:
                time.sleep(0.1)
            assert picture.evaluate("image => image.naturalWidth") > 100
        browser.close()
    assert said == []
