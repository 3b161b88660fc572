"""MedMamba's norms, scan branch and what stands between blocks: in Triton by its interpreter here, and on a GPU if any."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from medtune.ops.triton_norm import _programs, triton_gated_norm
from tests.ops.norm_cases import BESIDE, BLOCKS, CASES, LARGE, compare
from tests.ops.test_triton import assert_small, by_interpreter

FEW = (
    "three pieces, tiles one after the other", "odd channels, both halves of wider rows", "no gate",
    "bfloat16, halves of wider rows", "whole, recomputed", "whole, depths drawn", *BESIDE,
)  # fmt: skip


def test_equals_pytorch_in_float64() -> None:
    assert_small(by_interpreter(FEW, "norm_cases"))


@pytest.mark.slow
def test_equals_pytorch_in_the_other_cases_and_in_models() -> None:
    assert_small(by_interpreter([name for name in (*CASES, *BLOCKS) if name not in FEW], "norm_cases"))


def test_says_what_does_not_fit() -> None:
    y, z, one = torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 3), torch.ones(4)
    with pytest.raises(ValueError, match=r"y and z must be .* got \(1, 2, 2, 4\), \(1, 2, 2, 3\), \(4,\), \(4,\)"):
        triton_gated_norm(y, z, one, one, 1e-5)
    with pytest.raises(ValueError, match="eps must be above 0, got 0"):
        triton_gated_norm(y, None, one, one, 0)


@pytest.mark.parametrize(("tiles", "programs"), [(0, 1), (1, 1), (8, 8), (9, 5), (15, 8), (17, 6), (800, 8)])
def test_programs_share_the_tiles_out(tiles, programs) -> None:
    assert _programs(torch.ones(1), 16 * tiles, {"ROWS": 16, "BLOCK": 32}, each=8) == programs
    assert _programs(torch.ones(1), 16 * tiles, {"ROWS": 16, "BLOCK": 64}, each=16) == programs  # lanes have twice as much


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "widths"), [(90, "bf16", (8, 16)), (80, "fp32", (16, 16)), (75, "fp16", ())]
)
def test_compiles_without_spills_and_copies_ahead(capability, dtype, widths) -> None:
    """Maps come into shared memory, where GPUs can copy so, in as many bytes at once as a lane takes."""
    command = [sys.executable, "-m", "tests.ops.compile_norm", str(capability), dtype, "96", "768"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, used in json.loads(result.stdout).items():
        assert not used["spills"], f"{name}: {used}"
        assert used["copied"] == ([widths[name.startswith("768")]] if widths else []), f"{name}: {used}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *LARGE, *BESIDE])
def test_on_a_gpu(name) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_small({name: compare(name, "cuda")})
