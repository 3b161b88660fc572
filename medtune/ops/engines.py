"""Which implementation of the selective scan runs, and why; where it is ours, other kernels of ours run beside it.

`triton`: our kernels (`triton_scan.py`), for maps without copies of their readings; `mamba`: mamba-ssm's CUDA kernel;
`torch`: PyTorch operations (`chunks.py`), on any device and in float64. The first of these that is there is used, on a
CPU always the last; MEDTUNE_SCAN sets another.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil

import torch
from torch import Tensor

from medtune.ops.choice import ENGINES, VARIABLE, choose


@torch.compiler.assume_constant_result
def scan_engine(device: torch.device) -> str:
    """The engine for tensors on `device`. Raises ValueError when MEDTUNE_SCAN names none, or one that is not there."""
    wanted = os.environ.get(VARIABLE) or None
    if device.type != "cuda":
        return choose(wanted, {"torch": ""}) if wanted not in ENGINES else "torch"
    return choose(wanted, _missing(device.index if device.index is not None else torch.cuda.current_device()))


def in_kernels(x: Tensor) -> bool:
    """Whether our Triton kernels, the scan's and those around it, take x as it is: they know no float64."""
    return x.dtype != torch.float64 and scan_engine(x.device) == "triton"


@functools.cache
def _missing(index: int) -> dict[str, str]:
    """Why each engine cannot run on a GPU, "" where it can."""
    return {"triton": _no_triton(index), "mamba": _no_mamba(), "torch": ""}


def _no_triton(index: int) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the kernels were never run on AMD's GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < (7, 0):
        return f"it needs a GPU of compute capability 7.0, this one has {capability[0]}.{capability[1]}"
    compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]  # as `medtune doctor` asks a node (cluster/facts.py)
    if not any(name and shutil.which(name) for name in compilers):
        return "Triton needs a C compiler (gcc or clang, or what CC names)"
    return ""


def _no_mamba() -> str:
    try:
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as error:
        return f"mamba-ssm cannot be imported ({error})"
    return ""
