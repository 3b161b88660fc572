"""Which scan runs: the fastest that is there, what MEDTUNE_SCAN says, and clear words where that cannot be."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import medtune.ops.engines as engines
import medtune.ops.scan as scan
from medtune.ops import selective_scan
from tests.ops.test_scan import inputs

ALL = {"triton": "", "mamba": "", "torch": ""}


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [({}, "triton"), ({"triton": "no compiler"}, "mamba"), ({"triton": "no compiler", "mamba": "not installed"}, "torch")],
)
def test_the_fastest_that_is_there(missing, chosen) -> None:
    assert engines.choose(None, {**ALL, **missing}) == chosen


def test_another_when_asked_for() -> None:
    assert [engines.choose(name, ALL) for name in engines.ENGINES] == list(engines.ENGINES)
    with pytest.raises(ValueError, match=r"MEDTUNE_SCAN must be one of triton, mamba, torch, .*, got 'cuda'"):
        engines.choose("cuda", ALL)
    with pytest.raises(ValueError, match="MEDTUNE_SCAN asks for mamba, which is not there: not installed"):
        engines.choose("mamba", {**ALL, "mamba": "not installed"})


def test_a_cpu_has_one_engine_but_a_misspelt_name_is_said(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for name in ("", *engines.ENGINES):
        monkeypatch.setenv("MEDTUNE_SCAN", name)
        assert engines.scan_engine(cpu) == "torch"
    monkeypatch.setenv("MEDTUNE_SCAN", "tritn")
    with pytest.raises(ValueError, match="'tritn'"):
        selective_scan(*inputs())


def test_a_gpu_asks_for_what_it_has(monkeypatch) -> None:
    monkeypatch.delenv("MEDTUNE_SCAN", raising=False)
    monkeypatch.setattr(engines, "_missing", lambda index: {**ALL, "triton": f"no compiler on {index}"})
    assert engines.scan_engine(torch.device("cuda", 1)) == "mamba"
    monkeypatch.setenv("MEDTUNE_SCAN", "triton")
    with pytest.raises(ValueError, match="no compiler on 1"):
        engines.scan_engine(torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("capability", "compiler", "why"), [((7, 0), "gcc", ""), ((6, 1), "gcc", "7.0"), ((9, 0), "", "a C compiler")]
)
def test_what_triton_needs(monkeypatch, capability, compiler, why) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(engines.shutil, "which", lambda name: f"/usr/bin/{name}" if name == compiler else None)
    said = engines._no_triton(0)
    assert why in said if why else said == ""


def test_mamba_is_there_when_it_can_be_imported(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert "cannot be imported" in engines._no_mamba()
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert engines._no_mamba() == ""


@pytest.mark.parametrize("engine", ["mamba", "triton"])
def test_the_chosen_one_computes(monkeypatch, engine) -> None:
    asked = []
    monkeypatch.setattr(scan, "scan_engine", lambda device: engine)
    monkeypatch.setattr(scan, "_cuda_kernel", lambda: "mamba's")
    monkeypatch.setattr(scan, "_by_kernel", lambda kernel, u, *rest: asked.append("mamba") or u)
    monkeypatch.setattr(scan, "_by_triton", lambda u, *rest: asked.append("triton") or u)
    selective_scan(*inputs())
    selective_scan(*(v.double() for v in inputs()))  # the kernels know no float64
    assert asked == [engine]
