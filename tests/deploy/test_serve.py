"""The real server, started as users start it, with two replicas: answers, lost replicas, and its end."""

import base64
import io
import json
import os
import signal
import struct
import subprocess
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from PIL import Image

from medtune.deploy.images import read_image
from medtune.deploy.predictor import Predictor
from medtune.deploy.serving import TOKEN, own_ray
from tests.support.made_bundle import make_bundle, picture, png
from tests.support.served import below, served, starting, wait_for

REPLICA = "ray::ServeReplica"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b")


@pytest.fixture(scope="module")
def images():
    """Of many sizes, grey and in colour."""
    return [png(picture(seed, side=20 + 13 * seed, colour=seed % 3 == 0)) for seed in range(24)]


@pytest.fixture(scope="module")
def expected(bundle, images):
    """What the predictor itself says of each alone."""
    predictor = Predictor.load(bundle)
    return [predictor.predict([read_image(image)])[0].to_dict() for image in images]


def is_answer(body, wanted):
    assert body["decision"] == wanted["decision"]
    assert body["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    assert body["unlike_training"] == wanted["unlike_training"]


def bomb(side=30_000):
    """A PNG of 900 million pixels, of which a part is there."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 1) * 300))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_answers_and_a_lost_replica_and_a_clean_end(bundle, images, expected, tmp_path):
    secret = "a-secret-of-some-length"
    with served(bundle, tmp_path, "--replicas", "2", env={TOKEN: secret}) as server:
        me = {"headers": {"Authorization": f"Bearer {secret}"}}
        assert server.predict(images[0]).status_code == 401
        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda image: server.predict(image, headers=dict(me["headers"])), images))
        for reply, wanted in zip(replies, expected, strict=True):
            is_answer(reply.json(), wanted)
        drawn = server.predict(images[3], form=True, params={"heatmap": "1"}, headers=dict(me["headers"])).json()
        is_answer(drawn, expected[3])
        with Image.open(io.BytesIO(base64.b64decode(drawn["heatmap"].removeprefix("data:image/png;base64,")))) as heat_map:
            assert heat_map.format == "PNG" and min(heat_map.size) >= 32
        for broken in (images[0][:100], b"no image", bomb()):
            reply = server.predict(broken, headers=dict(me["headers"]))
            assert reply.status_code == 422 and reply.json()["error"]
        version = requests.get(f"{server.url}/version", timeout=10, **me).json()
        assert version["bundle"] == drawn["bundle"] and version["threshold"] == 0.4
        one_is_lost(server, images, expected, me)
        family = below(server.process.pid)
        assert any("gcs_server" in line for _, line in family), family
        for pid, line in family:
            assert secret not in line and secret.encode() not in environment(pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert gone(pid for pid, _ in family)
        assert secret not in server.log.read_text()


def one_is_lost(server, images, expected, me):
    """A replica is killed while requests are under way: answers are right or 503, and it comes back."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.predict, image, headers=dict(me["headers"])) for image in images * 3]
        os.kill(server.processes(REPLICA)[0], signal.SIGKILL)
        replies = [each.result() for each in asked]
    for reply, wanted in zip(replies, expected * 3, strict=True):
        if reply.status_code == 200:
            is_answer(reply.json(), wanted)
        else:
            assert reply.status_code == 503 and reply.json()["way_out"]
            assert reply.headers["Retry-After"]
    until(lambda: server.health().json()["replicas"]["up"] == 2)
    is_answer(server.predict(images[5], headers=dict(me["headers"])).json(), expected[5])


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def environment(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except ProcessLookupError:
        return b""


def gone(pids):
    """Whether processes end within some seconds; those of others are not ours to wait for."""
    left = set(pids)
    end = time.monotonic() + 10
    while left and time.monotonic() < end:
        left = {pid for pid in left if alive(pid)}
        time.sleep(0.1)
    return not left


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_others_of_the_same_process_outlive_it(monkeypatch):
    """W&B's service, say, that a trial of this process began."""
    begun = []
    monkeypatch.setattr("medtune.deploy.serving._start", lambda: begun.append(subprocess.Popen(["sleep", "60"])))
    with subprocess.Popen(["sleep", "60"]) as other:
        with own_ray():
            pass
        assert begun[0].wait(1) == -signal.SIGKILL and other.poll() is None
        other.kill()


@pytest.mark.slow
def test_the_only_replica_is_lost_and_comes_back(bundle, images, expected, tmp_path):
    with served(bundle, tmp_path) as server:
        os.kill(server.processes(REPLICA)[0], signal.SIGKILL)
        until(lambda: server.health().status_code == 503, 10)
        assert server.health().json()["reason"]
        start = time.monotonic()
        assert server.predict(images[0]).status_code == 503
        assert time.monotonic() - start < 5
        until(lambda: server.health().status_code == 200)
        is_answer(server.predict(images[0]).json(), expected[0])
        assert "0 of 1 replicas up" in server.log.read_text()


@pytest.mark.slow
def test_a_replica_that_is_stuck_costs_its_requests_and_is_replaced(bundle, images, expected, tmp_path):
    with served(bundle, tmp_path, "--seconds", "2") as server:
        stuck = server.processes(REPLICA)[0]
        os.kill(stuck, signal.SIGSTOP)
        start = time.monotonic()
        assert server.predict(images[0]).status_code == 504
        assert time.monotonic() - start < 5
        until(lambda: not alive(stuck) and server.health().status_code == 200, 90)
        is_answer(server.predict(images[0]).json(), expected[0])


@pytest.mark.slow
def test_large_files_from_many_at_once(bundle, expected, images, tmp_path):
    """More than Ray's store for objects holds: it has to make room, not to fail."""
    large = images[1] + bytes(8_000_000)  # what follows an image's end is not looked at
    with served(bundle, tmp_path) as server, ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: server.predict(large), range(40)))
        for reply in replies:
            is_answer(reply.json(), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [2.0, 4.0, 7.0])
def test_nothing_is_left_however_early_it_ends(bundle, tmp_path, number, seconds):
    with starting(bundle, tmp_path) as (process, log):
        wait_for(log, "(replicas are starting)", process)
        time.sleep(seconds)
        # Ray's agents that have only just begun do not notice at once that Ray was killed.
        family = [pid for pid, line in below(process.pid) if number != signal.SIGKILL or "agent" not in line.lower()]
        process.send_signal(number)
        status = process.wait(30)
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0), log.read_text()
    assert gone(family)


@pytest.mark.slow
def test_a_replica_does_not_take_another_bundle(bundle, images, tmp_path):
    folder = make_bundle(tmp_path / "b")
    with served(folder, tmp_path) as server:
        before = server.predict(images[0]).json()["bundle"]
        folder.rename(tmp_path / "old")
        make_bundle(folder, seed=1)
        os.kill(server.processes(REPLICA)[0], signal.SIGKILL)
        until(lambda: server.health().status_code == 503, 10)
        time.sleep(10)
        assert server.health().status_code == 503
        assert server.predict(images[0]).status_code == 503
        (tmp_path / "b").rename(tmp_path / "new")
        (tmp_path / "old").rename(folder)
        until(lambda: server.health().status_code == 200, 60)
        assert server.predict(images[0]).json()["bundle"] == before
        assert json.loads((folder / "manifest.json").read_text())["sha256"].startswith(before)
