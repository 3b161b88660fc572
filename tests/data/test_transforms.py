"""Device transforms equal torchvision's: boxes in distribution, pixels to rounding errors."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision import transforms as torchvision_transforms
from torchvision.transforms.v2 import functional

from medtune.data import transforms
from medtune.data.transforms import Draws, augment, draw, match_resolution, prepare, resized_crop, sample_boxes


def images(count: int, height: int, width: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def augmented(batch: torch.Tensor, size: int, seed: int, strength: float = 0.0) -> torch.Tensor:
    draws = draw(len(batch), *batch.shape[-2:], torch.Generator().manual_seed(seed), strength)
    return augment(batch, size, draws)


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
    out = augmented(batch, 32, 7)
    assert out.shape == (40, 3, 32, 32) and out.dtype == torch.float32
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


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_it_can_be_compiled_whole(strength, monkeypatch) -> None:
    """Traced, not compiled to machine code, which takes a minute."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: real(f, fullgraph=True, backend="eager", **more))
    monkeypatch.setattr(transforms, "_compiled_change", transforms._compiled_change.__wrapped__)
    batch = images(4, 28, 28)
    draws = draw(4, 28, 28, torch.Generator().manual_seed(3), strength)
    assert torch.equal(augment(batch, 32, draws, compiles=True), augment(batch, 32, draws))


def test_every_image_is_drawn_on_its_own_and_by_the_generator_alone() -> None:
    batch = images(1, 28, 28).repeat(16, 1, 1, 1)
    first = augmented(batch, 28, 1)
    torch.manual_seed(99)
    again = augmented(batch, 28, 1)
    other = augmented(batch, 28, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 16


def test_half_precision_around_does_not_reach_the_pixels() -> None:
    batch = images(4, 28, 28)
    plain = augmented(batch, 48, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = augmented(batch, 48, 1)
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
    assert augmented(batch, 32, 0).shape == (3, 3, 32, 32)


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


# --- strength


def one_look(contrast: float = 1, brightness: float = 1, sigma: float = 0, kept: float = 1, count: int = 8) -> Draws:
    """Draws that leave the image uncut and change one thing."""
    boxes = torch.tensor([[0, 0, 64, 64]], dtype=torch.int32).repeat(count, 1)
    looks = torch.tensor([[contrast, brightness, sigma, kept]]).repeat(count, 1)
    return Draws(boxes, torch.zeros(count, dtype=torch.bool), looks)


def spread(images: torch.Tensor) -> torch.Tensor:
    return images.std(dim=(1, 2, 3))


def grey(count: int = 8, low: int = 90, high: int = 150) -> torch.Tensor:
    """Noise far from black and white, so that nothing is cut off."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, 1, 64, 64), dtype=torch.uint8, generator=generator)


def detail(images: torch.Tensor) -> torch.Tensor:
    """Energy per image in the upper half of the frequencies of either axis."""
    power = torch.fft.rfft2(images[:, 0] - images[:, 0].mean(dim=(1, 2), keepdim=True)).abs() ** 2
    return power[:, 16:48].sum(dim=(1, 2)) + power[:, :, 16:].sum(dim=(1, 2))


@pytest.mark.parametrize(("height", "width", "channels"), [(28, 28, 1), (60, 90, 3)])
def test_without_strength_nothing_but_crops_and_mirrors(height: int, width: int, channels: int) -> None:
    """Bit for bit what was there before strength was, and no number more is drawn."""
    batch = images(9, height, width, channels)
    generator, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    out = augment(batch, 32, draw(9, height, width, generator, 0.0))
    boxes = sample_boxes(9, height, width, plain)
    flips = torch.rand(9, generator=plain) < 0.5
    expected = resized_crop(batch.to(torch.float32).mul_(2 / 255).sub_(1), boxes, flips, 32)
    assert torch.equal(out, expected if channels == 3 else expected.repeat(1, 3, 1, 1))
    assert torch.equal(generator.get_state(), plain.get_state())


def test_strength_leaves_crops_and_mirrors_alone() -> None:
    plain, strong = (draw(50, 28, 28, torch.Generator().manual_seed(1), strength) for strength in (0.0, 0.7))
    assert torch.equal(plain.boxes, strong.boxes) and torch.equal(plain.flips, strong.flips)
    assert plain.looks is None and strong.looks is not None


@pytest.mark.parametrize(("strength", "side", "widest"), [(1.0, 224, 2.0), (0.5, 224, 1.0), (1.0, 28, 1.0)])
def test_amounts_fill_their_range_and_are_each_images_own(strength: float, side: int, widest: float) -> None:
    looks = draw(4000, side, side, torch.Generator().manual_seed(0), strength).looks
    assert looks is not None and looks.dtype == torch.float32
    low = torch.tensor([1 - 0.4 * strength, 1 - 0.4 * strength, 0, 4**-strength])
    high = torch.tensor([1 + 0.4 * strength, 1 + 0.4 * strength, widest, 1])
    assert (looks >= low).all() and (looks <= high).all()
    assert torch.allclose(looks.amin(0), low, atol=0.01) and torch.allclose(looks.amax(0), high, atol=0.01)
    assert abs(torch.corrcoef(looks.T) - torch.eye(4)).max() < 0.06


def test_looks_of_one_change_nothing() -> None:
    assert torch.allclose(augment(grey(), 64, one_look()), prepare(grey(), 64), atol=1e-6)


def test_contrast_scales_the_spread_about_the_mean() -> None:
    plain, out = prepare(grey(), 64), augment(grey(), 64, one_look(contrast=0.7))
    assert torch.allclose(spread(out), 0.7 * spread(plain), rtol=1e-4)
    assert torch.allclose(out.mean(dim=(1, 2, 3)), plain.mean(dim=(1, 2, 3)), atol=1e-5)


def test_brightness_moves_the_mean_from_black() -> None:
    plain, out = prepare(grey(), 64), augment(grey(), 64, one_look(brightness=1.3))
    assert torch.allclose(out + 1, 1.3 * (plain + 1), atol=1e-5)
    assert torch.equal(augment(grey(low=250, high=256), 64, one_look(brightness=1.3)), torch.ones(8, 3, 64, 64))


@pytest.mark.parametrize("look", [{"sigma": 1.0}, {"kept": 0.5}, {"sigma": 2.0, "kept": 0.25}])
def test_blur_and_resolution_take_detail_and_leave_the_mean(look: dict[str, float]) -> None:
    plain, out = prepare(grey(), 64), augment(grey(), 64, one_look(**look))
    assert (detail(out) < 0.25 * detail(plain)).all()
    assert torch.allclose(out.mean(dim=(1, 2, 3)), plain.mean(dim=(1, 2, 3)), atol=0.01)
    flat = torch.full((8, 1, 64, 64), 77, dtype=torch.uint8)
    assert torch.allclose(augment(flat, 64, one_look(**look)), prepare(flat, 64), atol=1e-5)


def test_blur_is_a_gaussian() -> None:
    expected = functional.gaussian_blur(prepare(grey(), 64), [17, 17], [1.5, 1.5])
    out = augment(grey(), 64, one_look(sigma=1.5))
    assert torch.allclose(out[..., 9:-9, 9:-9], expected[..., 9:-9, 9:-9], atol=1e-4)


def test_a_lower_resolution_is_down_and_up() -> None:
    small = functional.resize(prepare(grey(), 64), [32, 32], antialias=True)
    expected = functional.resize(small, [64, 64], antialias=True)
    assert torch.allclose(augment(grey(), 64, one_look(kept=0.5)), expected, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_parts_of_a_batch_become_what_they_are_in_it(strength: float) -> None:
    batch = images(11, 28, 28)
    draws = draw(11, 28, 28, torch.Generator().manual_seed(1), strength)
    whole = augment(batch, 40, draws)
    parts = [augment(batch[a:b], 40, draws.part(a, b)) for a, b in ((0, 4), (4, 5), (5, 11))]
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_strong_augmentation_is_within_range_and_of_its_seed_alone() -> None:
    batch = images(16, 28, 28, channels=3)
    out = augmented(batch, 32, 5, strength=1.0)
    torch.manual_seed(99)
    assert torch.equal(out, augmented(batch, 32, 5, strength=1.0))
    assert not torch.equal(out, augmented(batch, 32, 5, strength=0.9))
    assert out.shape == (16, 3, 32, 32) and out.abs().max() <= 1 + 1e-6 and out.isfinite().all()


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(B, C, H, W\)"):
        prepare(bad, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_device_makes_no_difference_and_is_never_waited_for(strength: float) -> None:
    batch = images(32, 28, 28)
    on_cpu = augmented(batch, 224, 5, strength)
    on_device = batch.cuda()
    augmented(on_device, 224, 5, strength)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augmented(on_device, 224, 5, strength)
        prepare(on_device, 224)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.is_cuda and torch.allclose(out.cpu(), on_cpu, atol=1e-4)
