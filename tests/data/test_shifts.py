"""Simulated shifts: fixed, each what its name says, the same in batches of any size."""

import numpy as np
import pytest
import torch

from medtune.data.shifts import NOISE, SHIFTS
from medtune.data.transforms import EXPOSURE

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(60, 140, (70, 1, 28, 28)).astype(np.uint8))


def spread(images):
    return images.float().std(dim=(1, 2, 3)).mean().item()


def level(images):
    return images.float().mean().item()


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_is_the_same_each_time_and_in_batches_of_any_size(name):
    whole = SHIFTS[name](IMAGES, 0)
    assert whole.dtype == torch.uint8 and whole.shape[:2] == IMAGES.shape[:2]
    assert whole.shape != IMAGES.shape or not torch.equal(whole, IMAGES)
    parts = [SHIFTS[name](IMAGES[start : start + 33], start) for start in range(0, 70, 33)]
    assert torch.equal(torch.cat(parts), whole)
    colour = SHIFTS[name](IMAGES.repeat(1, 3, 1, 1), 0)
    assert colour.shape[1] == 3


def test_exposure_changes_by_as_much_as_it_says():
    assert spread(SHIFTS["less contrast"](IMAGES, 0)) == pytest.approx((1 - EXPOSURE) * spread(IMAGES), rel=0.03)
    assert spread(SHIFTS["more contrast"](IMAGES, 0)) == pytest.approx((1 + EXPOSURE) * spread(IMAGES), rel=0.03)
    assert level(SHIFTS["darker"](IMAGES, 0)) == pytest.approx((1 - EXPOSURE) * level(IMAGES), rel=0.02)
    assert level(SHIFTS["brighter"](IMAGES, 0)) == pytest.approx((1 + EXPOSURE) * level(IMAGES), rel=0.02)


def test_noise_has_the_stated_spread_and_differs_between_neighbours():
    added = SHIFTS["noise"](IMAGES, 0).float() - IMAGES.float()
    assert added.std().item() == pytest.approx(255 * NOISE, rel=0.02)
    assert not torch.equal(added[0], added[1])


def test_blur_and_a_lower_resolution_take_detail_away_and_keep_the_level():
    for name in ("blur", "half the resolution"):
        shifted = SHIFTS[name](IMAGES, 0)
        assert spread(shifted) < 0.7 * spread(IMAGES) and level(shifted) == pytest.approx(level(IMAGES), rel=0.01)
    assert SHIFTS["half the resolution"](IMAGES, 0).shape[-2:] == (14, 14)
