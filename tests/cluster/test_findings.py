"""Every rule, over made facts: what is an error, what a warning, what is named and what the remedy is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from medtune.cluster.doctor import scan_used
from medtune.cluster.findings import diagnose, in_words, together
from medtune.cluster.nodes import Node

GIB = 2**30
CARD = {"index": 0, "uuid": "GPU-1111", "name": "NVIDIA RTX 4080", "total": 16 * GIB, "free": 15 * GIB, "holders": []}
SMALL = {**CARD, "index": 1, "uuid": "GPU-2222", "name": "NVIDIA RTX 2080 Ti", "total": 11 * GIB, "free": 10 * GIB}
FILES = {"trial.py": "a" * 16, "models/vim.py": "b" * 16}
FACTS: dict[str, Any] = {
    "hostname": "w1",
    "python": "3.11.7",
    "packages": {"ray": "2.60.0", "torch": "2.14.1", "numpy": "2.4.6"},
    "torch_cuda": "13.0",
    "driver_cuda": "13.1",
    "gpus": [CARD],
    "medtune": {"version": "0.1.0", "folder": "/root/medtune/medtune", "digest": "d1", "files": FILES},
    "kernels": [],
    "compiler": True,
    "scan": None,
    "packs": [],
    "disks": [{"uses": ["temporary", "cache", "home", "storage"], "path": "/", "free": 50e9, "total": 100e9}],
    "storage": {"path": "/mnt/studies", "read": True, "reason": None},
    "cpus": 8,
}
DRIVER = Node(id="", ip="this machine", facts={**FACTS, "hostname": "head"})


def node(number: int = 1, gpus: float = 1.0, **facts: Any) -> Node:
    """A node that is as it should be but for what is given."""
    told = {**copy.deepcopy(FACTS), "hostname": f"w{number}", **facts}
    return Node(id=f"id{number}", ip=f"10.0.0.{number}", gpus=gpus, facts=told)


def medtune(files: dict[str, str], version: str = "0.1.0") -> dict[str, Any]:
    return {**FACTS["medtune"], "version": version, "digest": "d2", "files": files}


def test_nothing_is_wrong_with_equal_nodes_whatever_their_gpus_are():
    small, none = replace(node(2), facts={**FACTS, "gpus": [SMALL]}), replace(node(3, 0.0), facts={**FACTS, "gpus": []})
    assert diagnose([node(1), small, none], DRIVER) == []


@pytest.mark.parametrize(
    ("wrong", "severity", "says"),
    [
        ({"python": "3.12.1"}, "error", "Python 3.12.1, the driver has 3.11.7"),
        ({"python": "3.11.9"}, "warning", "Python 3.11.9"),
        ({"packages": {**FACTS["packages"], "torch": "2.13.0"}}, "error", "pip install 'torch==2.14.1'"),
        ({"packages": {**FACTS["packages"], "numpy": "2.4.5"}}, "warning", "numpy 2.4.5, the driver has 2.4.6"),
        ({"packages": {**FACTS["packages"], "numpy": None}}, "error", "numpy is not installed"),
        ({"medtune": None}, "error", "file_mounts"),
        ({"medtune": medtune({**FILES, "trial.py": "c" * 16})}, "error", ": trial.py differs. "),
        ({"medtune": medtune({"trial.py": "a" * 16, "new.py": "c" * 16})}, "error", "models/vim.py, new.py differ. "),
        ({"medtune": medtune({}, "0.0.9")}, "error", "medtune 0.0.9, the driver has 0.1.0"),
        ({"medtune": medtune({})}, "error", "ray up --no-restart cluster.yaml"),
        ({"torch_cuda": None}, "error", "built without CUDA"),
        ({"driver_cuda": "12.4"}, "error", "built for CUDA 13.0, its GPU driver supports 12.4 at most"),
        ({"gpus": []}, "warning", "Ray counts 1 GPUs, nvidia-smi sees 0"),
        ({"gpus": [CARD, {**CARD, "index": 1}]}, "warning", "Ray counts 1 GPUs, nvidia-smi sees 2"),
        ({"gpus": [{**CARD, "free": 8 * GIB, "holders": ["python (process 7)"]}]}, "warning", "held by python (process 7)"),
        ({"gpus": [{**CARD, "free": GIB}]}, "error", "has 1.0 GiB of 16.0 GiB free"),
        ({"storage": {"path": "/mnt", "read": False, "reason": "no such folder"}}, "error", "no such folder"),
        ({"storage": {"path": "/mnt", "read": False, "reason": None}}, "error", "the driver wrote is not there"),
        ({"storage": {"path": "/mnt", "read": True, "reason": "OSError: Read-only"}}, "error", "Read-only"),
        ({"disks": [{"uses": ["storage"], "path": "/mnt", "free": 1.9e9}]}, "error", "1.9 GB free in /mnt (storage)"),
        ({"disks": [{"uses": ["temporary"], "path": "/tmp", "free": 9e9}]}, "warning", "10 GB are enough"),
        ({"disks": [{"uses": ["cache", "home"], "path": "/root", "free": 0.4e9}]}, "error", "0.4 GB free in /root"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_node_and_remedy(wrong, severity, says):
    [finding] = diagnose([node(1), broken(wrong)], DRIVER)
    assert (finding.severity, finding.node) == (severity, "w2 (10.0.0.2)")
    assert says in str(finding)


def broken(changes: dict[str, Any]) -> Node:
    """Node 2, with other facts."""
    fine = node(2)
    return replace(fine, facts={**fine.facts, **changes})


def test_two_kinds_in_one_host_are_refused_with_the_way_to_hide_one():
    both = replace(broken({"gpus": [CARD, SMALL]}), gpus=2.0)
    [finding] = diagnose([both], DRIVER)
    assert finding.severity == "error" and "RTX 2080 Ti, NVIDIA RTX 4080" in finding.what
    assert "CUDA_VISIBLE_DEVICES=GPU-1111 " in finding.remedy


def test_what_a_node_writes_must_be_seen_by_the_driver():
    [finding] = diagnose([replace(node(), storage_seen=False)], DRIVER)
    assert finding.severity == "error" and "does not see what is written into /mnt/studies" in finding.what


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ((-5.0, 0.1), None),  # a slow answer: nothing is certain
        ((2.5, 2.7), "warning: w1 (10.0.0.1): its clock is 2.5 s ahead of"),
        ((-40.0, -35.0), "error: w1 (10.0.0.1): its clock is 35.0 s behind"),
        ((-1.0, 1.0), None),
    ],
)
def test_clocks_are_judged_by_what_is_certain(bounds, says):
    words = in_words(diagnose([replace(node(), skew=bounds)], DRIVER))
    assert words.startswith(says) if says else words == ""


def test_a_node_that_does_not_answer_is_an_error():
    [finding] = diagnose([Node(id="x", ip="10.0.0.9", silence="no answer within 45 s")], DRIVER)
    assert str(finding).startswith("10.0.0.9: does not answer: no answer within 45 s")


def test_a_kernel_on_some_nodes_with_gpus_only():
    without_gpus = replace(broken({"gpus": []}), gpus=0.0)
    having = node(kernels=["mamba-ssm"])
    assert diagnose([having, without_gpus], DRIVER) == []
    [finding] = diagnose([having, node(2), node(3)], DRIVER)
    assert finding.severity == "warning" and "not on w2 (10.0.0.2), w3 (10.0.0.3)" in finding.what


@pytest.mark.parametrize(
    ("facts", "engine"),
    [
        ({}, "torch"),
        ({"kernels": ["mamba-ssm"]}, "mamba"),
        ({"kernels": ["triton", "mamba-ssm"]}, "triton"),
        ({"kernels": ["triton", "mamba-ssm"], "compiler": False}, "mamba"),
        ({"kernels": ["triton", "mamba-ssm"], "scan": "torch"}, "torch"),
        ({"kernels": [], "scan": "mamba"}, "asks for mamba, which is not there: mamba-ssm is not installed"),
        ({"kernels": ["triton"], "compiler": False, "scan": "triton"}, "Triton needs a C compiler"),
        ({"scan": "fast"}, "MEDTUNE_SCAN must be one of triton, mamba, torch"),
    ],
)
def test_the_scan_of_a_node_or_why_there_is_none(facts, engine):
    told = node(**facts)
    findings = diagnose([told], DRIVER)
    findings = [f for f in findings if "figures may differ" not in f.what]
    if engine in ("torch", "mamba", "triton"):
        assert scan_used(told) == engine and findings == []
    else:
        [finding] = findings
        assert scan_used(told) == "none" and finding.severity == "error" and engine in finding.what
    assert scan_used(replace(told, facts={**told.facts, "gpus": []})) == "torch"


def test_the_same_on_several_nodes_is_said_once_errors_first():
    old = {"python": "3.11.9"}
    findings = diagnose([broken(old), replace(broken({**old, "medtune": None}), ip="10.0.0.3")], DRIVER)
    merged = together(findings)
    assert [f.severity for f in merged] == ["error", "warning"]
    assert merged[1].node == "w2 (10.0.0.2), w2 (10.0.0.3)"
