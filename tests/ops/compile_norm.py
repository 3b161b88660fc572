"""Compiles the gated norm's kernels for a GPU that need not be here: `python -m tests.ops.compile_norm 90 bf16 96 768`.

With the specialisations of a launch. Prints JSON: for each number of channels and kernel what it takes, and the widths in
bytes of what it loads and stores of maps.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from medtune.ops import norm_kernels as kernels
from medtune.ops import triton_norm
from tests.ops.compile_triton import compiled, resources


def used(kernel: Any, capability: int, dtype: str, channels: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"GATED": True, **triton_norm._sizes(channels)}
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    made = compiled(kernel, capability, dtype, settings, **options)
    ptx = made.asm["ptx"]
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", ptx)
    loaded = re.findall(r"ld\.global(?:\.\w+)*?\.v(\d)\.b32", ptx)
    stored = re.findall(r"st\.global(?:\.\w+)*?\.v(\d)\.b32", ptx)
    return {
        **resources(made),
        "copied": sorted({int(width, 16) for width in copied}),
        "loaded": sorted({4 * int(width) for width in loaded}),
        "stored": sorted({4 * int(width) for width in stored}),
    }


def main() -> None:
    capability, dtype, channels = int(sys.argv[1]), sys.argv[2], [int(number) for number in sys.argv[3:]]
    found = {
        f"{number}, {kernel.__name__}": used(kernel, capability, dtype, number)
        for number in channels
        for kernel in (kernels.norm_forward, kernels.norm_backward)
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
