"""The driver on a cluster: its terminal may go or sleep, its outcome is kept, and its arguments need no quoting."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from medtune.config import StudyConfig, TrialConfig
from medtune.driver import DriverRecord, LooseStream, last_driver, outliving_client, require_same_script, who_drives
from medtune.errors import StudyError
from medtune.sweep import parse
from tests.support.made_study import MadeStudy

ROOT = Path(__file__).parents[1]

CHILD = """
import sys, time
from medtune.driver import outliving_client
with outliving_client():
    print("begun", flush=True)
    for number in range(int(sys.argv[2])):
        print("x" * 1000)
    time.sleep(float(sys.argv[3]))
    print("more", flush=True)
    sys.stderr.write("words")
open(sys.argv[1], "w").write("to the end")
"""


def in_terminal(tmp_path, lines, seconds):
    """A child whose controlling terminal is a pty; returns its number, the pty's other end and the file it writes last."""
    done = tmp_path / "done"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", CHILD, str(done), str(lines), str(seconds)])
    seen = b""
    while b"begun" not in seen:
        seen += os.read(terminal, 100)
    return pid, terminal, done


def test_a_driver_goes_on_when_its_terminal_is_closed(tmp_path):
    pid, terminal, done = in_terminal(tmp_path, lines=3, seconds=0.5)
    os.close(terminal)  # the kernel sends SIGHUP, and every write fails from now on
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert done.read_text() == "to the end"


def test_a_driver_goes_on_when_nobody_reads_its_terminal(tmp_path):
    """A laptop that sleeps: nothing is closed, but what is written is not taken any more."""
    pid, terminal, done = in_terminal(tmp_path, lines=300, seconds=0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert done.read_text() == "to the end"
    os.close(terminal)


def test_what_a_terminal_takes_arrives_in_order(tmp_path):
    with (tmp_path / "terminal").open("w+") as terminal:
        loose = LooseStream(terminal)
        for number in range(500):
            print(number, file=loose)
        loose.drain(10)
        assert (tmp_path / "terminal").read_text() == "".join(f"{n}\n" for n in range(500))


def test_the_hangup_is_heeded_again_afterwards():
    before = signal.getsignal(signal.SIGHUP)
    with outliving_client():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.fixture
def folder(tmp_path):
    study = MadeStudy(tmp_path / "studies" / "made")
    study.trial(0.5)
    return study.folder


def record(folder):
    return json.loads((folder / "driver.json").read_text())


def test_a_study_that_ended_names_its_best_trial(folder):
    with DriverRecord(folder, on_cluster=True) as driver:
        driver.log.write("trial 0 starts\n")
        assert record(folder)["state"] == "running" and str(os.getpid()) in who_drives(folder)
        assert f"tail -f {folder}/driver.log" in who_drives(folder)
    found = record(folder)
    assert (found["state"], found["status"]) == ("ended", 0)
    assert re.match(r"best: trial \d+, val/\w+ 0\.\d+", found["message"])
    log = (folder / "driver.log").read_text()
    assert "trial 0 starts\n" in log and "best configuration: trial" in log and log.endswith(f"{found['message']}\n")
    assert who_drives(folder) == ""


@pytest.mark.parametrize(
    ("error", "state", "status"),
    [
        (StudyError("no room"), "failed", 2),
        (KeyboardInterrupt(), "stopped", 130),
        (RuntimeError("Ray is gone"), "crashed", 1),
    ],
)
def test_a_study_that_did_not_end_says_why(folder, error, state, status):
    with pytest.raises(type(error)), DriverRecord(folder, on_cluster=True):
        raise error
    found = record(folder)
    assert (found["state"], found["status"]) == (state, status) and str(error) in found["message"]
    assert last_driver(folder, running=False) == found
    assert ("Traceback" in (folder / "driver.log").read_text()) == (state == "crashed")


def test_a_driver_that_left_no_outcome_was_killed(folder):
    with DriverRecord(folder, on_cluster=False) as driver:
        assert driver.log is None, "on this machine alone the screen is enough"
        assert last_driver(folder, running=True)["state"] == "running"
        assert last_driver(folder, running=False)["state"] == "killed"


def test_medtune_studies_shows_what_went_wrong(folder):
    with pytest.raises(StudyError), DriverRecord(folder, on_cluster=False):
        raise StudyError("the reason")
    command = [sys.executable, "-m", "medtune.cli", "studies", "--storage", folder.parent]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "failed" in said and "exit status 2: the reason" in said


def test_a_script_that_differs_from_the_nodes_checkout_is_refused(tmp_path):
    script, checkout = tmp_path / "medmamba.py", tmp_path / "checkout"
    (checkout / "sweeps").mkdir(parents=True)
    script.write_text("a = 1\n")
    require_same_script(script, checkout)  # a script of the user's own, which the cluster never had
    (checkout / "sweeps" / "medmamba.py").write_text("a = 1\n")
    os.utime(script, (1, 1))
    require_same_script(script, checkout)  # by content: a copy has another date
    script.write_text("a = 2\n")
    with pytest.raises(StudyError, match=r"ray up --no-restart cluster\.yaml"):
        require_same_script(script, checkout)


EXAMPLES = {
    "name": "my-study_2.b", "storage": "s3://bucket/a-folder/studies", "data_dir": "/data", "external_dir": "/data/cpn",
    "wandb_project": "medtune", "model": "medmamba_t", "pair": "medmnist:bloodmnist", "milestones": (0.25, 0.5),
    "pretrained": "/weights/medmamba_t.pth",
}  # fmt: skip


def values(name, setting):
    """What a user may give: each choice, both of a flag, an example of what is free text, a number."""
    default = setting.default
    choices = getattr(setting.type, "__args__", ())
    if name in EXAMPLES:
        return [EXAMPLES[name]]
    if isinstance(default, bool):
        return [True, False]
    if any(isinstance(choice, str) for choice in choices):
        return list(choices)
    return [1e-05, 3] if isinstance(default, float) else [3]


def settings():
    for config in (StudyConfig, TrialConfig):
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            if field.name != "trial":
                field.type = hints[field.name]
                yield field


@pytest.fixture(scope="module")
def flags():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parse(["--help"], "")
    return set(re.findall(r"--[\w-]+", said.getvalue()))


@pytest.mark.parametrize("setting", list(settings()), ids=lambda field: field.name)
def test_no_setting_needs_quoting(setting, flags):
    """`ray submit` joins our arguments with spaces and gives them to a shell, so a word must be one word there."""
    flag = f"--{setting.name.replace('_', '-')}"
    for value in values(setting.name, setting):
        if isinstance(value, bool):
            words = [flag if value else flag.replace("--", "--no-", 1)]
        else:
            words = [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        assert shlex.join(words) == " ".join(words), f"{words} would need quotes"
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {' '.join(words)}"], capture_output=True, text=True)
        assert shell.stdout.split("\n")[:-1] == words
        assert words[0] in flags, f"{words[0]} is how the command line has it"
