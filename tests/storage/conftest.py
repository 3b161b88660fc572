"""One S3 server for all tests of a module that ask for it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from medtune.storage.bucket import Bucket
from tests.support.gcs import gcs_server
from tests.support.s3 import S3, s3_server, told

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3) -> Iterator[Bucket]:
    """An empty place in it, which this process knows the way to."""
    with told(s3):
        yield Bucket(f"s3://sweeps/test-{os.getpid()}-{next(_numbers)}/studies")


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    with gcs_server() as address:
        yield address


@pytest.fixture(params=["s3", "gs"])
def either(request, monkeypatch) -> Bucket:
    """An empty place, in S3 and in a stand-in for GCS."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs"))
    return Bucket(f"gs://sweeps/test-{os.getpid()}-{next(_numbers)}/studies")


@pytest.fixture
def head(tmp_path, monkeypatch):
    """Makes this process work as on another machine: with caches of its own."""

    def move(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    move("first")
    return move
