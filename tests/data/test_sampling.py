"""Orders and weights for classes of unequal size."""

from __future__ import annotations

import pytest
import torch

from medtune.data.sampling import class_weights, epoch_order


def labels(*counts: int) -> torch.Tensor:
    flat = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))]


def order(truth: torch.Tensor, imbalance: str, seed: int = 1) -> torch.Tensor:
    return epoch_order(truth, imbalance, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("imbalance", ["none", "weighted"])
def test_every_image_once_as_before(imbalance: str) -> None:
    """The order that studies had before the setting was: a seed goes on giving the same training."""
    truth = labels(30, 7)
    assert torch.equal(order(truth, imbalance), torch.randperm(37, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("counts", [(90, 10), (5, 5), (1, 60, 8), (3, 0, 40), (0, 9)])
def test_balanced_draws_every_class_equally_often(counts: tuple[int, ...]) -> None:
    truth = labels(*counts)
    drawn = order(truth, "balanced")
    assert drawn.dtype == torch.int64 and drawn.shape == truth.shape
    shares = torch.bincount(truth[drawn], minlength=len(counts))
    present = [label for label, count in enumerate(counts) if count]
    assert all(shares[label] in (len(truth) // len(present), -(-len(truth) // len(present))) for label in present)
    assert int(shares.sum()) == int(shares[present].sum())


def test_no_image_comes_again_before_all_of_its_class_have() -> None:
    truth = labels(90, 7)
    drawn = order(truth, "balanced")
    small = drawn[truth[drawn] == 1]
    for start in range(0, len(small), 7):
        part = small[start : start + 7].tolist()
        assert len(set(part)) == len(part)
    large = drawn[truth[drawn] == 0].tolist()
    assert len(set(large)) == len(large)
    assert small[:7].tolist() != small[7:14].tolist()


def test_balanced_order_mixes_classes_and_is_its_seeds() -> None:
    truth = labels(900, 100)
    drawn = order(truth, "balanced")
    assert torch.equal(drawn, order(truth, "balanced")) and not torch.equal(drawn, order(truth, "balanced", seed=2))
    per_batch = truth[drawn].float().split(100)
    assert all(0.3 < part.mean() < 0.7 for part in per_batch)
    left_out = [set(range(1000)) - set(order(truth, "balanced", seed).tolist()) for seed in range(12)]
    assert not set.intersection(*left_out)


def test_no_images_have_no_order() -> None:
    assert order(torch.zeros(0, dtype=torch.int64), "balanced").shape == (0,)


def test_weights_are_one_in_the_mean_and_equal_in_sum_per_class() -> None:
    truth = labels(60, 30, 10)
    weights = class_weights(truth, 3, "weighted")
    assert weights is not None and weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([100 / 180, 100 / 90, 100 / 30])
    assert weights[truth].mean().item() == pytest.approx(1)


def test_a_class_that_is_not_there_weighs_nothing() -> None:
    truth = labels(60, 0, 20)
    weights = class_weights(truth, 3, "weighted")
    assert weights is not None and weights.tolist() == pytest.approx([80 / 120, 0, 80 / 40])
    assert weights[truth].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("imbalance", ["none", "balanced"])
def test_other_choices_have_no_weights(imbalance: str) -> None:
    assert class_weights(labels(3, 4), 2, imbalance) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_do_not_wait_for_the_device() -> None:
    truth = labels(60, 0, 20).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = class_weights(truth, 3, "weighted")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weights is not None and weights.tolist() == pytest.approx([80 / 120, 0, 80 / 40])
