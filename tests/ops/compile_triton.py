"""Compiles the scan's kernels for a GPU that need not be here: `python -m tests.ops.compile_triton 90 bf16`.

With the specialisations of a launch, which decide how tiles lie in lanes. Prints JSON: each kernel's registers, spilled
bytes, shared memory (used where values change lanes) and exchanges between lanes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medtune.ops import triton_kernels as kernels
from medtune.ops import triton_scan

FLOAT32 = ("A", "mix", "skip", "bias", "states", "sums", "dmix")
UNSPECIALISED = {"images", "length", "height", "width", "zero"}
SETTINGS = {"HAS_SKIP": True, "HAS_BIAS": True, "SOFTPLUS": True, "MAP": True}
SIZES = {"N": 16, "M": 16 // triton_scan.WARPS, "G": triton_scan.WARPS, "T": triton_scan.CHUNK, "BLOCK": triton_scan.LANES}


def used(kernel: Any, capability: int, dtype: str, settings: dict[str, Any], registers: int) -> dict[str, int]:
    settings = SETTINGS | SIZES | settings
    pointers = {"u", "delta", "y", "dy", "du", "ddelta"}
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: f"*{dtype}" for name in pointers & types.keys()} | {n: "*fp32" for n in FLOAT32 if n in types}
    types |= {name: "constexpr" for name in settings}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    multiples = types.keys() - settings.keys() - UNSPECIALISED  # of 16, as sizes and addresses often are
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": settings["G"], "num_stages": 1, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
    }


def main() -> None:
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    backward = {"MMA": capability >= 80, "EXACT": dtype == "fp32"}
    found = {
        "forward": used(kernels.scan_forward, capability, dtype, {"KEEP": True}, triton_scan.FORWARD_REGISTERS),
        "backward": used(kernels.scan_backward, capability, dtype, backward, triton_scan.BACKWARD_REGISTERS),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
