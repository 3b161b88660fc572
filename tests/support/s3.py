"""An S3 server on this machine, for tests: `moto`, in a process of its own, which can be stopped and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from medtune.storage.bucket import Bucket
from medtune.storage.home import LEDGER
from medtune.storage.segments import Segments

_SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass
class S3:
    """The server, with a bucket named `sweeps`."""

    process: subprocess.Popen[str]
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """What a client is told."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> fs.S3FileSystem:
        """Looks at what is there, apart from the code that is tested."""
        told = self.environment
        return fs.S3FileSystem(
            access_key=told["AWS_ACCESS_KEY_ID"],
            secret_key=told["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Takes connections and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextmanager
def s3_server() -> Iterator[S3]:
    """The server while it is needed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    while line and not line.strip().isdigit():
        line = process.stdout.readline()
    server = S3(process, int(line))
    try:
        _make_bucket(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _make_bucket(server: S3) -> None:
    for _ in range(50):
        try:
            server.client().create_dir("sweeps")
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")


def put_study(root: Bucket, folder: Path) -> Bucket:
    """Bring a study that was made in a folder, and its stage of finalists, into a bucket, as drivers leave them there."""
    bucket = root.under(folder.name)
    Segments(bucket.under("ledger")).begin(folder / LEDGER, None)
    for path in folder.rglob("*"):
        key = str(path.relative_to(folder))
        if path.is_file() and key != LEDGER and not key.startswith("stages/"):
            bucket.upload(path, key)
    for stage in folder.glob("stages/*"):
        put_study(bucket.under("stages"), stage)
    return bucket


@contextmanager
def told(server: S3) -> Iterator[None]:
    """This process, and those it starts, talk to the server."""
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
