"""The Triton kernels: by Triton's interpreter here, compiled for GPUs that are not here, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from medtune.ops.triton_kernels import _sums_by_tensor_cores
from medtune.ops.triton_scan import _require_countable, launch_map
from tests.ops import ptx
from tests.ops.triton_cases import CONVOLVED, FEW, LARGE, LARGE_CONVOLVED, MAPS, SEQUENCES, allowed, compare


def by_interpreter(names: Sequence[str], cases: str = "triton_cases") -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", f"tests.ops.{cases}", *names]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_small(found: dict[str, dict[str, float]]) -> None:
    for name, errors in found.items():
        for of, error in errors.items():
            assert error < allowed(name), f"{name}, {of}: relative error {error:.1e}"


def test_equals_the_float64_loop_and_copied_readings() -> None:
    assert_small(by_interpreter(FEW))


def test_operators_keep_what_they_promise_pytorch() -> None:
    found = by_interpreter([], "operators")
    assert len(found) == 8 and not any(found.values()), found


def test_what_kernels_cannot_count_is_refused() -> None:
    def given(images: int, length: int, width: int) -> torch.Tensor:
        return torch.empty(1, images, length, width, device="meta")[..., :8].expand(4, -1, -1, -1)

    _require_countable(given(16383, 3, 8), given(16383, 3, 8))
    with pytest.raises(ValueError, match="at most 16383 images at once are scanned in 4 readings, got 16384"):
        _require_countable(given(16384, 3, 8))
    with pytest.raises(ValueError, match="1048577 positions of 2048 values each are too many to scan"):
        _require_countable(given(1, 3, 8), given(1, 2**20 + 1, 2048))
    far = torch.empty(1, 1025, 1024, 1, device="meta")
    with pytest.raises(ValueError, match="a map may have 1048576 positions, got 1025 x 1024"):
        launch_map(far, far, far, far, None, None, True, False)


@pytest.mark.parametrize(("split", "precision"), [(True, 1e-6), (False, 2e-3)])
def test_tensor_cores_add_up_each_row_for_the_lane_that_stores_it(split, precision) -> None:
    """The interpreter knows no PTX: here is a warp that does."""
    tiles = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)  # a row each, a column in each lane
    found = ptx.run(_sums_by_tensor_cores(split), list(tiles))
    lane = np.arange(32)
    row = 8 * (lane // 2 % 2) + 4 * (lane % 2) + 2 * (lane // 8 % 2) + lane // 16  # as `_sums_places` says
    np.testing.assert_allclose(found, tiles.sum(1)[row], atol=precision * np.abs(tiles).sum(1).max())


@pytest.mark.slow
def test_equals_the_float64_loop_in_the_other_cases_and_compiled() -> None:
    assert_small(by_interpreter([name for name in (*SEQUENCES, *MAPS, *CONVOLVED, "compiled") if name not in FEW]))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80, 75])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiles_with_few_spills(capability, dtype) -> None:
    """What the channels of a lane need is in its registers, but for some that wait, on GPUs that are not here."""
    found = compiled(capability, dtype, "scan")
    for kernel, used in found.items():
        assert used["spills"] <= 128, f"{kernel}: {used}"
    # What makes it fast: a channel's positions are in one lane. Only the backward pass' sums over channels cross lanes.
    # Four exchanges for each of a warp's four states, and four for dskip and dbias, over a chunk's rows, at the end.
    assert found["forward"]["exchanges"] == 0
    assert found["backward"]["exchanges"] == (20 if capability >= 80 else 324)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (75, "fp32")])
def test_the_convolution_compiles_to_registers_and_loads_of_two_channels(capability, dtype) -> None:
    found = compiled(capability, dtype, "depthwise")
    assert all(used["spills"] == 0 and used["narrow"] == 0 for used in found.values()), found
    assert found["forward"]["exchanges"] == found["forward"]["shared"] == 0


def compiled(capability: int, dtype: str, kernels: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.ops.compile_triton", str(capability), dtype, kernels]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SEQUENCES, *MAPS, *LARGE, *CONVOLVED, *LARGE_CONVOLVED])
def test_on_a_gpu(name) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_small({name: compare(name, "cuda")})
