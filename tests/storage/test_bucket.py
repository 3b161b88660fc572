"""A bucket's objects, the ledger's pieces in it, and who drives a study there; against a real server on loopback."""

import json
import random

import pytest

from medtune.config import StudyConfig
from medtune.errors import ConfigError, StudyError
from medtune.storage import lease as lease_module
from medtune.storage.bucket import Bucket, is_bucket
from medtune.storage.lease import Lease, Replaced, is_driven
from medtune.storage.segments import Segments


def test_objects_are_written_whole_read_listed_and_deleted(either, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(random.Random(0).randbytes(7 << 20))
    either.write("a/small", b"small")
    either.write("a/empty", b"")
    either.upload(large, "a/b/large")
    assert either.read("a/small") == b"small" and either.read("a/empty") == b"" and either.read("a/none") is None
    sizes = {key: found.size for key, found in either.files("a").items()}
    assert sizes == {"a/small": 5, "a/empty": 0, "a/b/large": 7 << 20}
    assert either.download("a/b/large", tmp_path / "x" / "copy") and not either.download("none", tmp_path / "none")
    assert (tmp_path / "x" / "copy").read_bytes() == large.read_bytes() and not (tmp_path / "none").exists()
    either.delete(["a/small", "a/none", "a/b/large"])
    assert list(either.files()) == ["a/empty"] and either.names() == ["a"]
    assert either.under("nothing", "here").files() == {}


def test_a_bucket_that_cannot_be_used_is_named_with_the_answer_and_the_way_out(bucket, s3, monkeypatch):
    bucket.require_usable()
    assert bucket.files() == {}, "what was tried is gone again"
    with pytest.raises(StudyError, match=r"write to s3://nosuch/x: AWS Error NO_SUCH_BUCKET.*Create bucket 'nosuch'"):
        Bucket("s3://nosuch/x").require_usable()
    nobody = {**s3.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    with pytest.raises(StudyError, match=r"NETWORK_CONNECTION.*It is the server at http://127.0.0.1:9 \(AWS_ENDPOINT_URL\)"):
        Bucket("s3://sweeps/x", nobody).require_usable()


@pytest.mark.parametrize("uri", ["https://host/x", "s3://", "file:///x"])
def test_other_uris_are_refused(uri):
    with pytest.raises(ConfigError, match=r"storage must be .*s3://bucket/prefix or gs://bucket/prefix, got"):
        is_bucket(uri) and Bucket(uri)


def test_a_folder_is_no_bucket(tmp_path):
    assert not is_bucket(str(tmp_path)) and not is_bucket(None) and is_bucket("gs://b/c")
    assert StudyConfig(storage=tmp_path).storage == str(tmp_path)


def test_what_grew_is_appended_and_merged_and_reads_back_whole(either, tmp_path):
    path, rng = tmp_path / "ledger", random.Random(1)
    path.write_bytes(b"first\n")
    pieces = Segments(either)
    generation = pieces.begin(path, None)
    for number in range(60):
        with path.open("ab") as file:
            file.write(b"%d" % number * rng.randint(1, 40) + b"\n")
        pieces.append(path)
        pieces.merge(path)
        assert len(either.files()) == len(pieces.pieces) <= 3 * 8
    assert pieces.newest() == generation and Segments(either).read(generation) == path.read_bytes()


def test_a_line_that_is_not_whole_stays_here(bucket, tmp_path):
    path = tmp_path / "ledger"
    path.write_bytes(b"whole\nhal")
    pieces = Segments(bucket)
    generation = pieces.begin(path, None)
    assert pieces.read(generation) == b"whole\n"
    path.write_bytes(b"whole\nhalf\n")
    assert pieces.append(path) == 5 and pieces.read(generation) == b"whole\nhalf\n"


def test_a_reader_between_the_merging_and_the_deleting_reads_the_whole(bucket, tmp_path, monkeypatch):
    path = tmp_path / "ledger"
    path.write_bytes(b"0\n")
    pieces = Segments(bucket)
    generation = pieces.begin(path, None)
    for number in range(8):
        path.write_bytes(path.read_bytes() + b"%d\n" % number)
        pieces.append(path)
    monkeypatch.setattr(Bucket, "delete", lambda self, keys: None)
    pieces.merge(path)
    assert len(pieces.pieces) == 1 and len(bucket.files()) == 9
    assert Segments(bucket).read(generation) == path.read_bytes()


def test_each_driver_begins_a_generation_and_readers_take_the_newest(either, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"a\n")
    thought_dead, next_one = Segments(either), Segments(either)
    first = thought_dead.begin(old, None)
    new.write_bytes(next_one.read(first) + b"b\n")
    second = next_one.begin(new, first)
    old.write_bytes(b"a\nWRONG\n")
    thought_dead.append(old)
    reader = Segments(either)
    assert reader.newest() == second and reader.read(second) == b"a\nb\n"
    third = Segments(either).begin(new, second)
    assert {key.split("/")[0] for key in either.files()} == {second, third}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease_module, "STALE", 3.0)
    monkeypatch.setattr(lease_module, "_SETTLE", 0.1)


def elsewhere(bucket):
    """The claim of a process on another machine."""
    other = Lease(bucket, "s")
    other.mine |= {"host": "far", "pid": 77, "boot": "another"}
    return other


def test_a_driver_that_lives_is_named_to_the_second_and_a_silent_one_is_replaced(bucket, quick, monkeypatch):
    first, said = elsewhere(bucket), []
    first.acquire(said.append)
    assert not said and is_driven(bucket)

    def renewed(seconds):
        first.renew()

    with monkeypatch.context() as patch:
        patch.setattr(lease_module.time, "sleep", renewed)
        with pytest.raises(StudyError, match=r"study 's' is being run by process 77 on far since \d{4}-"):
            Lease(bucket, "s").acquire(said.append)
    assert "was driven by process 77 on far" in said[0] and "waiting up to" in said[0]
    second = Lease(bucket, "s")
    second.acquire(said.append)
    with pytest.raises(Replaced, match=rf"study 's' is driven by process {second.mine['pid']} on .* this one ends"):
        first.renew()
    second.renew()
    first.release()
    assert is_driven(bucket), "a lease is released by its holder alone"
    second.release()
    assert not is_driven(bucket)
    with pytest.raises(Replaced, match="was driven to its end by another process"):
        first.renew()


def test_a_dead_process_of_this_machine_is_replaced_at_once(bucket, monkeypatch):
    monkeypatch.setattr(lease_module, "_SETTLE", 0.1)
    dead = Lease(bucket, "s")
    dead.mine["began"] = "0"  # its number is another process's by now
    dead._write()
    said = []
    Lease(bucket, "s").acquire(said.append)
    assert not said


def test_a_driver_that_was_asleep_looks_before_it_writes(either, quick):
    first, second = elsewhere(either), Lease(either, "s")
    first.acquire(print)
    first.require()  # renewed just now: nobody is asked
    second.acquire(print)
    first.require()
    first.renewed -= lease_module.HELD
    with pytest.raises(Replaced):
        first.require()
    assert json.loads(either.read("lease.json"))["token"] == second.mine["token"]
