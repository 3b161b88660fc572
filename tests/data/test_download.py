"""Downloads against a server that cuts, lies, stalls and refuses."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_server import FaultyServer

from medtune.data.download import Effort, Unreachable, fetch, md5_is
from medtune.errors import DataError

BODY = os.urandom(12 * 65_536)
RIGHT = md5_is(hashlib.md5(BODY).hexdigest())
QUICK = Effort(attempts=4, pause=0.01, timeout=(2, 0.5))

# Run in a process of its own: fetch(url, target) with the MD5 of what should come.
SCRIPT = """
import sys
from pathlib import Path
from medtune.data.download import fetch, md5_is
print(fetch([sys.argv[1]], Path(sys.argv[2]), md5_is(sys.argv[3])))
"""


@pytest.fixture(autouse=True)
def file(server: FaultyServer) -> None:
    server.files["file"] = BODY


def start(server: FaultyServer, target: Path) -> subprocess.Popen[str]:
    md5 = hashlib.md5(BODY).hexdigest()
    command = [sys.executable, "-c", SCRIPT, server.url("file"), str(target), md5]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_file_comes_whole_and_nothing_else_stays(server: FaultyServer, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    assert fetch([server.url("file")], target, RIGHT, QUICK) == server.url("file")
    assert target.read_bytes() == BODY
    assert {path.name for path in target.parent.iterdir()} <= {"file", "file.lock"}


def test_a_file_that_is_there_is_left_alone(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK) is None
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("with_length", [True, False])
def test_cut_connections_are_continued(server: FaultyServer, tmp_path: Path, with_length: bool) -> None:
    server.length = with_length
    server.faults = [("cut", 262_144), ("status", 503), "close", None] if with_length else [None]
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    if with_length:
        assert [wanted for _, wanted in server.requests] == [None, *["bytes=262144-"] * 3]


def test_a_later_call_continues_an_earlier_one(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("cut", 131_072)]
    with pytest.raises(DataError, match="131072 bytes are kept"):
        fetch([server.url("file")], tmp_path / "file", RIGHT, Effort(attempts=1, timeout=QUICK.timeout))
    assert not (tmp_path / "file").exists()
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert server.requests[-1][1] == "bytes=131072-"
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_server_that_ignores_range_starts_over(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("cut", 262_144), "no-range"]
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_file_that_changed_on_the_server_starts_over(server: FaultyServer, tmp_path: Path) -> None:
    other = bytes(reversed(BODY))
    server.faults = [("cut", 262_144)]
    with pytest.raises(DataError):
        fetch([server.url("file")], tmp_path / "file", RIGHT, Effort(attempts=1, timeout=QUICK.timeout))
    server.files["file"], server.etag = other, '"two"'
    fetch([server.url("file")], tmp_path / "file", md5_is(hashlib.md5(other).hexdigest()), QUICK)
    assert (tmp_path / "file").read_bytes() == other
    assert server.requests[-1][1] == "bytes=262144-"


def test_halves_of_different_files_are_thrown_away(server: FaultyServer, tmp_path: Path) -> None:
    """A server without ETags cannot tell that the file changed; the checksum does, and the second try is from 0."""
    server.etag = ""
    server.faults = [("cut", 262_144)]
    with pytest.raises(DataError):
        fetch([server.url("file")], tmp_path / "file", RIGHT, Effort(attempts=1, timeout=QUICK.timeout))
    other = bytes(reversed(BODY))
    server.files["file"] = other
    fetch([server.url("file")], tmp_path / "file", md5_is(hashlib.md5(other).hexdigest()), QUICK)
    assert (tmp_path / "file").read_bytes() == other
    assert [wanted for _, wanted in server.requests] == [None, "bytes=262144-", None]


def test_everything_there_but_not_moved_yet(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("cut", 786_431)]
    with pytest.raises(DataError):
        fetch([server.url("file")], tmp_path / "file", RIGHT, Effort(attempts=1, timeout=QUICK.timeout))
    (tmp_path / "file.part").write_bytes(BODY)
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)  # the server answers 416
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_wrong_checksum_names_both_sums_and_leaves_nothing(server: FaultyServer, tmp_path: Path) -> None:
    server.files["file"] = b"<html>Quota exceeded</html>"
    found, wanted = hashlib.md5(server.files["file"]).hexdigest(), hashlib.md5(BODY).hexdigest()
    with pytest.raises(DataError, match=rf"(?s)MD5 {found}, expected MD5 {wanted}: a web page"):
        fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert not list(tmp_path.glob("file*[!k]"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_final_and_the_next_address_is_tried(server: FaultyServer, tmp_path: Path, code: int) -> None:
    server.faults = [("status", code)]
    assert fetch([server.url("gone"), server.url("file")], tmp_path / "file", RIGHT, QUICK) == server.url("file")
    assert [path for path, _ in server.requests] == ["/gone", "/file"]


def test_404_everywhere_names_every_address_and_the_target(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404") as caught:
        fetch([server.url("a"), server.url("b")], tmp_path / "file", RIGHT, QUICK)
    assert not isinstance(caught.value, Unreachable)
    for part in (server.url("a"), server.url("b"), str(tmp_path / "file")):
        assert part in str(caught.value)


def test_attempts_are_bounded(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("status", 500)] * 100
    with pytest.raises(DataError, match=r"HTTP 500.*gave up after 4"):
        fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert len(server.requests) == 4


def test_a_silent_server_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = ["silent"] * 100
    begin = time.monotonic()
    with pytest.raises(Unreachable, match="does not answer"):
        fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert time.monotonic() - begin < 2.5


def test_a_stalled_transfer_is_continued(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("slow", 3)]
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.requests[1][1] == f"bytes={len(BODY) // 2}-"


def test_no_network(tmp_path: Path) -> None:
    server = FaultyServer()
    url = server.url("file")
    server.close()
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1.*does not answer"):
        fetch([url], tmp_path / "file", RIGHT, QUICK)


def test_a_read_only_folder_is_named(server: FaultyServer, tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(DataError, match=r"fixed cannot be written to.*--data-dir"):
        fetch([server.url("file")], folder / "file", RIGHT, QUICK)
    assert server.requests == []


def test_two_processes_download_once(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("slow", 1.5)]
    first = start(server, tmp_path / "file")
    while not server.requests:
        time.sleep(0.02)
    second = start(server, tmp_path / "file")
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[0][0].strip() == server.url("file")
    assert outputs[1][0].strip() == "None"
    assert "waiting" in outputs[1][1]
    assert len(server.requests) == 1
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_killed_download_is_continued_by_the_next(server: FaultyServer, tmp_path: Path) -> None:
    server.faults = [("slow", 30)]
    victim = start(server, tmp_path / "file")
    part = tmp_path / "file.part"
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = part.stat().st_size
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert server.requests[-1][1] == f"bytes={kept}-"
    assert (tmp_path / "file").read_bytes() == BODY


def test_quiet_when_not_a_terminal(server: FaultyServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch([server.url("file")], tmp_path / "file", RIGHT, QUICK)
    assert capfd.readouterr() == ("", "")
