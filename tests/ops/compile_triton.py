"""Compiles kernels for a GPU that need not be here: `python -m tests.ops.compile_triton 90 bf16 scan` (or `depthwise`).

With the specialisations of a launch, which decide how tiles lie in lanes. Prints JSON: each kernel's registers, spilled
bytes, shared memory (used where values change lanes), exchanges between lanes and loads of less
than 32 bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medtune.ops import depthwise_kernels, triton_depthwise, triton_scan
from medtune.ops import triton_kernels as kernels

MAPS = ("u", "delta", "x", "y", "z", "out", "dy", "dz", "du", "ddelta", "ds", "dout")
FLOAT32 = ("A", "mix", "skip", "bias", "states", "sums", "dmix", "weight")
UNSPECIALISED = {"images", "length", "height", "width", "zero", "each", "eps"}
SETTINGS = {"HAS_SKIP": True, "HAS_BIAS": True, "SOFTPLUS": True, "MAP": True}
SIZES = {"N": 16, "M": 16 // triton_scan.WARPS, "G": triton_scan.WARPS, "T": triton_scan.CHUNK, "BLOCK": triton_scan.LANES}


def used(kernel: Any, capability: int, dtype: str, settings: dict[str, Any], **options: int) -> dict[str, int]:
    return resources(compiled(kernel, capability, dtype, settings, **options))


def compiled(kernel: Any, capability: int, dtype: str, settings: dict[str, Any], **options: int) -> Any:
    types = {name: "fp32" if name == "eps" else "i32" for name in kernel.arg_names}
    types |= {n: f"*{dtype}" for n in MAPS if n in types} | {n: "*fp32" for n in FLOAT32 if n in types}
    types |= {name: "constexpr" for name in settings}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    multiples = types.keys() - settings.keys() - UNSPECIALISED  # of 16, as sizes and addresses often are
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel takes of a multiprocessor, and how often lanes exchange values."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said.stdout + said.stderr))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": int(numbers["SHARED"]),
        "exchanges": compiled.asm["ptx"].count("shfl.sync"),
        "narrow": len(re.findall(r"ld\.global\S*\.[bu](8|16) ", compiled.asm["ptx"])),
    }


def scan(capability: int, dtype: str) -> dict[str, dict[str, int]]:
    def with_registers(kernel: Any, registers: int, **more: bool) -> dict[str, int]:
        options = {"num_warps": SIZES["G"], "num_stages": 1, "maxnreg": registers}
        return used(kernel, capability, dtype, SETTINGS | SIZES | more, **options)

    tensor_cores = {"MMA": capability >= 80, "EXACT": dtype == "fp32"}
    return {
        "forward": with_registers(kernels.scan_forward, triton_scan.FORWARD_REGISTERS, KEEP=True),
        "backward": with_registers(kernels.scan_backward, triton_scan.BACKWARD_REGISTERS, **tensor_cores),
    }


def depthwise(capability: int, dtype: str) -> dict[str, dict[str, int]]:
    """For a half of the channels of MedMamba's first stage."""
    x = torch.empty(1, 56, 56, 192, device="meta")[..., :96]
    strides = {"HAS_BIAS": True, "ROW": x.stride(1), "COLUMN": x.stride(2)}
    y = {"Y_ROW": 56 * 96, "Y_COLUMN": 96}
    forward, backward = (
        triton_depthwise._sizes(x, tile) | strides for tile in (triton_depthwise.TILE, triton_depthwise.BACKWARD_TILE)
    )
    warps = forward.pop("num_warps"), backward.pop("num_warps")
    dy = {"DY_ROW": 56 * 96, "DY_COLUMN": 96}
    both = depthwise_kernels.depthwise, depthwise_kernels.depthwise_backward
    return {
        "forward": used(both[0], capability, dtype, {**forward, **y, "BACK": False}, num_warps=warps[0]),
        "backward": used(both[1], capability, dtype, backward | dy, num_warps=warps[1]),
    }


def main() -> None:
    capability, dtype, kernels_of = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    print(json.dumps({"scan": scan, "depthwise": depthwise}[kernels_of](capability, dtype)))


if __name__ == "__main__":
    main()
