"""What a machine tells of itself: which files count, which GPUs are seen, what the launcher's file and a bucket say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from moto.server import ThreadedMotoServer
from pyarrow import fs

from medtune import cli
from medtune.cluster import facts
from medtune.cluster.absent import absent, launcher
from medtune.cluster.buckets import use_bucket
from medtune.cluster.findings import diagnose
from medtune.cluster.nodes import Node, here

SMI = """#!/bin/sh
case "$1" in
*query-gpu=*) echo '0, GPU-aa11, NVIDIA RTX 4080, 16376, 15000'; echo '1, GPU-bb22, NVIDIA RTX 2080 Ti, 11264, 500' ;;
*) echo 'GPU-bb22, 4711, /usr/bin/python3, 10700' ;;
esac
"""


@pytest.fixture
def two_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def test_cards_with_their_memory_and_who_holds_it(two_cards: None):
    first, second = facts.gpus({})
    assert (first["name"], first["free"], first["holders"]) == ("NVIDIA RTX 4080", 15000 * 2**20, [])
    assert (second["total"], second["holders"]) == (11264 * 2**20, ["python3 (process 4711, 10700 MiB)"])


@pytest.mark.parametrize(
    ("named", "seen"), [("0", [0]), ("GPU-bb22", [1]), ("1,0", [0, 1]), ("", []), ("GPU-b", [1]), ("2", [])]
)
def test_hidden_cards_are_not_seen(two_cards: None, named: str, seen: list[int]):
    assert [card["index"] for card in facts.gpus({"CUDA_VISIBLE_DEVICES": named})] == seen


def test_a_machine_without_nvidia_smi_or_with_a_broken_one_has_no_cards(two_cards: None, tmp_path: Path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert facts.gpus({}) == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert facts.gpus({}) == []


def test_a_package_is_its_files_but_not_its_caches(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "models" / "own.py").write_text("x = 1\n")
    before = facts.package_in(tmp_path)
    assert before["version"] == "1.2.3" and list(before["files"]) == ["__init__.py", "models/own.py"]
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "own.pyc").touch()
    (tmp_path / ".own.py.swp").touch()
    assert facts.package_in(tmp_path)["digest"] == before["digest"]
    (tmp_path / "models" / "own.py").rename(tmp_path / "models" / "other.py")
    assert facts.package_in(tmp_path)["digest"] != before["digest"], "a name is content too"


def test_the_exchange_in_a_folder_that_is_another(tmp_path: Path):
    assert facts.exchange(tmp_path / "none", "t", "n")["reason"] == "no such folder"
    (tmp_path / ".doctor-t").mkdir()
    (tmp_path / ".doctor-t" / "driver").write_text("t")
    assert facts.exchange(tmp_path, "t", "n") == {"path": str(tmp_path), "read": True, "reason": None}
    assert (tmp_path / ".doctor-t" / "n").read_text() == "t"


def test_the_launchers_file_counts_for_its_own_cluster_alone(tmp_path: Path):
    path = tmp_path / "bootstrap.yaml"
    assert launcher(path) is None
    told = {"provider": {"type": "aws"}, "auth": {"ssh_user": "me"}}
    path.write_text(yaml.safe_dump(told))
    assert launcher(path) is None, "hosts of a cloud have no names before they are there"
    provider = {"type": "local", "head_ip": "127.0.0.1", "worker_ips": ["w.invalid"]}
    path.write_text(yaml.safe_dump(told | {"provider": provider}))
    found = launcher(path)
    [finding] = absent(found, [{"NodeManagerAddress": "127.0.0.1", "Alive": True}])
    assert finding.node == "w.invalid" and "there is no host of that name" in finding.what
    assert absent(found, [{"NodeManagerAddress": "127.0.0.2", "Alive": True}]) == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3://sweeps/lab` on a server of this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    where = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
    fs.S3FileSystem(access_key="testing", secret_key="testing", allow_bucket_creation=True, **where).create_dir("sweeps")
    yield "s3://sweeps/lab"
    server.stop()


def test_a_bucket_must_be_the_drivers_and_let_the_node_write(bucket: str):
    assert use_bucket(bucket, ".doctor-absent") == "what the driver wrote is not there"
    why = use_bucket("s3://nowhere/lab", ".doctor-absent")
    assert why is not None and "NO_SUCH_BUCKET" in why
    mine = here()
    node = Node(id="n", ip="10.0.0.2", facts={**mine.facts, "storage": {"path": bucket, "read": False, "reason": why}})
    [finding] = [f for f in diagnose([node], mine) if "nowhere" in f.what]
    assert finding.severity == "error" and finding.what.startswith(f"cannot work in {bucket}: cannot write to s3://nowhere")


def test_doctor_finds_code_that_was_edited_where_the_user_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    package = facts.package()
    assert package is not None
    command = ["doctor", "--storage", str(tmp_path), "--expect"]
    assert cli.main([*command, package["digest"]]) == 0
    assert cli.main([*command, "0" * 64]) == 1
    assert "ray up --no-restart cluster.yaml" in capsys.readouterr().out
    assert cli.main(["doctor", "--launcher", str(tmp_path / "none.yaml")]) == 2
