"""`medtune choose` of a study in a bucket: its driver is killed in the middle, another machine goes on with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medtune import cli
from medtune.choose import command, read_choice
from medtune.choose.stage import open_stage
from medtune.results import epochs, load_study, predicted
from tests.choose.test_choose import MEANS, ROOT, made
from tests.support.s3 import put_study
from tests.support.tiny_trial import TinyTrial

CODE = """
from dataclasses import replace
from medtune.choose import command
from tests.choose.test_choose import MEANS
from tests.support.tiny_trial import TinyTrial
command.make("s", 2, 2, None, None, {uri!r}, replace(MEANS, concurrent=1), TinyTrial)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_machine_goes_on_with_a_choice_that_was_killed(bucket, head, tmp_path, capsys):
    made(tmp_path / "s")
    study = put_study(bucket, tmp_path / "s")
    ended = study.under("stages/finalists/trials/0000")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([sys.executable, "-c", CODE.format(uri=bucket.uri)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ended.find("outcome.json"):
        assert driver.poll() is None
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    head("second")
    before = open_stage(load_study("s", bucket.uri))
    assert before.rows[0].state == "COMPLETE" and len([row for row in before.rows if row.finished]) < 4, "killed too late"
    assert study.read("choice.json") is None
    found = command.make("s", 2, 2, None, None, bucket.uri, MEANS, TinyTrial)
    head("third")
    there = load_study("s", bucket.uri)
    stage = open_stage(there)
    assert read_choice(there) == found and [row.state for row in stage.rows] == ["COMPLETE"] * 4
    assert stage.rows[0].attempt == 1, "what is trained is not trained again"
    for row in stage.rows:
        assert [line["epoch"] for line in epochs(stage, row)] == [1, 2, 3]
        assert predicted(stage, row)["val"].labels.any()
    record = json.loads(stage.bucket.read("driver.json"))
    assert (record["state"], record["status"]) == ("ended", 0) and record["message"].startswith("chosen: trial")
    capsys.readouterr()
    assert cli.main(["report", f"{bucket.uri}/s"]) == 0
    page = Path(capsys.readouterr().out.partition("(here: ")[2].partition(")")[0]).read_text()
    assert "over 2 fresh seeds" in page and study.read("report.html").decode() == page
