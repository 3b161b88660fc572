"""Device transforms equal torchvision's: boxes in distribution, pixels to rounding errors."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision import transforms as torchvision_transforms
from torchvision.transforms.v2 import functional

from medtune.data.transforms import augment, match_resolution, prepare, resized_crop, sample_boxes


def images(count: int, height: int, width: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def boxes_by_torchvision(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    get = torchvision_transforms.RandomResizedCrop.get_params
    blank = torch.empty(1, height, width)
    return torch.tensor([get(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 32), (28, 28, 224), (28, 28, 28), (64, 64, 33), (224, 224, 224), (90, 60, 48)],
)
def test_crops_equal_torchvision(height: int, width: int, size: int) -> None:
    batch, generator = images(24, height, width), torch.Generator().manual_seed(1)
    boxes = sample_boxes(24, height, width, generator)
    boxes[0] = torch.tensor([0, 0, height, width])  # all of it, and the smallest
    boxes[1] = torch.tensor([height - 1, width - 1, 1, 1])
    flips = torch.arange(24) % 2 == 1
    expected = torch.stack(
        [
            functional.resized_crop(image.float() / 255, *box.tolist(), [size, size], antialias=True)
            for image, box in zip(batch, boxes, strict=True)
        ]
    )
    expected[flips] = expected[flips].flip(-1)
    assert torch.allclose(resized_crop(batch, boxes, flips, size) / 255, expected, rtol=0, atol=1e-5)


def test_rounded_crops_are_within_a_grey_level_of_uint8_torchvision() -> None:
    """What PIL and torchvision's uint8 path give is the same interpolation, rounded: at most one level away."""
    batch, generator = images(24, 28, 28), torch.Generator().manual_seed(2)
    boxes = sample_boxes(24, 28, 28, generator)
    ours = resized_crop(batch, boxes, torch.zeros(24, dtype=torch.bool), 48)
    for image, box, mine in zip(batch, boxes, ours, strict=True):
        theirs = functional.resized_crop(image, *box.tolist(), [48, 48], antialias=True).float()
        assert (mine - theirs).abs().max() <= 1.01


@pytest.mark.parametrize(("height", "width"), [(28, 28), (224, 224), (60, 100)])
def test_boxes_have_torchvisions_distribution(height: int, width: int) -> None:
    count = 4000
    ours = sample_boxes(count, height, width, torch.Generator().manual_seed(3)).numpy()
    theirs = boxes_by_torchvision(count, height, width, seed=4).numpy()
    for name, a, b in zip(("top", "left", "height", "width"), ours.T, theirs.T, strict=True):
        assert ks_2samp(a, b).pvalue > 0.01, name
    for name, function in {"area": lambda x: x[:, 2] * x[:, 3], "ratio": lambda x: x[:, 3] / x[:, 2]}.items():
        assert ks_2samp(function(ours), function(theirs)).pvalue > 0.01, name
    # Joint, not only each alone: where a box lies depends on how large it is.
    assert ks_2samp(ours[:, 0] + ours[:, 2], theirs[:, 0] + theirs[:, 2]).pvalue > 0.01


def test_boxes_lie_inside() -> None:
    boxes = sample_boxes(5000, 28, 40, torch.Generator().manual_seed(0))
    top, left, height, width = boxes.unbind(1)
    assert ((top >= 0) & (left >= 0) & (height > 0) & (width > 0)).all()
    assert ((top + height <= 28) & (left + width <= 40)).all()
    assert not torch.is_floating_point(boxes)


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (5, 6000)])
def test_a_box_that_never_fits_falls_back_as_torchvision(height: int, width: int) -> None:
    ours = {tuple(box) for box in sample_boxes(300, height, width, torch.Generator().manual_seed(0)).tolist()}
    theirs = {tuple(box) for box in boxes_by_torchvision(300, height, width, seed=0).tolist()}
    fallback = max(theirs, key=lambda box: box[2] * box[3])
    assert fallback in ours
    assert max(ours, key=lambda box: box[2] * box[3]) == fallback


def test_augment_is_the_reports_transform() -> None:
    """Crop, flip and Normalize(0.5, 0.5), on three equal channels."""
    batch = images(40, 28, 28)
    out = augment(batch, 32, torch.Generator().manual_seed(7))
    assert out.shape == (40, 3, 32, 32) and out.dtype == torch.float32 and out.is_contiguous()
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    generator = torch.Generator().manual_seed(7)
    boxes = sample_boxes(40, 28, 28, generator)
    flips = torch.rand(40, generator=generator) < 0.5
    assert 8 < flips.sum() < 32
    for image, box, flip, result in zip(batch, boxes, flips, out, strict=True):
        expected = functional.resized_crop(image.float() / 255, *box.tolist(), [32, 32], antialias=True)
        expected = expected.flip(-1) if flip else expected
        expected = functional.normalize(expected.repeat(3, 1, 1), [0.5] * 3, [0.5] * 3)
        assert torch.allclose(result, expected, atol=1e-5)


def test_every_image_is_drawn_on_its_own_and_by_the_generator_alone() -> None:
    batch = images(1, 28, 28).repeat(16, 1, 1, 1)
    first = augment(batch, 28, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    again = augment(batch, 28, torch.Generator().manual_seed(1))
    other = augment(batch, 28, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 16


def test_half_precision_around_does_not_reach_the_pixels() -> None:
    batch = images(4, 28, 28)
    plain = augment(batch, 48, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = augment(batch, 48, torch.Generator().manual_seed(1))
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)


@pytest.mark.parametrize(("side", "size"), [(28, 224), (28, 28), (256, 224), (256, 32), (64, 224)])
def test_prepare_is_resize_and_normalize(side: int, size: int) -> None:
    batch = images(5, side, side)
    expected = functional.resize(batch.float() / 255, [size, size], antialias=True).repeat(1, 3, 1, 1)
    expected = functional.normalize(expected, [0.5] * 3, [0.5] * 3)
    out = prepare(batch, size)
    assert out.shape == (5, 3, size, size) and out.dtype == torch.float32
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)


def test_colour_stays_colour() -> None:
    batch = images(3, 28, 28, channels=3)
    out = prepare(batch, 28)
    assert torch.allclose(out, batch.float() / 127.5 - 1, atol=1e-6)
    assert augment(batch, 32, torch.Generator().manual_seed(0)).shape == (3, 3, 32, 32)


def test_matched_images_are_what_a_file_of_that_size_would_hold() -> None:
    batch = images(70, 256, 256)
    out = match_resolution(batch, 28)
    assert out.shape == (70, 1, 28, 28) and out.dtype == torch.uint8
    expected = functional.resize(batch, [28, 28], antialias=True)
    difference = (out.int() - expected.int()).float()
    assert difference.abs().max() <= 1 and difference.mean().abs() < 0.05  # rounded, not cut off
    smooth = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[None, None]
    assert (match_resolution(smooth, 128)[0, 0, 5].int().diff() == 2).sum() >= 120


def test_matching_never_enlarges() -> None:
    batch = images(2, 28, 28)
    assert torch.equal(match_resolution(batch, 64), batch)


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(B, C, H, W\)"):
        prepare(bad, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_makes_no_difference_and_is_never_waited_for() -> None:
    batch = images(32, 28, 28)
    on_cpu = augment(batch, 224, torch.Generator().manual_seed(5))
    on_device = batch.cuda()
    augment(on_device, 224, torch.Generator().manual_seed(5))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(on_device, 224, torch.Generator().manual_seed(5))
        prepare(on_device, 224)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.is_cuda and torch.allclose(out.cpu(), on_cpu, atol=1e-4)
