"""The front over replicas that are played: what is refused, how, and that nothing hangs."""

import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from medtune.deploy.front import SILENCE, Fleet, Front, Limits, ReplicaLost
from medtune.deploy.serving import address, answering, listen
from tests.support.made_bundle import picture, png

TOKEN = "a-token-of-some-length"
LIMITS = Limits(max_bytes=50_000, waiting=2, seconds=1.0)


class Played:
    """Replicas that answer with the number of bytes they were given, as `does` says."""

    def __init__(self):
        self.fleet = Fleet(1, ask=self.ask)
        self.fleet.note(1, "")
        self.does = "answer"

    async def ask(self, image, heat_map):
        if self.does == "hang":
            await asyncio.sleep(60)
        if self.does == "wait":
            await asyncio.sleep(0.5)
        if self.does == "die":
            raise ReplicaLost
        if self.does == "fail":
            raise RuntimeError("no such thing")
        return 200, {"bytes": len(image), "heat_map": heat_map}


@contextlib.contextmanager
def front(token=None):
    played = Played()
    with listen("127.0.0.1", 0) as listener:
        url = address(listener)
        with answering(Front(played.fleet, LIMITS, {"bundle": "b"}, token), listener):
            yield url, played


@pytest.fixture(scope="module")
def open_front():
    with front() as found:
        yield found


@pytest.fixture
def url(open_front):
    url, played = open_front
    played.does = "answer"
    played.fleet.note(1, "")
    return url


def send(url, data=b"image", kind="image/png", **more):
    headers = {"Content-Type": kind} if kind else {}
    return requests.post(f"{url}/predict", data=data, headers=headers | more.pop("headers", {}), timeout=10, **more)


def refused(reply, status, *words):
    body = reply.json()
    assert reply.status_code == status, body
    assert set(body) == {"error", "rule", "way_out"}
    for word in words:
        assert word in json.dumps(body)


def raw(url, request, seconds=5.0):
    """What is answered to bytes sent as they are."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
            if answer.endswith((b"}", b"received.")):
                break
        return answer.decode()


def head(length, kind="image/png"):
    return f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_an_image_as_the_body_and_in_a_form_are_the_same(url):
    image = png(picture(0))
    bodies = [send(url, image).json(), requests.post(f"{url}/predict", files={"any": image}, timeout=10).json()]
    assert bodies == [{"bytes": len(image), "heat_map": False}] * 2
    assert send(url, image, params={"heatmap": "1"}).json()["heat_map"]


def test_the_name_of_a_file_is_not_looked_at(url):
    for name in ("../../etc/passwd", "/etc/passwd", "..\\..\\a.png"):
        reply = requests.post(f"{url}/predict", files={"file": (name, b"12345")}, timeout=10)
        assert reply.json() == {"bytes": 5, "heat_map": False}
    refused(requests.post(f"{url}/predict", files={"file": ("x" * 20_000, b"12345")}, timeout=10), 400, "cannot be read")


FORM = "multipart/form-data; boundary=b"
FIELD = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'
CUT_SHORT = b'--b\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "data", "status", "word"),
    [
        ("text/plain", b"a", 415, "text/plain"),
        (None, b"a", 415, "missing"),
        ("image/png", b"", 400, "empty"),
        ("image/png", b"a" * 50_001, 413, "0.05 MB"),
        ("image/png", iter([b"a" * 30_000] * 2), 413, "0.05 MB"),
        ("multipart/form-data", b"a", 400, "boundary"),
        (FORM, b"nothing of the kind", 400, "form"),
        (FORM, FIELD, 400, "no file"),
        (FORM, CUT_SHORT, 400, "no file"),
    ],
)
def test_what_is_no_image_upload_is_refused(url, kind, data, status, word):
    refused(send(url, data, kind), status, word)


def test_two_files_are_not_taken_for_one(url):
    refused(requests.post(f"{url}/predict", files={"a": b"1", "b": b"2"}, timeout=10), 400, "one file")


def test_a_flag_that_is_neither_on_nor_off_is_refused(url):
    refused(send(url, params={"heatmap": "yes"}), 400, "'yes'", "0 or 1")


def test_other_paths_and_methods_are_named(url):
    refused(requests.get(f"{url}/nothing", timeout=10), 404, "/nothing", "POST /predict")
    refused(requests.get(f"{url}/predict", timeout=10), 405, "POST /predict")
    refused(requests.post(f"{url}/health", timeout=10), 405)


def test_a_hundred_megabytes_are_answered_and_not_kept(url):
    refused(send(url, iter([b"a" * 1_000_000] * 100)), 413)
    assert "413" in raw(url, head(10**8))  # known before anything is read


def test_an_upload_that_stays_away_is_not_waited_for(url):
    start = time.monotonic()
    refused_early = raw(url, head(1000) + b"some")
    assert "408" in refused_early and "did not arrive" in refused_early
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HT"])
def test_a_request_whose_head_stays_away_is_hung_up_on(url, begun, monkeypatch):
    monkeypatch.setattr("medtune.deploy.patience.SECONDS", 0.3)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        connection.sendall(begun)
        while connection.recv(65536):
            pass
    assert requests.get(f"{url}/health", timeout=10).json()["inside"] == 0


def test_who_is_slower_than_a_head_may_be_is_heard_out_once_it_is_there(url, open_front, monkeypatch):
    monkeypatch.setattr("medtune.deploy.patience.SECONDS", 0.2)
    _, played = open_front
    played.does = "wait"
    assert send(url, iter([b"a", b"b"])).json()["bytes"] == 2


def test_lengths_that_are_wrong(url):
    assert raw(url, head("many")).startswith("HTTP/1.1 400")
    assert raw(url, head(-1)).startswith("HTTP/1.1 400")
    assert '"bytes":3' in raw(url, head(3) + b"longer than said")


def test_a_client_that_hangs_up_leaves_its_place(url):
    host, port = url.removeprefix("http://").split(":")
    for _ in range(LIMITS.waiting + 1):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head(1000) + b"some")
    time.sleep(0.3)
    assert requests.get(f"{url}/health", timeout=10).json()["inside"] == 0
    assert send(url).status_code == 200


def test_more_requests_than_places_are_refused_at_once_and_the_places_come_back(url, open_front):
    _, played = open_front
    played.does = "wait"
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: send(url), range(12)))
    full = [reply for reply in replies if reply.status_code != 200]
    assert len(replies) - len(full) == LIMITS.waiting
    for reply in full:
        refused(reply, 503, "too many", "2 requests")
        assert int(reply.headers["Retry-After"]) >= 1
    assert send(url).status_code == 200


def test_what_goes_wrong_behind_has_a_status_of_its_own(url, open_front):
    _, played = open_front
    played.does = "hang"
    start = time.monotonic()
    refused(send(url), 504, "1 s")
    assert time.monotonic() - start < 3
    played.does = "die"
    reply = send(url)
    refused(reply, 503, "died", "again")
    assert reply.headers["Retry-After"]
    played.does = "fail"
    reply = send(url)
    refused(reply, 500)
    assert "no such thing" not in reply.text
    played.does = "answer"
    assert send(url).status_code == 200


def test_health_tells_up_from_down(url, open_front):
    _, played = open_front
    up = requests.get(f"{url}/health", timeout=10)
    assert (up.status_code, up.json()) == (200, {"status": "up", "replicas": {"up": 1, "wanted": 1}, "inside": 0})
    played.fleet.note(0, "it starts again")
    down = requests.get(f"{url}/health", timeout=10)
    assert (down.status_code, down.json()["status"], down.json()["reason"]) == (503, "down", "it starts again")
    refused(send(url), 503, "no replica is up", "it starts again")
    played.fleet.note(1, "")
    played.fleet.seen -= SILENCE + 1
    assert requests.get(f"{url}/health", timeout=10).json()["reason"].startswith("nothing was heard")


def test_who_has_no_token_gets_no_prediction(capfd):
    with front(TOKEN) as (url, _):
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"bearer {TOKEN}"}):
            reply = send(url, headers=given)
            refused(reply, 401, "Bearer")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        refused(requests.get(f"{url}/version", timeout=10), 401)
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert send(url, headers=right).status_code == 200
        assert requests.get(f"{url}/version", headers=right, timeout=10).json() == {"bundle": "b"}
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        assert requests.get(f"{url}/", timeout=10).status_code == 200
    assert TOKEN not in "".join(capfd.readouterr())


def test_the_page_needs_nobody_else(url):
    reply = requests.get(f"{url}/", timeout=10)
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert "http://" not in reply.text and "https://" not in reply.text and "//cdn" not in reply.text
