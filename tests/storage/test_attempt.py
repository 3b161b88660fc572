"""An attempt on a node that shares nothing with others but a bucket: real training, its record, its W&B files."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from medtune.errors import StorageFault
from medtune.record import read_events
from medtune.search.conductor import attempt_folder
from medtune.storage import attempt as attempt_module
from medtune.storage.attempt import BucketWorkplace, workplace
from medtune.storage.bucket import Bucket
from medtune.storage.home import BucketHome
from medtune.trial import Attempt, AttemptSpec

pytestmark = pytest.mark.usefixtures("one_thread", "small_data", "no_patience_left")


@pytest.fixture
def no_patience_left(monkeypatch):
    """A process of a trial holds its patience to its end; this one has other tests to do."""
    monkeypatch.setattr("medtune.storage.patience._current", None)


@pytest.fixture
def spec(tiny_config, tmp_path):
    values = {
        "number": 7,
        "attempt": 1,
        "config": tiny_config(train_limit=32, external_limit=16, resamples=20).to_dict(),
        "study": "s-1",
        "folder": str(tmp_path / "driver"),
        "rungs": (1, 2),
        "data_dir": None,
        "external_dir": None,
        "external_fallback": False,
        "wandb": "off",
        "wandb_project": "p",
        "threads": 1,
        "storage_patience": 1.0,
    }
    return AttemptSpec(**values)


class Node:
    """What `MedtuneTrial` does for an attempt, without Ray."""

    def __init__(self, spec):
        self.place = workplace(spec)
        self.attempt = Attempt(self.place.begin())

    def step(self):
        report = self.attempt.next_report()
        self.place.before_report()
        return report

    def leave(self):
        self.place.before_close()
        self.attempt.close()
        self.place.end()


def figures(report):
    return {k: v for k, v in report.to_dict().items() if k not in ("seconds", "attempt", "node")}


def keys(bucket, ending=""):
    return sorted(key for key in bucket.files("trials/0007") if key.endswith(ending))


def test_a_trial_goes_on_on_another_node_as_if_nothing_had_been(spec, bucket, head, monkeypatch):
    monkeypatch.setattr(attempt_module, "LONGEST_WAIT", 0.0)  # epochs of milliseconds, each with its checkpoint
    study = bucket.under("s")
    spec = replace(spec, storage=study.uri)
    alone = Node(replace(spec, storage=bucket.under("alone").uri))
    straight = [alone.step() for _ in range(4)]
    alone.leave()
    first = Node(spec)
    first.step()
    assert keys(study) == [
        "trials/0007/attempt-1/checkpoints/best-0001.safetensors",
        "trials/0007/attempt-1/checkpoints/last-0001.safetensors",
        "trials/0007/attempt-1/epochs.jsonl",
    ]
    begun = first.step()
    line = json.loads(study.read("trials/0007/attempt-1/epochs.jsonl").splitlines()[-1])
    assert line["report"] == json.loads(json.dumps(begun.to_dict())), "what the driver hears is there already"
    head("second")  # and the first is never heard of again
    second = Node(replace(spec, attempt=2))
    ended = [second.step() for _ in range(2)]
    assert figures(ended[-1]) == figures(straight[-1]) and [r.epoch for r in ended] == [3, 4]
    assert json.loads(study.read("trials/0007/attempt-2/final.json"))["status"] == "complete"
    second.leave()
    assert not second.place.folder.exists(), "a node keeps nothing"
    assert len(keys(study, "attempt-2/checkpoints/last-0004.safetensors")) == 1


def test_the_driver_reads_the_record_and_tidies_in_the_bucket(spec, bucket, head, tmp_path, monkeypatch):
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)
    study = bucket.under("s")
    node = Node(replace(spec, storage=study.uri))
    report = [node.step() for _ in range(4)][-1]
    head("driver")
    home = BucketHome(bucket, "s", 1.0)
    with home.driven(print):
        (home.folder / "study.json").write_text('{"id": "s-1"}')
        home.ledger.write_text("0\n")
        with home.begun():
            home.before_hearing(7, 1)
            here = attempt_folder(home.folder / "trials", 7, 1)
            assert json.loads((here / "final.json").read_text()) == json.loads(json.dumps(report.to_dict()))
            assert not (here / "checkpoints").exists(), "weights stay where they are"
            home.settle(7, "COMPLETE", {7: 1})
    best = f"trials/0007/attempt-1/checkpoints/best-{report.best['epoch']:04d}.safetensors"
    assert keys(study, ".safetensors") == [best]
    assert json.loads(study.read("trials/0007/outcome.json")) == {"state": "COMPLETE"}
    node.leave()
    assert keys(study, ".safetensors") == [best], "what was deleted does not come back"


def test_checkpoints_that_take_long_to_send_are_sent_less_often(spec, bucket, head, monkeypatch):
    study = bucket.under("s")
    node = Node(replace(spec, storage=study.uri))
    node.step()
    node.place._next_checkpoint = float("inf")  # the first took for ever
    node.step()
    there = [f"trials/0007/attempt-1/checkpoints/{kind}-0001.safetensors" for kind in ("best", "last")]
    assert keys(study, ".safetensors") == there
    assert len(study.read("trials/0007/attempt-1/epochs.jsonl").splitlines()) == 2
    node.leave()
    assert any("last-0002" in key for key in keys(study)), "an interrupted trial leaves its newest"


def test_the_wandb_files_reach_the_bucket_and_the_driver(spec, bucket, head, monkeypatch):
    monkeypatch.setattr("medtune.storage.lease._SETTLE", 0.0)
    study = bucket.under("s")
    node = Node(replace(spec, storage=study.uri))
    run = node.place.folder / "wandb" / "offline-run-1"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "debug.log").write_text("not needed")
    (run / "run-s-1-0007.wandb").write_bytes(b"half")
    node.place._next_wandb = 0.0
    node.step()
    assert study.read("wandb/offline-run-1/run-s-1-0007.wandb") == b"half"
    (run / "run-s-1-0007.wandb").write_bytes(b"the whole")
    (run / "medtune.json").write_text('{"state": "COMPLETE"}')
    node.leave()
    head("driver")
    home = BucketHome(bucket, "s", 1.0)
    home.fetch_wandb()
    here = {path.name: path.read_bytes() for path in (home.folder / "wandb").rglob("*") if path.is_file()}
    assert here == {"run-s-1-0007.wandb": b"the whole", "medtune.json": b'{"state": "COMPLETE"}'}
    (home.folder / "wandb" / "offline-run-1" / "uploaded.json").write_text("{}")
    home.return_marks()
    assert study.read("wandb/offline-run-1/uploaded.json") == b"{}"


def test_what_fits_into_memory_is_known_to_other_nodes(spec, bucket, head):
    spec = replace(spec, storage=bucket.under("s").uri)
    first = Node(spec)
    first.step()
    first.attempt.begun.remembered.write(4)
    first.place.before_report()
    head("second")
    second = Node(replace(spec, attempt=2))
    second.step()
    assert second.attempt.begun.remembered.read() == 4


def test_a_bucket_that_fails_for_long_is_no_failure_of_the_trial(spec, bucket, head, monkeypatch):
    node = Node(replace(spec, storage=bucket.under("s").uri))
    node.step()

    def gone(self, key, data):
        raise OSError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", gone)
        with pytest.raises(StorageFault, match=r"trial 7 in s3://.*: nobody answers, for \d s \(--storage-patience 1\)"):
            node.step()


def test_what_a_killed_process_left_is_swept_up_by_the_next(spec, bucket, head, monkeypatch):
    monkeypatch.setattr(attempt_module, "_GRACE", 0.0)
    spec = replace(spec, storage=bucket.under("s").uri)
    killed, living = BucketWorkplace(spec), BucketWorkplace(replace(spec, number=8))
    killed.begin()
    living.begin()
    os.close(killed._held)  # what the kernel does
    BucketWorkplace(replace(spec, number=9)).begin()
    assert living.folder.exists() and not killed.folder.exists()


def test_two_writers_of_one_record_keep_each_other_s_lines(spec, bucket, head):
    study = bucket.under("s")
    spec = replace(spec, storage=study.uri)
    study.write("trials/0007/attempt-1/events.jsonl", b'{"kind":"theirs"}\n')
    place = BucketWorkplace(spec)
    place.begin()
    (place.attempt / "events.jsonl").write_text('{"kind":"ours"}\n')
    place.before_report()
    assert [event["kind"] for event in read_events(place.attempt)] == ["theirs", "ours"]
    assert study.read("trials/0007/attempt-1/events.jsonl") == (place.attempt / "events.jsonl").read_bytes()
