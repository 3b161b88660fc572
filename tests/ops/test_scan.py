"""The selective scan against a plain float64 loop, and what it promises beside its values."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import medtune.ops.scan as scan_module
from medtune.ops import selective_scan
from medtune.ops.traced import traced_scan

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("y", "u", "delta", "A", "B", "C", "D", "delta_bias")


def loop(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """The definition, one position after the other, in float64."""
    u, delta, A, B, C = (v.double() for v in (u, delta, A, B, C))
    delta = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (v.repeat_interleave(u.shape[1] // v.shape[1], dim=1) for v in (B, C))
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    out = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        out.append((state * C[..., t]).sum(-1))
    y = torch.stack(out, dim=-1)
    return y if D is None else y + D.double()[:, None] * u


def inputs(batch=2, channels=12, length=37, groups=4, states=5, step=1.0, shift=0.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    sequence = (batch, channels, length)
    mixing = (batch, groups, states, length)
    values = [
        normal(*sequence), step * normal(*sequence) + shift, -torch.exp(normal(channels, states)),
        normal(*mixing), normal(*mixing), normal(channels), normal(channels),
    ]  # fmt: skip
    return [v.requires_grad_() for v in values]


def with_gradients(function, values: Sequence[Tensor], **settings) -> list[Tensor]:
    y = function(*values, **settings)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y, *torch.autograd.grad(y, values, weight, allow_unused=True)]


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor | None], tolerance: float = 1e-5) -> None:
    for name, a, b in zip(NAMES, ours, exact, strict=False):
        b = torch.zeros_like(a) if b is None else b
        scale = b.abs().max().item() or 1.0
        error = (a.double() - b.double()).abs().max().item() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(length=1),
        dict(length=2),
        dict(batch=1, channels=384, length=300, states=16),  # several blocks one after the other
        dict(batch=9, channels=512, groups=2, states=64, length=5),  # several blocks of images
        dict(groups=1),
        dict(groups=12),
        dict(step=30.0),
        dict(step=3.0, shift=300.0, length=200),  # exp(delta A) is 0 in float32
        dict(step=1.0, shift=-20.0, length=200),  # hardly anything decays
    ],
    ids=str,
)
def test_equals_the_loop(shape) -> None:
    values = inputs(**shape)
    exact = with_gradients(loop, values, delta_softplus=True)
    assert_close(with_gradients(selective_scan, values, delta_softplus=True), exact)


@pytest.mark.parametrize("images, rows, lanes", [(2, 37, 1), (1, 8, 1), (2, 7, 6), (1, 4, 3), (2, 1, 37), (1, 3, 13)])
def test_any_way_to_cut_the_work_gives_the_same(monkeypatch, images, rows, lanes) -> None:
    monkeypatch.setattr(scan_module, "plan", lambda *_: scan_module.Plan(images, rows, lanes))
    values = inputs()
    exact = with_gradients(loop, values, delta_softplus=True)
    assert_close(with_gradients(selective_scan, values, delta_softplus=True), exact)


def test_gpu_plan_takes_few_steps_and_bounded_memory() -> None:
    for batch, length, state in [(1, 3136, 6144), (64, 3136, 6144), (64, 49, 49152), (256, 1, 98304)]:
        images, rows, lanes = scan_module.plan(torch.device("cuda"), batch, length, state)
        assert rows * lanes >= length
        assert 2 * rows + lanes <= 4 * length**0.5 + 4
        assert images * rows * lanes * state <= 2**28


def test_optional_arguments_and_three_dimensional_b_and_c() -> None:
    u, delta, A, B, C, D, bias = inputs(groups=1)
    delta, bias = delta.abs(), bias.abs()
    plain = with_gradients(selective_scan, [u, delta, A, B, C])
    assert_close(plain, with_gradients(loop, [u, delta, A, B, C]))
    assert torch.equal(selective_scan(u, delta, A, B[:, 0], C[:, 0]), plain[0])
    skip = selective_scan(u, delta, A, B, C, D)
    torch.testing.assert_close(skip, plain[0] + D[:, None] * u)
    biased = selective_scan(u, delta, A, B, C, None, bias)
    torch.testing.assert_close(biased, selective_scan(u, delta + bias[:, None], A, B, C))


def test_grouped_layout_and_free_strides() -> None:
    u, delta, *rest = inputs(shift=3.0, step=0.1)
    grouped = selective_scan(u.unflatten(1, (4, 3)), delta.unflatten(1, (4, 3)), *rest)
    assert grouped.shape == (2, 4, 3, 37)
    assert torch.equal(grouped.flatten(1, 2), selective_scan(u, delta, *rest))
    strided = selective_scan(*(v.transpose(0, -1).contiguous().transpose(0, -1) for v in (u, delta, *rest)))
    torch.testing.assert_close(strided, selective_scan(u, delta, *rest))


@pytest.mark.parametrize("length", [1, 6])
def test_gradients_in_float64(length) -> None:
    values = [v.detach().double().requires_grad_() for v in inputs(batch=2, channels=4, groups=2, states=3, length=length)]
    assert selective_scan(*values).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *v: selective_scan(*v, delta_softplus=True), values)


def test_float32_inside_bf16_autocast() -> None:
    values = inputs(length=64)
    exact = with_gradients(loop, values, delta_softplus=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(selective_scan, values, delta_softplus=True)  # backward inside autocast, too
    assert ours[0].dtype == torch.float32
    assert_close(ours, exact)


def test_bf16_inputs_are_computed_in_float32() -> None:
    values = [v.detach().bfloat16().requires_grad_() for v in inputs(length=64)]
    exact = with_gradients(loop, values, delta_softplus=True)
    ours = with_gradients(selective_scan, values, delta_softplus=True)
    assert all(v.dtype == torch.bfloat16 for v in ours)
    assert_close(ours, exact, tolerance=2**-7)  # the rounding of the results alone


def test_same_bits_twice() -> None:
    values = inputs(batch=3, channels=96, length=300)
    first, second = (with_gradients(selective_scan, values, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_state_of_an_image_does_not_leak_into_another() -> None:
    values = inputs(batch=3, channels=512, states=64, length=7)
    with torch.no_grad():
        together = selective_scan(*values, delta_softplus=True)
        alone = selective_scan(*(v[1:2] if v.dim() > 2 else v for v in values), delta_softplus=True)
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize(
    "position, change, said",
    [
        (1, lambda v: v[:, :, 1:], "delta must be shaped like u"),
        (2, lambda v: v[:-1], r"A \(D, N\)"),
        (3, lambda v: v[:, :, 1:], "B must be"),
        (4, lambda v: v[..., 1:], "C must be"),
        (5, lambda v: v[1:], r"D must be \(12,\)"),
        (6, lambda v: v[1:], r"delta_bias must be \(12,\)"),
    ],
)
def test_wrong_shapes_are_named(position, change, said) -> None:
    values = inputs()
    values[position] = change(values[position])
    with pytest.raises(ValueError, match=said):
        selective_scan(*values)


def test_groups_must_divide_the_channels() -> None:
    u, delta, A, B, C, *_ = inputs(channels=10, groups=5)
    with pytest.raises(ValueError, match="groups"):
        selective_scan(u, delta, A, B[:, :4], C[:, :4])


def test_mamba_kernel_is_asked_in_its_own_shapes_and_float32() -> None:
    asked = []

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        """mamba-ssm's signature."""
        asked.extend([u, delta, A, B, C, D, delta_bias])
        assert z is None
        return loop(u, delta, A, B, C, D, delta_bias, delta_softplus).float()

    u, delta, *rest = (v.detach().bfloat16() for v in inputs())
    y = scan_module._by_kernel(kernel, u.unflatten(1, (4, 3)), delta.unflatten(1, (4, 3)), *rest, True)
    assert all(v.dtype == torch.float32 for v in asked) and asked[0].shape == (2, 12, 37)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.flatten(1, 2), selective_scan(u, delta, *rest, delta_softplus=True))


MEMORY = """
import resource, torch
from medtune.ops import selective_scan
torch.set_num_threads(2)
def peak(length):
    u, delta, y = (torch.randn(1, 384, length) for _ in range(3))
    mixing = [torch.randn(1, 4, 16, length, requires_grad=True) for _ in range(2)]
    A = -torch.rand(384, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    selective_scan(u.requires_grad_(), delta.requires_grad_(), A.requires_grad_(), *mixing, delta_softplus=True).backward(y)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
peak(64)
print(peak(3136))
"""


def test_memory_stays_under_100_mb_above_the_inputs() -> None:
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 100


@pytest.mark.gpu
def test_cuda_equals_the_loop() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in (dict(), dict(length=1), dict(batch=1, length=1000, states=16)):
        values = inputs(**shape)
        exact = with_gradients(loop, values, delta_softplus=True)
        on_device = [v.detach().cuda().requires_grad_() for v in values]
        y = selective_scan(*on_device, delta_softplus=True)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).cuda()
        ours = [y, *torch.autograd.grad(y, on_device, weight)]
        assert_close([v.cpu() for v in ours], exact, tolerance=1e-4)


def test_working_memory_goes_when_the_scan_ends() -> None:
    """Not at the next garbage collection: on a GPU that was 70 GB for a batch of medmamba_s."""
    inputs = [torch.randn(1, 8, 16), torch.rand(1, 8, 16), -torch.rand(8, 4), torch.randn(1, 4, 16), torch.randn(1, 4, 16)]
    gc.collect()
    gc.disable()
    try:
        before = len([x for x in gc.get_objects() if type(x).__name__ in ("_Room", "_Rooms")])
        leaves = [x.requires_grad_() for x in inputs]
        scan_module.selective_scan(*leaves).sum().backward()
        after = len([x for x in gc.get_objects() if type(x).__name__ in ("_Room", "_Rooms")])
    finally:
        gc.enable()
    assert after == before


@pytest.mark.parametrize("length", [2, 5, 49, 200])
def test_what_is_exported_equals_the_scan(length: int) -> None:
    """As a program's graph has it, for steps that forget at once and for those that hardly do."""
    torch.manual_seed(length)
    u, b, c = torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4)
    delta, a = torch.rand(2, 3, length, 8) * torch.tensor([1e-4, 1e-2, 1, 300]).repeat(2), -torch.rand(2, 4, 8) * 16
    flat = (v.permute(1, 0, 3, 2) for v in (u, delta, b, c))  # (batch, G, ., L)
    wide = [v.flatten(1, 2) if place < 2 else v for place, v in enumerate(flat)]
    wanted = selective_scan(wide[0], wide[1], a.transpose(1, 2).flatten(0, 1), *wide[2:])
    found = traced_scan(u, delta, a, b, c).permute(1, 0, 3, 2).flatten(1, 2)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
